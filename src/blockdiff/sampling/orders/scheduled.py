"""Orders that follow the noise backwards: when a token is fixed is drawn before the network speaks.

With a network that ignores t, when a token is unmasked does not depend on what the network says.
Each position therefore has its moment from one uniform u: it is masked at time t exactly when
u < 1 − α_t (the forward process run once, then read backwards).

    ancestral      T steps t_i = 1 − i/T; a position comes in the step in which u crosses 1 − α
    first_hitting  T → ∞: one position an evaluation, in descending order of u (Zheng et al. 2024)
    analytic       T steps of SEDD, whose network also says how likely a position is unmasked

A step in which nothing is unmasked needs no network evaluation and simply never comes up, except in
`analytic`, where the network decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockdiff.categorical import real_dtype
from blockdiff.registry import register_order
from blockdiff.sampling.orders.base import ORDER, Array, Order, RowState
from blockdiff.schedules import get_schedule


class FirstHitting(Order):
    """One position an evaluation."""

    name = "first_hitting"
    reads: tuple[str, ...] = ("schedule",)  # any gives the same text

    def wanted(self, rows: RowState) -> Array:
        pending = rows.u * rows.masked
        last: Array = rows.masked & (pending == pending.max(1, keepdims=True))
        return last

    def mask_rate(self, rows: RowState, wanted: Array) -> Array:
        """u itself, the rate at the very moment the position comes."""
        rate: Array = (rows.u * wanted).max(1)
        return rate

    def choose(self, logits: Tensor, wanted: Array, rows: RowState) -> tuple[Tensor | None, Tensor]:
        return None, rows.draw(logits, wanted)


class Ancestral(FirstHitting):
    """All positions of the earliest of T steps that has some."""

    name = "ancestral"
    reads, needs = ("steps", "schedule"), ("steps",)

    def wanted(self, rows: RowState) -> Array:
        step = self.step_of(rows)
        step[~rows.masked] = rows.options.steps
        return rows.masked & (step == step.min(1, keepdims=True))

    def mask_rate(self, rows: RowState, wanted: Array) -> Array:
        """That at the step's beginning."""
        assert rows.options.steps is not None
        step = torch.from_numpy((self.step_of(rows) * wanted).max(1))
        rate: Array = (
            get_schedule(rows.options.schedule or "linear")
            .mask_rate(1 - step.double() / rows.options.steps)
            .numpy()
        )
        return rate

    @staticmethod
    def step_of(rows: RowState) -> Array:
        """int64 [n, K]: the step, of 0 … T − 1, in which each position comes."""
        steps = rows.options.steps
        assert steps is not None
        time = get_schedule(rows.options.schedule or "linear").inverse(torch.from_numpy(rows.u))
        step: Array = ((1 - time) * steps).ceil().long().clamp(1, steps).sub_(1).numpy()
        return step


class Analytic(Order):
    """SEDD's own sampler: Tweedie's denoiser by the network's scores (Lou et al. 2024, sec. 4.2).

        a masked position becomes v in the step from t to s with probability
            s_v (e^{σ_t − σ_s} − 1) = p̃_v (α_s − α_t)/(1 − α_t),   p̃_v = e^{z_v}/(V − 1)

    It is the ancestral sampler with the network's own sum S = Σ_v p̃_v where that has 1: how many
    positions are unmasked depends on the network, so that every step needs an evaluation. The last
    step fixes what is left.
    """

    name = "analytic"
    reads, needs = ("steps", "schedule"), ("steps",)
    only = "sedd"
    fills_block = True

    def mask_rate(self, rows: RowState, wanted: Array) -> Array:
        return self._rate(rows, rows.evaluations)

    def choose(self, logits: Tensor, wanted: Array, rows: RowState) -> tuple[Tensor | None, Tensor]:
        rate, later = (self._rate(rows, rows.evaluations + i) for i in (0, 1))
        row = wanted.nonzero()[0]
        share = torch.from_numpy(((rate - later) / rate)[row]).to(logits, non_blocking=True)
        u = torch.from_numpy(rows.uniform(ORDER, rows.evaluations[:, None])[wanted])
        last = torch.from_numpy(rows.evaluations[row] == self._steps(rows) - 1)
        moved = u.to(logits.device, real_dtype(logits.device), non_blocking=True)
        chosen = moved < unmask_probability(logits, share)
        chosen = (chosen | last.to(chosen.device, non_blocking=True)).cpu()
        fixed = wanted.copy()
        fixed[wanted] = chosen.numpy()
        index = chosen.nonzero().squeeze(-1).to(logits.device, non_blocking=True)
        tokens = index.new_zeros(len(chosen))
        tokens[index] = rows.draw(logits[index], fixed)
        return chosen, tokens

    def _rate(self, rows: RowState, step: Array) -> Array:
        time = 1 - torch.from_numpy(step).double() / self._steps(rows)
        rate: Array = get_schedule(rows.options.schedule or "linear").mask_rate(time).numpy()
        return rate

    @staticmethod
    def _steps(rows: RowState) -> int:
        assert rows.options.steps is not None
        return rows.options.steps


def unmask_probability(logits: Tensor, share: Tensor) -> Tensor:
    """S · share [P], at most 1, from logits [P, V], the mask token's at −inf.

    `share` [P] = (α_s − α_t)/(1 − α_t).
    """
    total = torch.exp(logits.float().logsumexp(-1) - math.log(logits.shape[-1] - 1))
    return (total * share).clamp(max=1)


for _order in (FirstHitting(), Ancestral(), Analytic()):
    register_order(_order)
