"""SDPA in two ways: with the whole mask as a tensor, the slow and obvious reference ("dense"), and
without a mask tensor where the layout needs none, by its fast kernels ("sdpa").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdiff.attention.masks import Documents, dense_mask, same_document
from blockdiff.layout import BlockLayout


def prepare(
    layout: BlockLayout, kind: str, device: torch.device, documents: Documents | None
) -> Tensor:
    """bool [Q, S], or [B, 1, Q, S] where documents differ by row."""
    mask = dense_mask(layout, kind, device)
    return mask if documents is None else (mask & same_document(*documents))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool) -> Tensor:
    """`mask`: a bool tensor; or without one, True for causal attention and False for full."""
    if isinstance(mask, bool):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def needs_no_mask(layout: BlockLayout, kind: str) -> bool:
    """Whether a stream's attention is full (MDLM) or causal (AR)."""
    bounded = layout.window is not None and layout.window < layout.length
    alone = kind == "clean" and layout.documents is None and not bounded
    return alone and layout.block_size in (1, layout.length)


def pays_without_mask(layout: BlockLayout, kind: str, device: torch.device) -> bool:
    """Whether that is faster than `flex` on CUDA (not measured yet), or than `blockwise` elsewhere.

    On a CPU full attention is faster than `blockwise` from 256 positions on; causal attention is
    about as fast in float32, and slower in bf16.
    """
    fast = device.type == "cuda" or (device.type == "cpu" and layout.block_size >= 256)
    return fast and needs_no_mask(layout, kind)
