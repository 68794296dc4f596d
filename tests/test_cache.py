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
