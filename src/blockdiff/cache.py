"""Keys and values of clean blocks, for decoding.

The cache is exact: a clean block attends to itself and to the blocks before it (M_BC), never to a
later one, so its keys and values do not change once it is finished. They are stored rotated; RoPE
is relative, so they stay valid while the window slides.

Memory is allocated once, in one buffer per layer. The tokens of the current evaluation are written
in front of the ring of cached tokens, so attention reads one contiguous view and nothing is copied:

    | a block just finished | the block being written | ring of C finished tokens |
              K                          K                         C

Shapes: n rows, M layers, H heads, C capacity in tokens, K block size, D head width, T ≤ 2K tokens
of an evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BlockCache:
    """A ring of C token slots per row.

    Rows advance on their own: `lengths` [n] counts the tokens each row has appended so far, and
    token p lies in slot p mod C. Appending past the capacity overwrites the oldest tokens, which
    is the sliding window. Everything is aligned to blocks, since C and each append are multiples
    of the block size. `rows` [n] says which rows of the caller's these are.
    """

    def __init__(
        self,
        rows: int,
        layers: int,
        heads: int,
        head_dim: int,
        capacity: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size, self.front = block_size, 2 * block_size
        shape = (layers, rows, heads, self.front + capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows = torch.arange(rows, device=device)
        self.capacity = capacity
        self.folded: Any = None  # what a network computes once for all evaluations with this cache
        self._begin = self.front
        self._used = 0

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts keys and values [n, H, T, D] in front of the ring; what attention reads.

        Both [n, H, T + used, D], the T tokens first; comes after `visible` of the same T tokens.
        """
        tokens = keys.shape[2]
        begin = self.front - tokens
        all_keys = self.keys[layer].narrow(2, begin, tokens + self._used)
        all_values = self.values[layer].narrow(2, begin, tokens + self._used)
        all_keys.narrow(2, 0, tokens).copy_(keys)
        all_values.narrow(2, 0, tokens).copy_(values)
        return all_keys, all_values

    def visible(self, tokens: int, finished: Tensor | None = None) -> Tensor | None:
        """What each of T = `tokens` may attend to: bool [n, 1, 1 or T, T + used], None for all.

        Without `finished` every token sees all T and the row's ring. With it, T = 2K: where
        `finished` [n], the first K are a clean block, which does not see the others, while those
        see it and no longer the oldest block of a full ring; elsewhere the first K mean nothing.
        """
        device = self.lengths.device
        self._begin = self.front - tokens
        # Ring slots that hold a token of some row.
        self._used = used = min(int(self.lengths.max()), self.capacity)
        slot = torch.arange(used, device=device)
        ring = slot < self.lengths[:, None]
        if finished is None:
            if bool(ring.all()):
                return None
            own = ring.new_ones(len(ring), tokens)
            return torch.cat([own, ring], dim=1)[:, None, None]
        size = self.block_size
        oldest = (slot - self.lengths[:, None] % max(self.capacity, 1)) % max(self.capacity, 1)
        overwritten = (self.lengths[:, None] >= self.capacity) & (oldest < size)
        clean = torch.arange(tokens, device=device) < size
        own = torch.where(clean[:, None], clean[None, :], ~clean[None, :] | finished[:, None, None])
        later = ring & ~(overwritten & finished[:, None])
        rings = torch.where(clean[None, :, None], ring[:, None, :], later[:, None, :])
        return torch.cat([own, rings], dim=-1)[:, None]

    def append_staged(self, which: Tensor) -> None:
        """Stores the first K staged tokens of the rows `which` (indices) and advances them."""
        part = slice(self._begin, self._begin + self.block_size)
        count = torch.full_like(which, self.block_size)
        self.append(which, self.keys[:, which, :, part], self.values[:, which, :, part], count)

    def append(self, which: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Stores the first `counts` [m] tokens of each of the rows `which` [m] and advances them.

        `keys`, `values` [M, m, H, T, D], rotated for the rows' own positions. Where more than C
        tokens come at once only the last C are kept.
        """
        if self.capacity:
            index = torch.arange(keys.shape[3], device=keys.device)
            kept = (index < counts[:, None]) & (index >= counts[:, None] - self.capacity)  # [m, T]
            row, token = kept.nonzero(as_tuple=True)
            slot = self.front + (self.lengths[which[row]] + token) % self.capacity
            # Advanced indices apart from one another put the indexed dimension first: [i, M, H, D].
            self.keys[:, which[row], :, slot] = keys[:, row, :, token].to(self.keys.dtype)
            self.values[:, which[row], :, slot] = values[:, row, :, token].to(self.values.dtype)
        self.lengths[which] += counts

    def drop(self, which: Tensor) -> None:
        """Forgets the rows `which` (indices); the last ones move into their places.

        Nothing is copied but the rows that move; `rows` tells the new order.
        """
        kept = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        kept[which] = False
        count = int(kept.sum())
        holes, movers = (~kept[:count]).nonzero().squeeze(-1), kept[count:].nonzero().squeeze(-1)
        for state, dim in ((self.keys, 1), (self.values, 1), (self.lengths, 0), (self.rows, 0)):
            for hole, mover in zip(holes.tolist(), (movers + count).tolist(), strict=True):
                state.select(dim, hole).copy_(state.select(dim, mover))
        self.keys, self.values = self.keys[:, :count], self.values[:, :count]
        self.lengths, self.rows = self.lengths[:count], self.rows[:count]
