"""The ring of finished tokens: what is kept, and that no more is touched."""

import pytest
import torch

from blockdiff.cache import BlockCache
from helpers import Operators

LAYERS, HEADS, WIDTH, BLOCK = 2, 2, 3, 2


def made(rows: int, capacity: int) -> BlockCache:
    return BlockCache(rows, LAYERS, HEADS, WIDTH, capacity, BLOCK)


@pytest.mark.parametrize("capacity", [0, 2, 4, 6, 20])
@pytest.mark.parametrize("counts", [[2, 2], [10, 4], [6, 10], [10, 10]])
def test_many_tokens_at_once_are_those_that_came_block_by_block(
    capacity: int, counts: list[int]
) -> None:
    """Of more than C only the last C are stored, or even copied."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(LAYERS, 2, HEADS, 10, WIDTH, generator=generator)
    which = torch.tensor([1, 0])
    at_once, one_by_one = made(2, capacity), made(2, capacity)
    for begin in (0, 1):  # again, from a place in the ring that is not its beginning
        with Operators() as seen:
            at_once.append(which, keys, -keys, torch.tensor(counts))
        for row, count in zip(which.tolist(), counts, strict=True):
            for start in range(0, count, BLOCK):
                part = keys[:, [int(row == 0)], :, start : start + BLOCK]
                one_by_one.append(torch.tensor([row]), part, -part, torch.tensor([BLOCK]))
        assert torch.equal(at_once.lengths, one_by_one.lengths), begin
        assert torch.equal(at_once.keys, one_by_one.keys)
        assert torch.equal(at_once.values, one_by_one.values)
        copied = sum(min(count, capacity) for count in counts)
        moved = [shape for shape in seen.shapes if len(shape) == 4]
        assert all(shape == (copied, LAYERS, HEADS, WIDTH) for shape in moved), moved
        assert bool(moved) == bool(capacity)
