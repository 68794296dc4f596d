"""What an order is, and what it sees of its rows.

    wanted(rows)                 whose logits the next evaluation gives: a scheduled order knows
                                 which positions come next, one that reads the logits wants all
    choose(logits, wanted, rows) which of these are fixed, and their tokens

The engine calls `choose` once an evaluation, for all rows of an order with the same options. What
it hands over is on the host (numpy arrays), but for the logits, which are where the network is.

Shapes: n rows, K positions of the block (of the longest, where block sizes differ), P wanted
positions in row-major order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from blockdiff.categorical import uniform
from blockdiff.registry import register_order
from blockdiff.sampling.options import SamplingOptions

__all__ = ["Order", "RowState", "register_order"]

Array = NDArray[Any]
# What a random number is for, the last part of its address; a token drawn anew counts on.
ORDER, TOKEN = 0, 1


@dataclass(frozen=True)
class RowState:
    """n rows of one order and the same options, each with its current block.

    `masked` bool [n, K]: the positions still to fix. `u` float64 [n, K]: a uniform number of each
    position, the same in every evaluation: it is masked at time t exactly when u < 1 − α_t.
    `evaluations` int64 [n]: those of this block so far. `positions` int64 [n, K], in the text.
    `numbers` int64 [n]: the rows' own numbers, a part of the address of all random numbers.
    """

    masked: Array
    u: Array
    evaluations: Array
    positions: Array
    numbers: Array
    options: SamplingOptions
    sample: Callable[[Tensor, Array, Array], Tensor]

    def draw(self, logits: Tensor, wanted: Array) -> Tensor:
        """A token for each position of `wanted` bool [n, K], int64 [P], from its logits [P, V].

        By the rows' temperature, top-k and top-p; where the network is.
        """
        row, column = wanted.nonzero()
        return self.sample(logits, self.numbers[row], self.positions[row, column])

    def uniform(self, *address: int | Array) -> Array:
        """Uniform numbers [n, K] of the positions; `address` says what for, behind 0 and 1."""
        parts = [torch.as_tensor(part) for part in address]
        numbers, positions = torch.from_numpy(self.numbers), torch.from_numpy(self.positions)
        found: Array = uniform(self.options.seed, numbers[:, None], positions, *parts).numpy()
        return found


class Order:
    """What all orders share. One of its own has a `name` and `choose`, and is registered.

    `needs_steps`: whether it takes `SamplingOptions.steps`, and needs it. `only`: the kind of model
    it samples; None for every kind. `fills_block`: whether it also fixes the positions of a window
    that lie behind the text that is wanted.

    Example:
        >>> import torch, blockdiff
        >>> class LeftToRight(blockdiff.Order):
        ...     name = "left_to_right"
        ...     def choose(self, logits, wanted, rows):
        ...         first = wanted & (wanted.cumsum(1) == 1)
        ...         return torch.from_numpy(first[wanted]), rows.draw(logits, wanted)
        >>> model, tokenizer = blockdiff.load("starter")
        >>> done = blockdiff.generate(
        ...     model, "The", tokenizer=tokenizer, sampler=LeftToRight(), max_new_tokens=4
        ... )
        >>> len(done.tokens[0])
        4
    """

    name = ""
    needs_steps = False
    only: str | None = None
    fills_block = False

    def wanted(self, rows: RowState) -> Array:
        """bool [n, K]: whose logits the evaluation gives; at least one of each row's `masked`."""
        return rows.masked

    def mask_rate(self, rows: RowState, wanted: Array) -> Array:
        """float64 [n]: the mask rate a network that is conditioned on time is told."""
        rate: Array = rows.masked.mean(1)
        return rate

    def choose(self, logits: Tensor, wanted: Array, rows: RowState) -> tuple[Tensor | None, Tensor]:
        """(which are fixed: bool [P], None for all; tokens int64 [P]), from logits [P, V].

        Tokens are read where positions are fixed, for which sooner or later every row has to have
        one. The mask token and ids without a token are −inf in the logits.
        """
        raise NotImplementedError
