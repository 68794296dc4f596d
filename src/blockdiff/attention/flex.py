"""FlexAttention: only the tiles of 128 × 128 that somebody sees, in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from blockdiff.attention.masks import KINDS, Documents
from blockdiff.device import cached, compile_every_shape, rounded_up
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout

NARROWEST = 16  # head width that its CUDA kernel begins at


def prepare(
    layout: BlockLayout, kind: str, device: torch.device, documents: Documents | None
) -> BlockMask:
    return _layout_mask(layout, kind, device) if documents is None else _block_mask(
        layout, kind, device, documents
    )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    on_cuda = q.device.type == "cuda"
    if not on_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InputError(
            f"flex attention has no backward on {q.device.type}; train with the blockwise backend"
        )
    kernel = compiled() if on_cuda else flex_attention
    asked: dict[str, Any] = {"score_mod": None if softcap is None else _capped(softcap)}
    asked |= {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1], "block_mask": mask}
    if sinks is None:
        out: Tensor = kernel(q, k, v, **asked)
        return out
    out, found = kernel(q, k, v, **asked, return_aux=AuxRequest(lse=True))
    # Σ e^s / (Σ e^s + e^sink): what the sink leaves of a softmax without it
    return out * (found.lse - sinks[:, None]).sigmoid()[..., None].to(out.dtype)


@lru_cache(maxsize=8)  # one function for each cap: the kernel is compiled for it
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def padded(layout: BlockLayout) -> BlockLayout:
    """The layout with its length rounded up, with padding at its end, to one of a few.

    These are the powers of two from 128 on, made multiples of the block size.
    """
    length = max(128, rounded_up(layout.length))
    length += -(length + layout.offset) % layout.block_size
    documents = layout.documents
    if documents is not None:
        documents = F.pad(documents, (0, length - layout.length), value=-1)
    return replace(layout, length=length, documents=documents)


@lru_cache(maxsize=2)
def compiled(backend: str = "inductor") -> Any:
    """The kernel, compiled for every shape it meets.

    Uncompiled it has all H · Q · S scores in memory: falling back is an error (`fullgraph`).
    """
    compile_every_shape()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)


def predicate(layout: BlockLayout, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`KINDS[kind].sees` of the layout, in few integer operations.

    The kernel asks it for every number of a tile that is seen in part: written out, with divisions
    and remainders, the attention of a training step takes a quarter longer.
    """
    if layout.window is not None or layout.sliding is not None:
        return partial(KINDS[kind].sees, layout)
    length, size, offset = layout.length, layout.block_size, layout.offset
    shift = size.bit_length() - 1 if size & (size - 1) == 0 else None
    # Where a stream of noised tokens is alone, it is the second half of both.
    first_query = length if kind in ("noised", "alone") else 0
    first_key = length if kind == "alone" else 0

    def block(position: Tensor) -> Tensor:
        return (position + offset) // size if shift is None else (position + offset) >> shift

    def sees(query: Tensor, key: Tensor) -> Tensor:
        query, key = query + first_query, key + first_key
        of_query, of_key = (query >= length).to(torch.int32), (key >= length).to(torch.int32)
        query, key = query - length * of_query, key - length * of_key
        its, other = block(query), block(key)
        clean = other + of_query <= its
        if layout.clean == "causal":
            clean = torch.where(of_query == 1, other < its, key <= query)
        noised = ((of_query & of_key) == 1) & (its == other)
        if layout.inside == "causal":
            noised = noised & (key <= query)
        return ((of_key == 0) & clean) | noised

    return sees


@cached
def _layout_mask(layout: BlockLayout, kind: str, device: torch.device) -> BlockMask:
    return _block_mask(layout, kind, device, None)


def _block_mask(
    layout: BlockLayout, kind: str, device: torch.device, documents: Documents | None
) -> BlockMask:
    _, queries, keys = KINDS[kind]
    sees = predicate(layout, kind)

    def by_layout(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key)

    def by_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert documents is not None
        of_query, of_key = documents
        return sees(query, key) & (of_query[b, query] == of_key[b, key])

    length = layout.length
    return create_block_mask(
        by_layout if documents is None else by_document,
        None if documents is None else len(documents[0]),
        None,
        queries * length,
        keys * length,
        device=device,
    )
