"""Attention under the block layout: three backends behind one call.

    dense      SDPA with the whole mask as a tensor: the slow, obvious reference
    blockwise  SDPA over chunks of queries, each with only the keys it may see: every device,
               forward and backward, no work on the tiles that are masked out whole
    flex       FlexAttention with a BlockMask: CUDA; on a CPU its forward only

Shapes: B batch, R draws, H heads, D head width, L positions, Q queries, S keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout, dense_mask

BACKENDS = ("auto", "dense", "blockwise", "flex")

# Queries per chunk of `blockwise`, or an eighth of the sequence if that is more: long enough for
# efficient matrix products, short enough that the half-masked tile on the diagonal stays a small
# part of the work.
CHUNK = 64


def choose_backend(backend: str, device: torch.device) -> str:
    """Resolves "auto": `flex` on CUDA, `blockwise` on the CPU and on MPS."""
    if backend not in BACKENDS:
        raise InputError(f"no attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    return "flex" if device.type == "cuda" else "blockwise"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kind: str,
    *,
    backend: str = "blockwise",
    documents: Tensor | None = None,
) -> Tensor:
    """Softmax attention under one part of the two-stream mask.

    `kind` "clean": q, k, v [B, H, L, D], the x_0 stream alone (M_BC). "noised": q [R·B, H, L, D]
    from x_t, k and v [R·B, H, 2L, D] over x_0 ⊕ x_t (M_OBC and M_BD). "two_stream": all 2L tokens
    x_0 ⊕ x_t at once, `dense` and `flex` only. `documents` int64 [B or R·B, L]: positions attend
    within their own document only (padding is a document of its own). Returns the shape of q.
    """
    if documents is not None:
        if documents.shape[0] != q.shape[0]:
            documents = documents.repeat(q.shape[0] // documents.shape[0], 1)
        streams = {"clean": (1, 1), "noised": (1, 2), "two_stream": (2, 2)}[kind]
        same = documents.repeat(1, streams[0]), documents.repeat(1, streams[1])
    else:
        same = None
    if backend == "dense":
        mask = dense_mask(layout, kind, q.device)
        if same is not None:
            mask = (mask & _same(same[0], same[1]))[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend == "blockwise":
        return _blockwise(q, k, v, layout, kind, same)
    if backend == "flex":
        return _flex(q, k, v, layout, kind, same)
    raise InputError(f"no attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")


def _same(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """[B, Q, S] bool."""
    return query_documents[:, :, None] == key_documents[:, None, :]


def _blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kind: str,
    documents: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if kind not in ("clean", "noised"):
        raise InputError(f"blockwise attention takes the two streams one at a time, not {kind!r}")
    out = []
    for start, stop, spans, mask in _chunks(layout, kind, q.device):
        keys, values = _gather(k, spans, -2), _gather(v, spans, -2)
        if documents is not None:
            same = _same(documents[0][:, start:stop], _gather(documents[1], spans, 1))
            mask = same[:, None] if mask is None else (mask & same)[:, None]
        out.append(
            F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=mask)
        )
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


Span = tuple[int, int]


def _gather(x: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """The spans of x along `dim`, side by side; a view when there is only one."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in spans if stop > start]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


@lru_cache(maxsize=64)
def _chunks(
    layout: BlockLayout, kind: str, device: torch.device
) -> list[tuple[int, int, tuple[Span, ...], Tensor | None]]:
    """(first query, end, spans of keys, mask or None) for each chunk of queries.

    A span no query of the chunk may see is left out; the mask, None where all is visible, is cut
    from the layout's one predicate.
    """
    size = max(CHUNK, layout.length // 8)
    size = max(size // layout.block_size, 1) * layout.block_size
    whole = dense_mask(layout, kind, device)
    chunks = []
    for start in range(0, layout.length, size):
        stop = min(start + size, layout.length)
        first = 0
        if layout.window is not None:
            first = max(0, start + layout.block_size - layout.window)
        if kind == "clean":
            spans: tuple[Span, ...] = ((first, stop),)
        else:
            # Clean keys end before the chunk's last block; noised keys are the chunk itself.
            clean = (min(first, stop - layout.block_size), stop - layout.block_size)
            spans = (clean, (layout.length + start, layout.length + stop))
        mask = _gather(whole[start:stop], spans, 1)
        chunks.append((start, stop, spans, None if bool(mask.all()) else mask.contiguous()))
    return chunks


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kind: str,
    documents: tuple[Tensor, Tensor] | None,
) -> Tensor:
    on_cuda = q.device.type == "cuda"
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if trained and not on_cuda:
        raise InputError(
            f"flex attention has no backward on {q.device.type}; train with the blockwise backend"
        )
    if documents is None:
        mask = _block_mask(layout, kind, q.device)
    else:
        mask = _document_block_mask(layout, kind, q.device, documents)
    run = _compiled_flex() if on_cuda else flex_attention
    return run(q, k, v, block_mask=mask)


@lru_cache(maxsize=1)
def _compiled_flex():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)


def _predicate(layout: BlockLayout, kind: str):  # type: ignore[no-untyped-def]
    return {
        "clean": layout.m_bc,
        "noised": layout.noised_sees,
        "two_stream": layout.two_stream_sees,
    }[kind]


def _sizes(layout: BlockLayout, kind: str) -> tuple[int, int]:
    queries, keys = {"clean": (1, 1), "noised": (1, 2), "two_stream": (2, 2)}[kind]
    return queries * layout.length, keys * layout.length


@lru_cache(maxsize=64)
def _block_mask(layout: BlockLayout, kind: str, device: torch.device) -> BlockMask:
    sees = _predicate(layout, kind)
    queries, keys = _sizes(layout, kind)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key)

    return create_block_mask(mask_mod, None, None, queries, keys, device=device)


def _document_block_mask(
    layout: BlockLayout, kind: str, device: torch.device, documents: tuple[Tensor, Tensor]
) -> BlockMask:
    sees = _predicate(layout, kind)
    queries, keys = _sizes(layout, kind)
    of_query, of_key = documents

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key) & (of_query[b, query] == of_key[b, key])

    return create_block_mask(mask_mod, of_query.shape[0], None, queries, keys, device=device)
