"""Attention under the block layout: several backends behind one call.

    dense      SDPA with the whole mask as a tensor: the slow, obvious reference
    blockwise  chunks of queries, each with only the keys it may see, as matrix products: every
               device, forward and backward, no work on tiles that are masked entirely
    flex       FlexAttention with a BlockMask: CUDA; on a CPU its forward only
    sdpa       SDPA without a mask tensor, for full attention (MDLM) and causal attention (AR):
               chosen by "auto" where it is faster

A mask is made once per pass and handed to every layer:

    mask = make_mask(layout, kind, "auto", device)
    attended = attend(q, k, v, mask)

Shapes: B batch, R draws, H heads (of queries), H_kv heads of keys and values, D head width,
L positions, Q queries, S keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockdiff.attention import blockwise, dense, flex
from blockdiff.attention.masks import KINDS, Documents
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout

BACKENDS = ("auto", "dense", "blockwise", "flex")
_ROOMS: dict[str, Any] = {"dense": dense, "blockwise": blockwise, "flex": flex, "sdpa": dense}


# On CUDA: without a gradient, SDPA with a mask tensor of up to so many numbers takes up to 1.9
# times as long as flex, which compiles for seconds for each number of prompts and each length.
SMALL = 2**24


class Mask(NamedTuple):
    """Who sees whom in one pass, in the form that `backend` reads."""

    backend: str
    form: Any


def choose_backend(
    backend: str,
    device: torch.device,
    head_dim: int = flex.NARROWEST,
    layout: BlockLayout | None = None,
    kind: str = "two_stream",
    rows: int | None = None,
) -> str:
    """Resolves "auto" by the device, and by the layout and its number of rows where they are given.

    `sdpa` where the layout needs no mask and that is faster; `flex` on CUDA, where it has a kernel
    for heads of `head_dim`, but `dense` for a pass that is `SMALL` where that has none, or where
    there is no gradient, as over a prompt; else `blockwise`. Raises `InputError` for a name not in
    `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise InputError(f"no attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if layout is not None and dense.pays_without_mask(layout, kind, device):
        return "sdpa"
    if device.type != "cuda":
        return "blockwise"
    wide, small = head_dim >= flex.NARROWEST, False
    if layout is not None:
        _, queries, keys = KINDS[kind]
        small = (rows or 1) * queries * keys * layout.length**2 <= SMALL
    if small and not (wide and torch.is_grad_enabled()):
        return "dense"
    return "flex" if wide else "blockwise"


def make_mask(
    layout: BlockLayout,
    kind: str,
    backend: str,
    device: torch.device,
    *,
    rows: int | None = None,
    head_dim: int = flex.NARROWEST,
) -> Mask:
    """The mask of one pass, for all its layers: one part of the two-stream mask.

    `kind` "clean": queries and keys are the x_0 stream alone (M_BC). "alone": they are the x_t
    stream alone (M_BD). "noised": queries are x_t, keys x_0 ⊕ x_t (M_OBC and M_BD). "two_stream":
    all 2L tokens x_0 ⊕ x_t at once. `rows` R·B: of the queries; row r·B + i has the documents of
    row i of the layout's [B, L].
    """
    if backend != "sdpa":
        backend = choose_backend(backend, device, head_dim, layout, kind, rows)
    if backend == "sdpa":
        assert dense.needs_no_mask(layout, kind)
        return Mask(backend, dense.is_causal(layout, kind))
    documents, layout = layout.documents, layout.plain
    pair: Documents | None = None
    if documents is not None:
        if rows is not None and rows != len(documents):
            documents = documents.repeat(rows // len(documents), 1)
        _, queries, keys = KINDS[kind]
        pair = documents.repeat(1, queries), documents.repeat(1, keys)
    return Mask(backend, _ROOMS[backend].prepare(layout, kind, device, pair))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [B, H, Q, D] over k [B, H_kv, S, D] and v [B, H_kv, S, D_v].

    Returns [B, H, Q, D_v]. The mask's kind says what Q and S are: L and L ("clean", "alone"), L and
    2L ("noised"), 2L and 2L. H is a multiple of H_kv: head h reads the keys of head h·H_kv // H.
    `scale` of the scores, 1/√D when left out. `softcap` c turns a score s into c·tanh(s/c). `sinks`
    [H]: a score more in each head's softmax, which has no value.

    Raises `InputError` when the heads do not fit each other.
    """
    if q.shape[1] % k.shape[1]:
        raise InputError(f"{q.shape[1]} heads are no multiple of {k.shape[1]} of keys and values")
    out: Tensor = _ROOMS[mask.backend].attend(q, k, v, mask.form, scale, softcap, sinks)
    return out


def repeat(x: Tensor, rows: int) -> Tensor:
    """B rows → R·B rows; row r·B + i is a copy of row i."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.dim() - 1))
