"""Keys and values of clean blocks, for decoding.

The cache is exact: a clean block attends to itself and to the blocks before it (M_BC), never to a
later one, so its keys and values do not change once it is finished. They are stored rotated; RoPE
is relative, so they stay valid while the window slides.

Shapes: B rows, M layers, H heads, C capacity in tokens, K block size, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockCache:
    """A ring of C token slots per row, allocated once.

    Rows advance on their own: `lengths` [B] counts the tokens each row has appended so far, and
    token p lies in slot p mod C. Appending past the capacity overwrites the oldest tokens, which
    is the sliding window. Everything is aligned to blocks, since C and each append are multiples
    of the block size.
    """

    def __init__(
        self,
        rows: int,
        layers: int,
        heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, rows, heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.capacity = capacity

    def visible(self) -> Tensor:
        """Which slots hold a token: bool [B, C] (all that are stored are inside the window)."""
        slot = torch.arange(self.capacity, device=self.lengths.device)
        return slot < self.lengths[:, None]

    def append(self, rows: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Stores the first `counts` [n] tokens of each of the rows [n] and advances them.

        `keys`, `values` [M, n, H, T, D], rotated for the rows' own positions. Where more than C
        tokens come at once only the last C are kept.
        """
        if self.capacity:
            index = torch.arange(keys.shape[3], device=keys.device)
            kept = (index < counts[:, None]) & (index >= counts[:, None] - self.capacity)  # [n, T]
            row, token = kept.nonzero(as_tuple=True)
            slot = (self.lengths[rows[row]] + token) % self.capacity
            # Advanced indices apart from one another put the indexed dimension first: [i, M, H, D].
            self.keys[:, rows[row], :, slot] = keys[:, row, :, token].to(self.keys.dtype)
            self.values[:, rows[row], :, slot] = values[:, row, :, token].to(self.values.dtype)
        self.lengths[rows] += counts

    def keep(self, rows: Tensor) -> None:
        """Drops every row but those given, in that order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
