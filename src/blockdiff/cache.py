"""Keys and values of the clean blocks before each row's current one.

A row has C slots, used as a ring: once they are full, a new block overwrites the oldest tokens,
which is the sliding window. C is a multiple of the row's block size, and so are all appends but
perhaps the first: where blocks are counted from the prompt's end, the first one is shorter. In
memory the tokens of the evaluation that is under way lie in front of the ring, so that what
attention reads is one view, and never a copy:

    [ … | T staged tokens | slot 0, slot 1, … slot C − 1 ]

An evaluation stages up to two blocks of each row side by side: a finished block, clean, which is
appended afterwards, and the noised one behind it. Columns are counted so that the first `clean` of
the T columns end with the finished blocks, and the noised blocks begin after them; a row whose
block is shorter, or which has none, leaves its columns unused. How many tokens each row has is
known on the host, and no question about it waits for the device.

Shapes: n rows, M layers, H key/value heads, D head width, T staged tokens, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array
from blockdiff.device import rounded_up
from blockdiff.layout import Clean, Inside


class LayerShape(NamedTuple):
    """Key/value heads of a layer, and the widths of a head's keys and of its values."""

    heads: int
    key_width: int
    value_width: int


# Keys and values of some tokens of one row, [M, H, T, D] of the layers of each shape.
Part = list[tuple[Tensor, Tensor]]
# Bytes of a slab of `Slots`. A thread of glibc has heaps of 64 MiB: what is larger lies by itself.
SLAB = 2**27


class BlockCache:
    """A growing number of rows; `layers` are the network's, in order."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        rows: int,
        capacity: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `rows` rows of `capacity` tokens in blocks of `block_size`; more is made."""
        self.layers, self.dtype, self.device = list(layers), dtype, torch.device(device)
        self.folded: Any = None  # what a network computes once for all evaluations with this cache
        self.made = 0  # how often the tensors were made, each time somewhere else
        self.rounded = False  # whether `used` is a power of two, so that few shapes are met
        self.rows = np.empty(0, np.int64)  # which rows of the caller's these are
        self.lengths, self.sizes, self.capacities = (self.rows.copy() for _ in range(3))
        self.used = 0  # slots that evaluations look at: those that hold a token of some row
        # Tokens that the tensors may have room for, unless the rows there are need more.
        self.most: int | None = None
        # Layers of one shape share a tensor, [M, places, H, front + room, D], made when it is used:
        # many rows may be admitted before.
        self._stacks: dict[LayerShape, tuple[Tensor, Tensor]] = {}
        self._front = self._room = self._places = 0
        self._needed = rows, capacity, 2 * block_size

    def admit(self, rows: Array, block_sizes: Array, capacities: Array) -> None:
        """Adds empty rows, each with a block size and a capacity of its own."""
        self.rows = np.concatenate([self.rows, rows])
        self.sizes = np.concatenate([self.sizes, block_sizes])
        self.capacities = np.concatenate([self.capacities, capacities])
        self.lengths = np.concatenate([self.lengths, np.zeros_like(rows)])
        places, room, front = self._needed
        self._needed = (
            max(places, len(self.rows)),
            max(room, int(capacities.max())),
            max(front, 2 * int(block_sizes.max())),
        )

    def make_room(self, staged: int) -> None:
        """Room for evaluations of so many columns."""
        places, room, front = self._needed
        self._needed = places, room, max(front, staged)

    def reserve(self) -> None:
        """Makes the tensors larger where they are too small; what they hold is kept."""
        places, room, front = self._needed
        if places <= self._places and room <= self._room and front <= self._front:
            return
        old, before, held = self._stacks, self._front, len(self.lengths)
        if places > self._places:
            places = max(places, 2 * self._places)  # rows come one by one
        if self.most is not None and places * (room + front) > self.most:
            # Rows that have left may have been longer.
            room = int(self.capacities.max())
            places = max(min(places, self.most // (room + front)), held)
        self._needed = self._places, self._room, self._front = places, room, front
        self._stacks = {}
        self.made += 1
        for shape in dict.fromkeys(self.layers):
            size = self.layers.count(shape), places, shape.heads, front + room
            made = tuple(
                torch.zeros(*size, width, dtype=self.dtype, device=self.device)
                for width in (shape.key_width, shape.value_width)
            )
            for new, kept in zip(made, old.pop(shape, ()), strict=False):
                part = kept[:, :held, :, before : before + self.used]
                new[:, : part.shape[1], :, front : front + part.shape[3]] = part
            self._stacks[shape] = made[0], made[1]
        counted = dict.fromkeys(self._stacks, 0)
        self._of_layer = []
        for shape in self.layers:
            keys, values = self._stacks[shape]
            self._of_layer.append((keys[counted[shape]], values[counted[shape]]))
            counted[shape] += 1

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts keys and values [n, H, T, D] in front of the ring; what attention reads.

        Both [n, H, T + used, D], the T tokens first.
        """
        self.reserve()
        rows, tokens = len(keys), keys.shape[2]
        found = []
        for store, own in zip(self._of_layer[layer], (keys, values), strict=True):
            part = store[:rows].narrow(2, self._front - tokens, tokens + self.used)
            part.narrow(2, 0, tokens).copy_(own)
            found.append(part)
        return found[0], found[1]

    def visible(
        self,
        clean: int,
        noised: int,
        finished: Array,
        *,
        clean_stream: Clean = "block",
        inside_block: Inside = "bidirectional",
    ) -> Tensor | None:
        """What each of T = `clean` + `noised` columns may attend to; None where that is all.

        [n, 1, T, T + used], 0 where it may and −inf where not. `finished` bool [n]: whether a row
        has a finished block in the clean columns. Such a block does not see the noised one, while
        that one sees it and no longer what it will overwrite in a full ring. With a causal
        `clean_stream` or `inside_block` a column sees those of its own block up to itself.
        """
        used, tokens = self.used, clean + noised
        held = np.minimum(self.lengths, self.capacities)
        full = bool((held == used).all()) and bool((self.sizes == max(clean, noised)).all())
        whole_clean = clean <= 1 or clean_stream == "block"
        whole_noised = noised <= 1 or inside_block == "bidirectional"
        alone = not clean or (not noised and bool(finished.all()))
        if full and alone and whole_clean and whole_noised:
            return None
        facts = np.stack([self.lengths, self.capacities, self.sizes, finished])
        moved = torch.from_numpy(facts).to(self.device, non_blocking=True)[:, :, None]
        length, capacity, size, has = moved.unbind(0)
        column = torch.arange(tokens, device=self.device)
        is_clean = column < clean
        # [n, T]: the columns that are used
        valid = torch.where(is_clean, (has > 0) & (column >= clean - size), column - clean < size)
        own = valid[:, None, :] & (is_clean[None, :] | ~is_clean[:, None])
        if not (whole_clean and whole_noised):
            causal = ~is_clean if whole_clean else is_clean | (not whole_noised)
            own &= ~causal[:, None] | (column <= column[:, None])
        own |= torch.eye(tokens, dtype=torch.bool, device=self.device)  # softmax needs something
        position = _positions(length, capacity, used)
        ring = position >= 0
        later = ring & ((has == 0) | (position >= length + size - capacity))
        rings = torch.where(is_clean[:, None], ring[:, None], later[:, None])
        seen = torch.cat([own, rings], dim=-1)[:, None]
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(
            ~seen, -torch.inf
        )

    def key_positions(self) -> Tensor:
        """The text position of the token in each slot, int64 [n, used]; negative in empty ones.

        For a network with a window of its own, in tokens. What is staged comes before these.
        """
        facts = torch.from_numpy(np.stack([self.lengths, self.capacities]))
        length, capacity = facts.to(self.device, non_blocking=True)[:, :, None]
        return _positions(length, capacity, self.used)

    def append_staged(self, which: Array, noised: int) -> None:
        """Stores the finished blocks staged for the rows `which` (places) and advances them."""
        sizes = self.sizes[which]
        self._append(which, sizes, self._front - noised - sizes)

    def append_first(self, which: Array, counts: Array, staged: int) -> None:
        """Stores the first `counts` [m] of the `staged` columns of the rows `which`."""
        self._append(which, counts, np.full(len(which), self._front - staged))

    def append(
        self,
        which: Array,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        counts: Array,
        source: Array | None = None,
    ) -> None:
        """Stores the first `counts` [m] tokens of each of the rows `which` [m] and advances them.

        `keys`, `values`: of each layer [m, H, T, D], rotated for the rows' own positions, or with
        `source` [m] those of row `source[i]` for row i. Where more than C tokens come at once only
        the last C are kept.
        """
        self._append(which, counts, None, keys, values, source)

    def part(self, place: int, begin: int, end: int) -> Part:
        """The tokens `begin` to `end` of a row that has not filled its ring; no copy."""
        slots = slice(self._front + begin, self._front + end)
        return [
            (keys[:, place, :, slots], values[:, place, :, slots])
            for keys, values in self._stacks.values()
        ]

    def restore(self, place: int, parts: Sequence[Part]) -> int:
        """Puts the first tokens of an empty row back, from left to right; how many these are."""
        self.reserve()
        slot = self._front
        for part in parts:
            end = slot + part[0][0].shape[2]
            for stack, kept in zip(self._stacks.values(), part, strict=True):
                for store, own in zip(stack, kept, strict=True):
                    store[:, place, :, slot:end] = own
            slot = end
        self.lengths[place] = slot - self._front
        self._count()
        return slot - self._front

    def staged(self, rows: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [n, H, T, D] of each layer that the last evaluation of T columns left."""
        cut = slice(self._front - tokens, self._front)
        return [(keys[:rows, :, cut], values[:rows, :, cut]) for keys, values in self._of_layer]

    def _append(
        self,
        which: Array,
        counts: Array,
        begin: Array | None,
        keys: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        given: Array | None = None,
    ) -> None:
        """From the staged tokens that begin at `begin` [m], or from keys and values given."""
        self.reserve()
        capacity = self.capacities[which]
        first = np.maximum(counts - capacity, 0)
        kept = counts - first
        # One entry for every token that is stored: its row among `which`, and which token it is.
        row = np.repeat(np.arange(len(which)), kept)
        token = np.arange(len(row)) - np.repeat(kept.cumsum() - kept, kept) + first[row]
        slot = self._front + (self.lengths[which[row]] + token) % np.maximum(capacity[row], 1)
        if len(row):
            source = which[row] if begin is not None else row if given is None else given[row]
            offset = token if begin is None else begin[row] + token
            index = np.stack([which[row], slot, source, offset])
            into, at, out_of, of = torch.from_numpy(index).to(self.device, non_blocking=True)
            # Advanced indices apart from one another put the indexed dimension first.
            if begin is not None:
                for stack in self._stacks.values():
                    for store in stack:
                        store[:, into, :, at] = store[:, out_of, :, of]
            else:
                for stores, pair in zip(
                    self._of_layer, zip(keys, values, strict=True), strict=True
                ):
                    for store, new in zip(stores, pair, strict=True):
                        store[into, :, at] = new.to(self.device)[out_of, :, of].to(store.dtype)
        self.lengths[which] += counts
        self._count()

    def drop(self, which: Array) -> None:
        """Forgets the rows at the places `which`; the last ones move into their places.

        Nothing is copied but the rows that move; `rows` tells the new order.
        """
        kept = np.ones(len(self.rows), bool)
        kept[which] = False
        count = int(kept.sum())
        order = np.arange(count)
        order[~kept[:count]] = count + kept[count:].nonzero()[0]
        # A row that came since tensors were last made larger may lie beyond them, and is empty.
        for hole in (~kept[:count] & (self.lengths[order] > 0)).nonzero()[0].tolist():
            for stack in self._stacks.values():
                for store in stack:
                    store[:, hole].copy_(store[:, int(order[hole])])
        for name in ("rows", "lengths", "sizes", "capacities"):
            setattr(self, name, getattr(self, name)[order])
        self._count()

    def _count(self) -> None:
        self.used = int(np.minimum(self.lengths, self.capacities).max(initial=0))
        if self.rounded:
            self.used = min(rounded_up(self.used), int(self.capacities.max(initial=0)))


class Slots:
    """Room for parts of at most T tokens, in slabs that are made when needed and used again.

    A part that is forgotten leaves its slots whole: nothing that comes and goes cuts memory up.
    """

    def __init__(self, cache: BlockCache, tokens: int, room: int) -> None:
        """For parts of `cache`, of `tokens` tokens and less; at most `room` bytes."""
        self.tokens, self._dtype, self._device = tokens, cache.dtype, cache.device
        # Of each tensor of a part: layers, heads and width.
        self._shapes = [
            (cache.layers.count(shape), shape.heads, width)
            for shape in dict.fromkeys(cache.layers)
            for width in (shape.key_width, shape.value_width)
        ]
        self._widths = [layers * heads * tokens * width for layers, heads, width in self._shapes]
        self.bytes = sum(self._widths) * self._dtype.itemsize  # of a slot
        self.made, self.free = 0, list[int]()
        self._most, self._each = room // self.bytes, max(SLAB // self.bytes, 1)
        self._slabs: list[list[Tensor]] = []  # [slots, M, H, T, D] of each shape in `_shapes`

    def grow(self) -> bool:
        """Makes a slab, whose slots are free; False where there is no room for more."""
        count = min(self._most - self.made, self._each)
        if count <= 0:
            return False
        slab = torch.empty(count, sum(self._widths), dtype=self._dtype, device=self._device)
        self._slabs.append([
            part.unflatten(1, (layers, heads, self.tokens, width))
            for part, (layers, heads, width) in zip(
                slab.split(self._widths, 1), self._shapes, strict=True
            )
        ])  # fmt: skip
        begin, self.made = self.made, self.made + count
        self.free += reversed(range(begin, self.made))
        return True

    def put(self, part: Part) -> tuple[int, int]:
        """Copies a part into a free slot: which, and how many tokens it holds."""
        slot, tokens = self.free.pop(), part[0][0].shape[2]
        for stores, pair in zip(self.part(slot, tokens), part, strict=True):
            for store, own in zip(stores, pair, strict=True):
                store.copy_(own)
        return slot, tokens

    def part(self, slot: int, tokens: int) -> Part:
        """The first `tokens` tokens of a slot; no copy."""
        slab = self._slabs[slot // self._each]
        found = [tensor[slot % self._each, :, :, :tokens] for tensor in slab]
        return list(zip(found[::2], found[1::2], strict=True))


def _positions(length: Tensor, capacity: Tensor, used: int) -> Tensor:
    """[n, used]: the token each slot holds, of rows of `length` and `capacity` [n, 1].

    Slot s holds the last of s, s + C, s + 2C, … that is below the length; where there is none, what
    comes out is negative.
    """
    slot = torch.arange(used, device=length.device)
    back = (length - 1 - slot) % capacity.clamp(min=1)
    return torch.where(slot < capacity, length - 1 - back, -1)
