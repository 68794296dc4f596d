"""Prompts are read: the keys and values of their whole blocks go into the cache.

A clean stream never depends on what comes behind it, so equal beginnings of texts have equal keys
and values, and those that are still known need no evaluation. They are kept in pieces of up to
`PIECE` tokens that end with a block, each under the tokens before it and its own, down from the
first. Under a block-causal clean stream only blocks that begin at the same tokens are alike, under
a causal one all are, whatever their size. A text that has outgrown its cache is not kept, and a
prompt that will is read anew: behind a window that slides each token sees other tokens.

What is reused was computed among other rows or in other parts: to float32's rounding the same
numbers, as a row's are alone and in a batch (docs/precision.md).

Shapes: n rows, T columns of an evaluation, S cached tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from hashlib import blake2b

import numpy as np
import torch

from blockdiff.cache import BlockCache, Part, Slots
from blockdiff.categorical import Array
from blockdiff.models.denoiser import Conventions, Denoiser
from blockdiff.sampling.rows import Rows

PIECE = 16
# Of the mask [n, T, T + S] of an evaluation that reads on behind what is cached.
LARGEST_MASK = 2**25


class Prefixes:
    """Keys and values of beginnings of texts: of the least recently used at most `room` bytes."""

    def __init__(self, config: Conventions, room: int) -> None:
        self.config, self.room = config, room
        self._slots: Slots | None = None  # made with the first text
        self._pieces: OrderedDict[bytes, list[tuple[int, int]]] = OrderedDict()  # slot, tokens

    @property
    def held(self) -> int:
        """Bytes of the slots that are in use, however full; any thread may ask."""
        slots = self._slots
        return 0 if slots is None else slots.bytes * (slots.made - len(slots.free))

    def find(self, tokens: Array, size: int, offset: int) -> list[Part]:
        """The longest beginning of tokens [T]; blocks of `size`, the first `offset` short of it.

        The parts are the store's own memory: to be read before the next `keep`, which may reuse it.
        """
        found: list[bytes] = []
        key, ends = self._root(size, offset), self._ends(len(tokens), size, offset)
        here = 0
        while here < len(tokens):
            for end in reversed(ends(here)):
                longer = _key(key, tokens[here:end])
                if longer in self._pieces:
                    break
            else:
                break
            found.append(longer)
            key, here = longer, end
        self._use(found)
        slots = self._slots
        return [slots.part(*one) for key in found for one in self._pieces[key]] if slots else []

    def keep(self, cache: BlockCache, place: int, tokens: Array, size: int, offset: int) -> None:
        """Keeps what the cache holds of the row at `place`: of the text `tokens` [T]."""
        if len(tokens) > cache.capacities[place]:
            return
        slots = self._slots = self._slots or Slots(cache, PIECE, self.room)
        key, ends = self._root(size, offset), self._ends(len(tokens), size, offset)
        pieces: dict[bytes, range] = {}
        here = 0
        while here < len(tokens):
            end = ends(here)[-1]
            key = _key(key, tokens[here:end])
            pieces[key], here = range(here, end), end
        self._use(pieces)  # so that none of these makes room for another
        for key, piece in pieces.items():
            if key not in self._pieces:
                parts = [piece[i : i + PIECE] for i in range(0, len(piece), PIECE)]
                if not self._free(len(parts), pieces):
                    break
                self._pieces[key] = [
                    slots.put(cache.part(place, part.start, part.stop)) for part in parts
                ]
        self._use(pieces)

    def _free(self, count: int, kept: Collection[bytes]) -> bool:
        """Makes so many slots free; not where that would take one of those to be `kept`."""
        slots = self._slots
        assert slots is not None
        while len(slots.free) < count:
            if slots.grow():
                continue
            oldest = next(iter(self._pieces), None)
            if oldest is None or oldest in kept:
                return False
            slots.free += [slot for slot, _ in self._pieces.pop(oldest)]
        return True

    def _use(self, keys: Collection[bytes]) -> None:
        """The first pieces of a text are used last: without them the others are not found."""
        for one in reversed(list(keys)):
            if one in self._pieces:
                self._pieces.move_to_end(one)

    def keep_finished(self, cache: BlockCache, rows: Rows, places: Array) -> None:
        """`keep` of the rows at some places of the cache, but for those that failed."""
        for place in places.tolist():
            row = rows.state[cache.rows[place]]
            if int(row["name"]) not in (rows.failed or ()):
                tokens, size = rows.canvas[cache.rows[place], : cache.lengths[place]], row["size"]
                self.keep(cache, place, tokens, int(size), int(-row["first"] % size))

    def _root(self, size: int, offset: int) -> bytes:
        return b"" if self._causal else b"%d %d" % (size, offset)

    @property
    def _causal(self) -> bool:
        return self.config.causal or self.config.clean_stream == "causal"

    def _ends(self, length: int, size: int, offset: int) -> Callable[[int], list[int]]:
        """Of a position, where a piece that begins there may end: with a block."""
        step, shift = (1, 0) if self._causal else (size, offset)
        most = max(PIECE // step, 1) * step

        def ends(here: int) -> list[int]:
            first = (here + shift) // step * step + step - shift
            pieces = list(range(first, min(here + most, length) + 1, step))
            return pieces if pieces else [length]

        return ends


def _key(before: bytes, tokens: Array) -> bytes:
    return blake2b(before + b"|" + tokens.astype(np.int64).tobytes(), digest_size=16).digest()


def prefill(
    model: Denoiser, rows: Rows, cache: BlockCache, waiting: Array, prefixes: Prefixes | None
) -> Array:
    """Caches the prompts' whole blocks, in one evaluation for each grid of blocks.

    `waiting` [n]: the rows. Those that were evaluated; others are wholly in `prefixes`.
    """
    state = rows.state
    size = state["size"][waiting]
    grids = np.stack([size, -state["first"][waiting] % size], axis=1)
    at = dict(zip(cache.rows.tolist(), range(len(cache.rows)), strict=True))
    places = np.array([at[row] for row in waiting.tolist()])
    counts = state["prompt"][waiting]
    known: list[list[Part]] = [[] for _ in waiting]
    if prefixes is not None:
        for i in (counts <= state["capacity"][waiting]).nonzero()[0].tolist():
            tokens = rows.canvas[waiting[i], : counts[i]]
            known[i] = prefixes.find(tokens, *grids[i].tolist())
            if known[i]:
                state["cached"][waiting[i]] = cache.restore(int(places[i]), known[i])
    cached = state["cached"][waiting]
    left = counts > cached
    for size, offset in np.unique(grids[left], axis=0).tolist():
        here = left & (grids == (size, offset)).all(1)
        whole = (here & (cached == 0)).nonzero()[0]
        if len(whole):
            _read(model, rows, cache, waiting[whole], places[whole], size, offset)
        more = (here & (cached > 0)).nonzero()[0]
        while len(more):
            longest = int(counts[more].max())
            few = more[: max(LARGEST_MASK // longest**2, 1)]
            parts = [known[i] for i in few.tolist()]
            _read_on(model, rows, cache, waiting[few], places[few], size, offset, parts)
            more = more[len(few) :]
    state["prompt"][waiting] = 0
    if prefixes is not None:
        for i in left.nonzero()[0].tolist():
            tokens = rows.canvas[waiting[i], : counts[i]]
            prefixes.keep(cache, int(places[i]), tokens, *grids[i].tolist())
    read: Array = waiting[left]
    return read


def _read(
    model: Denoiser,
    rows: Rows,
    cache: BlockCache,
    own: Array,
    places: Array,
    size: int,
    offset: int,
) -> None:
    """The whole blocks of prompts of which nothing is cached; of equal ones once."""
    config, counts = model.config, rows.state["prompt"][own]
    longest = int(counts.max())
    # Behind a shorter prompt are masks, and a plain causal model's is no id that it knows.
    tokens = np.minimum(rows.canvas[own, :longest], config.vocab_size - 1)
    different, source = np.unique(tokens, axis=0, return_inverse=True)
    if len(different) == len(tokens):
        different, source = tokens, np.arange(len(tokens))
    x_0 = torch.from_numpy(different).to(model.device, non_blocking=True)
    layout = config.layout_of(
        longest, size, window=config.length if config.slides else None, offset=offset
    )
    context = model.encode(x_0, layout)
    cache.append(places, context.keys, context.values, counts, source.reshape(-1))


def _read_on(
    model: Denoiser,
    rows: Rows,
    cache: BlockCache,
    own: Array,
    places: Array,
    size: int,
    offset: int,
    known: list[list[Part]],
) -> None:
    """The whole blocks of prompts behind the parts of them that are `known`."""
    config, device = model.config, model.device
    before, end = rows.state["cached"][own], rows.state["prompt"][own]
    beside = model.new_cache(0, 0, 1)  # the rows that go on are in no order of the engine's
    beside.admit(np.arange(len(own)), np.ones_like(own), before)
    for place, parts in enumerate(known):
        beside.restore(place, parts)
    width = int((end - before).max())
    beside.make_room(width)
    beside.folded = cache.folded
    position = before[:, None] + np.arange(width)
    tokens = np.minimum(rows.read(own, position), config.vocab_size - 1)
    x = torch.from_numpy(np.stack([tokens, position])).to(device, non_blocking=True)
    layout = config.layout_of(int(end.max()), size, offset=offset)
    in_ring = beside.key_positions()
    keys = torch.cat([x[1], in_ring], 1)
    there = torch.from_numpy(end).to(device, non_blocking=True)[:, None]
    seen = layout.m_bc(x[1][:, :, None], keys[:, None]) & ((keys >= 0) & (keys < there))[:, None]
    seen[:, :, :width] |= torch.eye(width, dtype=torch.bool, device=device)
    mask = torch.zeros(seen.shape, dtype=beside.dtype, device=device).masked_fill_(
        ~seen, -torch.inf
    )
    first = torch.zeros(1, dtype=torch.int64, device=device)  # whose logits nobody reads
    model.decode(x[0], x[1], beside, first, mask=mask[:, None], clean=width)
    cache.folded = beside.folded
    staged = beside.staged(len(own), width)
    cache.append(places, [k for k, _ in staged], [v for _, v in staged], end - before)
