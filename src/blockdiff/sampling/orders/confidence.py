"""Orders that fix the positions the network is surest of, several at once.

    order          sure of a position                      fixed besides the k surest
    confidence     p of its token                          none
    threshold      p of its token                          p ≥ threshold
    margin         p₁ − p₂ of the two most likely tokens   p₁ − p₂ ≥ margin, where that is given
    entropy        −H                                      none
    entropy_bound  −H                                      H₁ + … + H_{i−1} ≤ entropy_bound

k is `tokens_per_step`, 1 by default. With `steps` S instead it follows the linear schedule: of a
block's n tokens step i fixes n // S, and one more where i < n mod S (published models may share
them out otherwise: `Conventions.remainder`); a block that the prompt begins goes at the same rate.
H₁ ≤ H₂ ≤ … are a row's entropies in nats; bounded is the sum of the first i but for their largest.
confidence is the rule of MaskGIT (Chang et al. 2022) and LLaDA (Nie et al. 2025), threshold that of
Fast-dLLM (Wu et al. 2025); margin and entropy are those of Dream (Ye et al. 2025), entropy_bound is
EB-Sampler (Ben-Hamu et al. 2025). With `remasking` random, confidence fixes k positions in the
order of first_hitting.

Not exact: tokens fixed together are drawn as if independent of one another, and what is fixed first
depends on what was drawn. k, threshold, margin and bound are what that is bought with. p and H are
those before temperature and cuts; tokens are drawn after them. A position's token is always drawn
with the same random number, so that rare tokens, which are seldom sure when they are first drawn,
stay as likely as they were. A threshold or margin includes its own value, but for 1, where nothing
is sure and k tokens come at a time: in float32 a probability may round to 1. Of equally sure
positions the earlier comes first.

Shapes: n rows, K positions of the block, P wanted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from blockdiff.models.denoiser import Remainder
from blockdiff.registry import register_order
from blockdiff.sampling.orders.base import Array, Order, RowState

# The time at which Dream's noise ends.
DREAM_END = 1e-3


class Confidence(Order):
    """The k positions of each row whose tokens are the most probable."""

    name = "confidence"
    reads: tuple[str, ...] = ("steps", "tokens_per_step", "remasking")
    tunes: Mapping[str, Sequence[float]] | None = {"tokens_per_step": (2, 4)}

    def wanted(self, rows: RowState) -> Array:
        if rows.options.remasking != "random":
            return rows.masked
        rank = np.where(rows.masked, -rows.u, np.inf).argsort(1, kind="stable").argsort(1)
        first: Array = rows.masked & (rank < least(rows)[:, None])
        return first

    def choose(self, logits: Tensor, wanted: Array, rows: RowState) -> tuple[Tensor | None, Tensor]:
        tokens = rows.draw(logits, wanted)
        if rows.options.remasking == "random":
            return None, tokens
        return self.surest(self.sureness(logits, tokens), wanted, rows), tokens

    def surest(self, sureness: Tensor, wanted: Array, rows: RowState) -> Tensor:
        """bool [P]: which positions are fixed, from how sure the network is of each."""
        device = sureness.device
        row, column = (torch.from_numpy(x).to(device, non_blocking=True) for x in wanted.nonzero())
        count = torch.from_numpy(least(rows)).to(device, non_blocking=True)
        table = sureness.new_full(wanted.shape, -torch.inf)
        table[row, column] = sureness
        table, order = table.sort(dim=1, descending=True, stable=True)
        first = torch.arange(wanted.shape[1], device=device) < count[:, None]
        chosen = first | self.besides(table, rows)
        return torch.empty_like(chosen).scatter_(1, order, chosen)[row, column]

    def sureness(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """How sure the network is of each position [P], from logits [P, V] and tokens drawn [P]."""
        return logits.softmax(-1).gather(-1, tokens[:, None].clamp(min=0)).squeeze(-1)

    def besides(self, sureness: Tensor, rows: RowState) -> Tensor:
        """bool [n, K]: which are fixed besides the k surest; `sureness` [n, K] falls in each row.

        −inf stands for positions that are not wanted.
        """
        return torch.zeros_like(sureness, dtype=torch.bool)


class Threshold(Confidence):
    """All positions whose token has so high a probability."""

    name = "threshold"
    reads: tuple[str, ...] = ("steps", "tokens_per_step", "threshold")
    tunes: Mapping[str, Sequence[float]] | None = {"threshold": (0.9, 0.6, 0.3)}

    def besides(self, sureness: Tensor, rows: RowState) -> Tensor:
        given = rows.options.threshold
        return _at_least(sureness, 0.9 if given is None else given)


class Margin(Confidence):
    """Those where the likeliest token is the furthest ahead of the second."""

    name = "margin"
    reads = ("steps", "tokens_per_step", "margin")
    tunes: Mapping[str, Sequence[float]] = {"margin": (0.5, 0.2)}

    def sureness(self, logits: Tensor, tokens: Tensor) -> Tensor:
        first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second

    def besides(self, sureness: Tensor, rows: RowState) -> Tensor:
        given = rows.options.margin
        return _at_least(sureness, 1.0 if given is None else given)


class Entropy(Confidence):
    """Those of the lowest entropy."""

    name = "entropy"
    reads: tuple[str, ...] = ("steps", "tokens_per_step")
    tunes: Mapping[str, Sequence[float]] = {"tokens_per_step": (2,)}

    def sureness(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return -torch.special.entr(logits.softmax(-1)).sum(-1)


class EntropyBound(Entropy):
    """As many of the lowest entropy as together share little: Σ H − max H bounds it."""

    name = "entropy_bound"
    reads = ("steps", "tokens_per_step", "entropy_bound")
    tunes: Mapping[str, Sequence[float]] = {"entropy_bound": (0.1, 0.5, 2.0)}

    def besides(self, sureness: Tensor, rows: RowState) -> Tensor:
        given = rows.options.entropy_bound
        entropy = -sureness
        return entropy.cumsum(1) - entropy <= (0.1 if given is None else given)


def least(rows: RowState) -> Array:
    """int64 [n]: k, how many positions of each row an evaluation fixes in any case."""
    options = rows.options
    if options.steps is None:
        each = 1 if options.tokens_per_step is None else options.tokens_per_step
        return np.full(len(rows.masked), each)
    plans = [shares(n, options.steps, rows.remainder) for n in rows.planned.tolist()]
    plans = [plan if plan else (1,) for plan in plans]
    steps = zip(plans, rows.evaluations.tolist(), strict=True)
    return np.array([plan[min(step, len(plan) - 1)] for plan, step in steps])


@lru_cache(maxsize=1024)
def shares(tokens: int, steps: int, remainder: Remainder) -> tuple[int, ...]:
    """How many of a block's tokens each of so many steps fixes; steps that fix none are left out.

    By the model's convention, in the published codes' own arithmetic where a half is rounded.
    """
    if remainder == "first":
        each, rest = divmod(tokens, steps)
        return (each + 1,) * rest + (each,) * (steps - rest if each else 0)
    last, one = remainder == "last", np.float32(1)
    time = np.linspace(1, DREAM_END if last else 0, steps + 1).astype(np.float32)
    time = time if last else one - (one - time)  # 1 − α_t of the linear schedule
    found, left = [], tokens
    for t, s in pairwise(time):
        found.append(int(left * (one - s / t)) if last else round(left * (1 - float(s / t))))
        left -= found[-1]
    found[-1] += left
    return tuple(share for share in found if share)


def _at_least(sureness: Tensor, threshold: float) -> Tensor:
    return sureness >= (threshold if threshold < 1 else torch.inf)


for _order in (Confidence(), Threshold(), Margin(), Entropy(), EntropyBound()):
    register_order(_order)
