"""Which masked positions are fixed next.

With a network that ignores t, when a token is unmasked does not depend on what the network says.
Each position therefore gets its unmasking event up front, from one uniform u: it is masked at time
t exactly when u < 1 − α_t (the forward process run once, then read backwards).

    ancestral      T steps t_i = 1 − i/T; event i is the step in which u crosses 1 − α
    analytic       T steps of SEDD, whose network also says how likely a position is unmasked
    first_hitting  T → ∞: one position an event, in descending order of u (Zheng et al. 2024)

A step in which nothing is unmasked needs no network evaluation and simply never comes up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockdiff.sampling.options import check_sampler
from blockdiff.schedules import get_schedule


def events(u: Tensor, masked: Tensor, sampler: str, steps: int | None, schedule: str) -> Tensor:
    """The event number int64 [n, K] at which each masked position of a block is fixed.

    `u` [n, K] uniform in (0, 1); `masked` bool [n, K]. Lower numbers come first; positions with
    the same number are fixed together. Unmasked positions get a number past every event.
    """
    check_sampler(sampler, steps)
    if sampler == "first_hitting":
        event = (-u).argsort(-1).argsort(-1)
    else:
        assert steps is not None
        time = get_schedule(schedule).inverse(u)
        event = ((1 - time) * steps).ceil().long().clamp(1, steps) - 1
    return event.masked_fill(~masked, torch.iinfo(torch.int64).max)


def arrival_rate(
    u: Tensor, event: Tensor, sampler: str, steps: int | None, schedule: str
) -> Tensor:
    """The mask rate [n, K] just before each position's event, for a time-conditioned network.

    First-hitting: u itself, the rate at the very moment. Ancestral: that at its step's beginning.
    """
    if sampler == "first_hitting":
        return u
    assert steps is not None
    time = 1 - event.clamp(max=steps - 1).to(u.dtype) / steps
    return get_schedule(schedule).mask_rate(time)


def next_positions(event: Tensor, masked: Tensor) -> Tensor:
    """bool [n, K]: the masked positions of each row's earliest pending event."""
    pending = event.masked_fill(~masked, torch.iinfo(torch.int64).max)
    return masked & (pending == pending.amin(-1, keepdim=True))
