"""Which block size a step trains, where a run has several; and the loss of each.

    mixed    L' of a step is drawn by its weight, from (seed, step)
    growing  the steps are cut into parts by the weights, the smallest L' first

Every process and every micro-batch of a step has the same one, and so has a resumed run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from blockdiff.categorical import uniform
from blockdiff.training.config import TrainConfig

_PURPOSE = 3  # of the numbers addressed by (seed, purpose, …); a measurement's noise has 0 to 2


def block_size_of(config: TrainConfig, step: int) -> int:
    """L' of step `step`, counted from 0.

    Example:
        >>> import blockdiff
        >>> from blockdiff.training.blocks import block_size_of
        >>> config = blockdiff.TrainConfig(block_size=4, grow=True, steps=6)
        >>> [block_size_of(config, step) for step in range(6)]
        [1, 1, 2, 2, 4, 4]
    """
    sizes, shares = config.block_sizes, config.block_shares
    if len(sizes) == 1:
        return sizes[0]
    if config.grow:
        place = (step + 0.5) / config.steps
    else:
        place = float(uniform(config.seed, _PURPOSE, torch.tensor(step)))
    ends = accumulate(shares)
    return next((size for size, end in zip(sizes, ends, strict=True) if place < end), sizes[-1])


class LossByPart:
    """The mean loss of the steps of each block size since the last log line; asks no device.

    Parts of a loss that every size has, such as AR's, have names in the place of a size.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, set[int]] = {}

    def add(self, part: str, step: int, loss: Tensor) -> None:
        """A micro-batch's share of the loss of step `step`."""
        self._sums[part] = self._sums.get(part, 0) + loss.detach()
        self._steps.setdefault(part, set()).add(step)

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`loss_4`, `part_ar` and so on, over all processes (which call together); forgets them."""
        found = {
            f"{'loss' if part.isdigit() else 'part'}_{part}": float(gather(own).mean())
            / len(self._steps[part])
            for part, own in sorted(self._sums.items(), key=lambda one: (len(one[0]), one[0]))
        }
        self._sums, self._steps = {}, {}
        return found
