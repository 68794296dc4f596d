"""What goes into a worker, and what comes out of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from blockdiff.sampling.options import SamplingOptions


class Full(RuntimeError):
    """As many rows wait as may."""


class Draining(RuntimeError):
    """The worker takes no more rows, or ended before the row did."""


@dataclass(frozen=True)
class Job:
    """One row. `prompt`: token ids; `number`: the row's in the address of its random numbers."""

    prompt: list[int]
    options: SamplingOptions
    number: int = 0


@dataclass(frozen=True)
class Progress:
    """What an evaluation changed in a row.

    `at`: positions it fixed, counted from the first new token, and their `tokens`; `edited`: those
    of them that were written over. `final`: how many tokens from the first new one no later step
    changes. `logprobs`: of `tokens`, where the options ask. `seconds`: since `submit`.
    """

    nfe: int
    at: list[int]
    tokens: list[int]
    edited: list[int]
    final: int
    logprobs: list[float] | None
    seconds: float


@dataclass(frozen=True)
class Finished:
    """A whole row: its new tokens, EOS included.

    `stopped`: by a rule, EOS or its constraint, and not by its length. `wait`: seconds in the
    queue; `seconds`: since `submit`.
    """

    tokens: list[int]
    nfe: int
    stopped: bool
    logprobs: list[float] | None
    wait: float
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The row raised, or the worker ended before it."""

    error: BaseException


Event = Progress | Finished | Failed
Listen = Callable[["Ticket", Event], None]


@dataclass(eq=False)
class Ticket:
    """A row on its way."""

    job: Job
    id: int
    listen: Listen
    state: Literal["queued", "running", "finished", "cancelled", "failed"] = "queued"
    submitted: float = field(default_factory=time.monotonic)
    wait: float = 0.0
    told: int = 0  # evaluations of the row that were told of


@dataclass
class Stats:
    """Plain numbers, since the start but for `rows` and `queued`, which are now.

    `evaluations`: of the network, of all rows at once; `row_evaluations`: each row's own.
    """

    capacity: int
    rows: int = 0
    queued: int = 0
    tokens: int = 0
    evaluations: int = 0
    row_evaluations: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    busy: float = 0.0
