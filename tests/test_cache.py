"""The ring of finished tokens: what is kept, and that no more is touched."""

import numpy as np
import pytest
import torch

from blockdiff.cache import BlockCache, LayerShape
from helpers import Operators

LAYERS, HEADS, WIDTH, BLOCK = 2, 2, 3, 2


def made(rows: int, capacity: int) -> BlockCache:
    cache = BlockCache([LayerShape(HEADS, WIDTH, WIDTH)] * LAYERS, rows, capacity, BLOCK)
    cache.admit(np.arange(rows), np.full(rows, BLOCK), np.full(rows, capacity))
    return cache


def held(cache: BlockCache) -> list[torch.Tensor]:
    """Everything the ring of every layer holds."""
    parts = [cache.stage(i, *[torch.zeros(len(cache.rows), HEADS, 0, WIDTH)] * 2)
             for i in range(LAYERS)]  # fmt: skip
    return [part for layer in parts for part in layer]


@pytest.mark.parametrize("capacity", [0, 2, 4, 6, 20])
@pytest.mark.parametrize("counts", [[2, 2], [10, 4], [6, 10], [10, 10]])
def test_many_tokens_at_once_are_those_that_came_block_by_block(
    capacity: int, counts: list[int]
) -> None:
    """Of more than C only the last C are stored, or even copied."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(LAYERS, 2, HEADS, 10, WIDTH, generator=generator)
    which = np.array([1, 0])
    at_once, one_by_one = made(2, capacity), made(2, capacity)
    for begin in (0, 1):  # again, from a place in the ring that is not its beginning
        with Operators() as seen:
            at_once.append(which, list(keys), list(-keys), np.array(counts))
        for row, count in zip(which.tolist(), counts, strict=True):
            for start in range(0, count, BLOCK):
                part = keys[:, [int(row == 0)], :, start : start + BLOCK]
                one_by_one.append(np.array([row]), list(part), list(-part), np.array([BLOCK]))
        assert at_once.lengths.tolist() == one_by_one.lengths.tolist(), begin
        for one, other in zip(held(at_once), held(one_by_one), strict=True):
            assert torch.equal(one, other)
        copied = sum(min(count, capacity) for count in counts)
        moved = [shape for shape in seen.shapes if len(shape) == 3]
        assert all(shape == (copied, HEADS, WIDTH) for shape in moved), moved
        assert bool(moved) == bool(capacity)


CONVENTIONS = [
    ("block", "bidirectional"), ("causal", "bidirectional"), ("block", "causal"),
    ("causal", "causal"),
]  # fmt: skip


def with_lengths(lengths, sizes, capacities):
    """A cache whose keys and values tell the position of their token, and these positions."""
    cache = BlockCache([LayerShape(1, 1, 3)], len(lengths), 0, 1)  # values wider than keys
    cache.admit(np.arange(len(lengths)), np.array(sizes), np.array(capacities))
    kept = []
    for row, (length, size, capacity) in enumerate(zip(lengths, sizes, capacities, strict=True)):
        # A short first chunk where the length is no multiple of the block size.
        for start in range(length % size - size, length, size):
            begin = max(start, 0)
            keys = torch.arange(begin, start + size, dtype=torch.float32).view(1, 1, -1, 1)
            values = keys.expand(-1, -1, -1, 3)
            cache.append(np.array([row]), [keys], [values], np.array([start + size - begin]))
        kept.append(range(max(length - capacity, 0), length))
    return cache, kept


RAGGED = [
    ((0, 3, 6, 11), (2, 2, 2, 2), (6, 6, 6, 6)),  # empty, short, full, wrapped, off the grid
    ((5, 7, 9), (4, 4, 4), (8, 8, 8)),  # about to overflow by 1, 3, and full
    ((4, 10, 3, 0), (4, 2, 1, 3), (8, 4, 0, 6)),
]


@pytest.mark.parametrize(("lengths", "sizes", "capacities"), RAGGED)
def test_where_the_tokens_of_the_slots_are(lengths, sizes, capacities):
    cache, kept = with_lengths(lengths, sizes, capacities)
    keys, values = cache.stage(0, *[torch.zeros(len(lengths), 1, 0, n) for n in (1, 3)])
    positions = cache.key_positions()
    assert positions.shape == (len(lengths), cache.used) and positions.dtype == torch.int64
    for row, own in enumerate(kept):
        there = positions[row] >= 0
        assert sorted(positions[row, there].tolist()) == list(own)
        assert torch.equal(keys[row, 0, there, 0].long(), positions[row, there])
        assert torch.equal(values[row, 0, there, 2].long(), positions[row, there])


def seen_by_loops(cache, kept, clean, noised, finished, clean_stream, inside_block):
    """Who sees whom, a column at a time, in the words of the masks."""
    positions = cache.key_positions().tolist()
    rows, used = len(kept), cache.used
    seen = torch.zeros(rows, 1, clean + noised, clean + noised + used, dtype=torch.bool)
    for i in range(rows):
        size, length, has = int(cache.sizes[i]), int(cache.lengths[i]), bool(finished[i])
        own_clean = range(clean - size, clean) if has else range(0)
        own_noised = range(clean, clean + min(size, noised))
        for t in range(clean + noised):
            seen[i, 0, t, t] = True
            for u in own_clean:
                later = u > t and clean_stream == "causal" and t < clean
                seen[i, 0, t, u] |= not later
            for u in own_noised:
                later = u > t and inside_block == "causal"
                seen[i, 0, t, u] |= t >= clean and not later
            for slot, position in enumerate(positions[i]):
                # After the finished block is stored, its row keeps the last C tokens.
                gone = has and t >= clean and position < length + size - int(cache.capacities[i])
                seen[i, 0, t, clean + noised + slot] = position in kept[i] and not gone
    return seen


@pytest.mark.parametrize(("clean_stream", "inside_block"), CONVENTIONS)
@pytest.mark.parametrize(("lengths", "sizes", "capacities"), RAGGED)
def test_who_sees_whom(lengths, sizes, capacities, clean_stream, inside_block):
    cache, kept = with_lengths(lengths, sizes, capacities)
    size = max(sizes)
    conventions = {"clean_stream": clean_stream, "inside_block": inside_block}
    for clean, noised in ((0, size), (size, size), (size, 0)):
        for finished in (np.arange(len(lengths)) % 2 == 0, np.ones(len(lengths), bool)):
            has = finished & (clean > 0)
            found = cache.visible(clean, noised, has, **conventions)
            expected = seen_by_loops(cache, kept, clean, noised, has, clean_stream, inside_block)
            if found is None:
                found = torch.zeros(expected.shape)
            assert torch.equal(found == 0, expected)


@pytest.mark.parametrize(("clean_stream", "inside_block"), CONVENTIONS)
def test_no_mask_where_all_is_seen(clean_stream, inside_block):
    """And never where what is seen is causal."""
    for size in (1, 2):
        cache, _ = with_lengths((4, 4), (size, size), (4, 4))
        conventions = {"clean_stream": clean_stream, "inside_block": inside_block}
        of_noised = cache.visible(0, size, np.zeros(2, bool), **conventions)
        assert (of_noised is None) == (size == 1 or inside_block == "bidirectional")
        of_clean = cache.visible(size, 0, np.ones(2, bool), **conventions)
        assert (of_clean is None) == (size == 1 or clean_stream == "block")
        assert cache.visible(size, size, np.ones(2, bool), **conventions) is not None
