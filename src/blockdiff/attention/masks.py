"""The parts of the two-stream mask, as predicates and as tensors; what the backends begin from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from blockdiff.device import cached
from blockdiff.layout import BlockLayout

Documents = tuple[Tensor, Tensor]  # int64 [B, Q] of the queries and [B, S] of the keys


class Kind(NamedTuple):
    """`sees(layout, query, key)`, and how many streams of L tokens queries and keys are."""

    sees: Callable[[BlockLayout, Tensor, Tensor], Tensor]
    queries: int
    keys: int


KINDS = {
    "alone": Kind(BlockLayout.m_bd, 1, 1),
    "clean": Kind(BlockLayout.m_bc, 1, 1),
    "noised": Kind(BlockLayout.noised_sees, 1, 2),
    "two_stream": Kind(BlockLayout.two_stream_sees, 2, 2),
}


@cached
def dense_mask(layout: BlockLayout, kind: str, device: torch.device) -> Tensor:
    """The whole mask as a bool tensor, True = may attend.

    `kind` "alone" and "clean": [L, L]; "noised": [L, 2L] over x_0 ⊕ x_t; "two_stream": [2L, 2L].
    """
    return mask_rows(layout, kind, slice(0, KINDS[kind].queries * layout.length), device)


def mask_rows(layout: BlockLayout, kind: str, queries: slice, device: torch.device) -> Tensor:
    """The rows `queries` of `dense_mask`, without making the others."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(KINDS[kind].keys * layout.length, device=device)[None, :]
    return KINDS[kind].sees(layout, query, key)


def same_document(of_query: Tensor, of_key: Tensor) -> Tensor:
    """[B, Q, S] bool."""
    return of_query[:, :, None] == of_key[:, None, :]
