"""Noise schedules: how likely a token is masked at time t.

    α_t = P(token still clean at t),  α_0 = 1,  α_1 = 0
    weight(t) = −α'_t / (1 − α_t)                      (the NELBO's weight, eq. 8 of the paper)

Every function takes a tensor of times (or mask rates) in [0, 1] of any shape and returns one of
the same shape and dtype. Each is written in the form that is exact at both ends: α is 1 and 0
there, not 1 − 6e-8, and `weight` is +inf at t = 0, its pole under each of these schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from blockdiff.errors import InputError
from blockdiff.registry import SCHEDULES, register_schedule


@dataclass(frozen=True)
class Schedule:
    """One schedule as four functions of time.

    `alpha(t)`: probability that a token is clean. `mask_rate(t)` = 1 − alpha(t), computed without
    the cancellation. `weight(t)` = −α'/(1 − α), in units of 1/time. `inverse(rate)`: the time at
    which the mask rate is `rate`.

    Example:
        >>> import torch, blockdiff
        >>> cubic = blockdiff.Schedule(
        ...     name="cubic", alpha=lambda t: 1 - t**3, mask_rate=lambda t: t**3,
        ...     weight=lambda t: 3 / t, inverse=lambda rate: rate ** (1 / 3),
        ... )
        >>> cubic.inverse(cubic.mask_rate(torch.tensor(0.5)))
        tensor(0.5000)
    """

    name: str
    alpha: Callable[[Tensor], Tensor]
    mask_rate: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        """Tries the functions at nine times; raises `InputError` for what cannot be a schedule."""
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        rate = self._tried("mask_rate", t)
        if abs(rate[0]) > 1e-6 or abs(rate[-1] - 1) > 1e-6 or (rate.diff() <= 0).any():
            self._refuse("mask_rate", "rise from 0 at t = 0 to 1 at t = 1")
        if (self._tried("alpha", t) + rate - 1).abs().max() > 1e-6:
            self._refuse("alpha", "be 1 − mask_rate")
        if (self._tried("weight", t[1:]) < 0).any():
            self._refuse("weight", "not be negative")
        if (self._tried("inverse", rate) - t).abs().max() > 1e-4:
            self._refuse("inverse", "give the time of a mask rate")

    def _tried(self, name: str, x: Tensor) -> Tensor:
        found = getattr(self, name)(x)
        if not isinstance(found, Tensor) or found.shape != x.shape or not found.isfinite().all():
            self._refuse(name, "give a finite number for each time, as a tensor of the same shape")
        return found

    def _refuse(self, name: str, law: str) -> NoReturn:
        raise InputError(f"the schedule {self.name!r}: `{name}` must {law}")


def _power(name: str, exponent: float) -> Schedule:
    """1 − α_t = t^exponent, so the weight is exponent / t."""
    return Schedule(
        name=name,
        alpha=lambda t: 1 - t**exponent,
        mask_rate=lambda t: t**exponent,
        weight=lambda t: exponent / t,
        inverse=lambda rate: rate ** (1 / exponent),
    )


def _cosine() -> Schedule:
    """α_t = cos(πt/2)."""
    quarter = math.pi / 4

    def alpha(t: Tensor) -> Tensor:
        return torch.sin(2 * quarter * (1 - t))  # cos(π/2) would be −4e-8 in float32, not 0

    def mask_rate(t: Tensor) -> Tensor:
        # 1 − cos cancels near t = 0, and the half-angle form is an ulp off at t = 1.
        return torch.where(t < 0.5, 2 * torch.sin(quarter * t) ** 2, 1 - alpha(t))

    return Schedule(
        name="cosine",
        alpha=alpha,
        mask_rate=mask_rate,
        weight=lambda t: 2 * quarter / torch.tan(quarter * t),
        inverse=lambda rate: torch.asin(torch.sqrt(rate / 2)) / quarter,
    )


def _logarithmic() -> Schedule:
    """1 − α_t = log(1 + t) / log 2."""
    log2 = math.log(2)

    def mask_rate(t: Tensor) -> Tensor:
        return torch.where(t == 1, torch.ones_like(t), torch.log1p(t) / log2)

    return Schedule(
        name="logarithmic",
        alpha=lambda t: 1 - mask_rate(t),
        mask_rate=mask_rate,
        weight=lambda t: 1 / ((1 + t) * torch.log1p(t)),
        inverse=lambda rate: torch.exp2(rate) - 1,
    )


for _schedule in (
    _power("linear", 1.0),
    _cosine(),
    _power("square", 2.0),
    _power("square_root", 0.5),
    _logarithmic(),
):
    register_schedule(_schedule)


def get_schedule(chosen: str | Schedule) -> Schedule:
    """The schedule called `chosen`, or a `Schedule` itself; `InputError` for an unknown name."""
    return SCHEDULES.find(chosen)
