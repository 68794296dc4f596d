"""Attention with the whole mask as a tensor: the slow, obvious reference."""

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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
