"""SDPA's own kernels, for the two layouts that need no mask tensor: AR's and MDLM's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdiff.attention.masks import Documents
from blockdiff.layout import BlockLayout


def can(layout: BlockLayout, kind: str) -> bool:
    """Whether one stream sees everything (L' = L), or everything up to itself (L' = 1)."""
    bounded = layout.window is not None and layout.window < layout.length
    return kind == "clean" and not bounded and layout.block_size in (1, layout.length)


def pays(layout: BlockLayout, kind: str, device: torch.device) -> bool:
    """Whether it is faster than `flex` on CUDA (not measured yet), or than `blockwise` elsewhere.

    On a CPU it takes half of that one's time where everything is seen and texts are long. With
    `is_causal` it takes 0.8 in float32, but up to 2 times as long in bf16.
    """
    if device.type == "cuda":
        return can(layout, kind)
    return can(layout, kind) and device.type == "cpu" and layout.block_size >= 256


def prepare(
    layout: BlockLayout, kind: str, device: torch.device, documents: Documents | None
) -> bool:
    """Whether a query sees only the keys up to its own."""
    assert documents is None and can(layout, kind)
    return layout.block_size < layout.length


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
