"""What an order is, and what it sees of its rows.

    wanted(rows)                 whose logits the next evaluation gives: a scheduled order knows
                                 which positions come next, one that reads the logits wants all
    choose(logits, wanted, rows) which of these are fixed, and their tokens

The engine calls `choose` once an evaluation, for all rows of an order whose options differ in
nothing but seed and length. What it hands over is on the host (numpy arrays), but for the logits,
which are where the network is.

Shapes: n rows, K positions of the block (of the longest, where block sizes differ), P wanted
positions in row-major order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array, draw, host_uniform, real_dtype
from blockdiff.errors import WrongAnswer
from blockdiff.models.denoiser import Remainder
from blockdiff.sampling.constraints import Automaton
from blockdiff.sampling.guides import Guides, RowGuides, chosen_in_order, guided
from blockdiff.sampling.options import SamplingOptions

# What a random number is for, the last part of its address; a token drawn anew counts on.
ORDER, TOKEN = 0, 1


@dataclass(frozen=True)
class RowState:
    """n rows of one order and the same options, each with its current block.

    `masked` bool [n, K]: the positions still to fix. `planned` int64 [n]: over how many tokens a
    number of steps is spread: the block size, or of a window (K = L), and of a part of a block,
    what was masked as it began; `remainder` says how, by the model's convention. `u` float64
    [n, K]: a uniform number of each position, the same in every evaluation: it is masked at time t
    exactly when u < 1 − α_t. `evaluations` int64 [n]: those of this block, or part, so far, but for
    that of a first token alone. `positions` int64 [n, K], in the text.
    `numbers` int64 [n]: the rows' own numbers, with `seeds` int64 [n] a part of the address of all
    random numbers. `options`: what the rows share; its `seed` and `max_new_tokens` mean nothing.
    `sample`: what `draw` calls. Only where the order `edits`: `tokens` int64 [n, K], what the block
    holds, and `revisable` bool [n, K], which of these may be written over. `guides`: what changes
    the logits of each row before the order sees them, none where nothing does; `in_order`: whether
    positions are fixed from left to right for their sake (`sampling.guides`).
    """

    masked: Array
    planned: Array
    u: Array
    evaluations: Array
    positions: Array
    numbers: Array
    seeds: Array
    options: SamplingOptions
    sample: Callable[[Tensor, Array, Array, Array], Tensor]
    remainder: Remainder = "first"
    tokens: Array = field(default_factory=lambda: np.empty((0, 0), np.int64))
    revisable: Array = field(default_factory=lambda: np.empty((0, 0), bool))
    guides: Sequence[RowGuides] = ()
    in_order: bool = False

    def of(self, places: Array) -> RowState:
        """Some of the rows."""
        found: dict[str, Any] = {}
        if self.guides:
            found["guides"] = [self.guides[place] for place in places.tolist()]
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and len(value) == len(self.masked):
                found[name] = value[places]
        return replace(self, **found)

    def guided(
        self,
        guides: Guides,
        canvas: Array,
        known: Array,
        new: Array,
        automata: Sequence[Automaton | None],
        mask_token_id: int,
    ) -> RowState:
        """These rows with what `guides` are told of each; in order, where these want them so.

        `canvas` int64 [n, S]: all of their texts, of which the first `known` [n] tokens are fixed.
        `new` bool: of their last columns, what was masked as the block, or its part, began.
        """
        if not guides.in_order:
            texts = [text[text != mask_token_id] for text in canvas]
            return replace(self, guides=[RowGuides(guides.guides, text) for text in texts])
        rows = zip(canvas, known.tolist(), automata, strict=True)
        found = [RowGuides(guides.guides, text[:end], one) for text, end, one in rows]
        u = self.u.copy()
        last = u[:, u.shape[1] - new.shape[1] :]
        for own, masked in zip(last, new, strict=True):  # an order that reads u goes left to right
            own[masked] = -np.sort(-own[masked])
        none = np.zeros_like(self.revisable)
        return replace(self, guides=found, u=u, revisable=none, in_order=True)

    def draw(self, logits: Tensor, wanted: Array) -> Tensor:
        """A token for each position of `wanted` bool [n, K], int64 [P], from its logits [P, V].

        By the rows' temperature, top-k and top-p; where the network is. A position's random number
        is the same in every evaluation: a token that is drawn and not fixed is not drawn afresh.
        """
        row, column = wanted.nonzero()
        return self.sample(logits, self.seeds[row], self.numbers[row], self.positions[row, column])

    def uniform(self, *address: int | Array) -> Array:
        """Uniform numbers [n, K] of the positions; `address` says what for, behind 0 and 1."""
        seeds, numbers = self.seeds[:, None], self.numbers[:, None]
        return host_uniform(seeds, numbers, self.positions, *address)


def sample_tokens(
    options: SamplingOptions,
    logits: Tensor,
    seeds: Array,
    numbers: Array,
    positions: Array,
    never: int = -1,
) -> Tensor:
    """A token for each row of logits [P, V]; its random number is that of seed, row, position.

    `never`: what stands for none, where logits are no numbers or leave no token.
    """

    def uniforms(which: Tensor, attempt: int) -> Tensor:
        own = slice(None) if attempt == 0 else which.numpy()  # later attempts are a CPU's
        u = host_uniform(seeds[own], numbers[own], positions[own], TOKEN + attempt)
        return torch.from_numpy(u).to(logits.device, real_dtype(logits.device), non_blocking=True)

    tokens = draw(
        logits,
        uniforms,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        top_p_rule=options.top_p_rule,
    )
    return tokens.where(logits.amax(-1).isfinite(), never)


class Order:
    """What all orders share. One of its own has a `name` and `choose`, and is registered.

    `reads`: the names of those settings of `SamplingOptions` it takes; others that some order reads
    are refused. `needs`: those it cannot do without. `only`: the kind of model it samples; None for
    every kind. `tunes`: setting → the values `blockdiff tune` tries; an order without (None) it
    tries where it is named. `fills_block`: whether it also fixes the positions of a window that lie
    behind the text that is wanted. `edits`: whether it also writes over tokens of the block, each
    once at most: its `wanted` may name `revisable` positions, and a block ends with the first
    evaluation that leaves it as it is. `verifies`: whether its rows are drafted and verified at
    L' = 1, by `sampling.verifying`, in the place of `choose`.

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
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    only: str | None = None
    tunes: Mapping[str, Sequence[Any]] | None = None
    fills_block = False
    edits = False
    verifies = False

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


# What an order of one's own gets wrong is said in one line: its answers are checked as far as the
# host sees them.


def asked(order: Order, rows: RowState) -> tuple[Array, Array]:
    """(`wanted`, `mask_rate`) of an order; raises `InputError` where one of them cannot be."""
    masked, wanted = rows.masked, order.wanted(rows)
    if not isinstance(wanted, np.ndarray) or (wanted.dtype, wanted.shape) != (bool, masked.shape):
        raise _wrong(order, "wanted", f"an array bool {list(masked.shape)}")
    allowed = masked | rows.revisable if order.edits else masked
    if (wanted & ~allowed).any() or not wanted.any(1).all():
        raise _wrong(order, "wanted", "masked positions only, and at least one of each row")
    rate = np.asarray(order.mask_rate(rows, wanted), dtype=np.float64)
    if rate.shape != (len(masked),) or not ((rate >= 0) & (rate <= 1)).all():
        raise _wrong(order, "mask_rate", f"{len(masked)} numbers from 0 to 1")
    if rows.in_order:  # as many, but the first
        wanted = masked & (masked.cumsum(1) <= wanted.sum(1, keepdims=True))
    return wanted, rate


def answered(
    order: Order, logits: Tensor, wanted: Array, rows: RowState
) -> tuple[Tensor | None, Tensor]:
    """What an order's `choose` gives for guided logits.

    Raises `InputError` for other types or shapes.
    """
    if rows.in_order:
        return chosen_in_order(
            lambda logits, wanted, places: _answered(order, logits, wanted, rows.of(places)),
            logits, wanted, rows.guides,
        )  # fmt: skip
    if rows.guides:
        texts = [rows.guides[row].text for row in wanted.nonzero()[0].tolist()]
        logits = guided(rows.guides[0].guides, logits, texts)
    return _answered(order, logits, wanted, rows)


def _answered(
    order: Order, logits: Tensor, wanted: Array, rows: RowState
) -> tuple[Tensor | None, Tensor]:
    match order.choose(logits, wanted, rows):
        case (None | Tensor() as chosen, Tensor() as tokens) if (
            tokens.dtype,
            tuple(tokens.shape),
        ) == (torch.int64, (len(logits),)) and (
            chosen is None or (chosen.dtype, chosen.shape) == (torch.bool, tokens.shape)
        ):
            return chosen, tokens
    raise _wrong(order, "choose", f"None or bool [{len(logits)}], and tokens int64 of that length")


def _wrong(order: Order, method: str, right: str) -> WrongAnswer:
    return WrongAnswer(f"the order {order.name}: `{method}` must give {right}")
