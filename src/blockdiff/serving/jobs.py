"""What a worker takes, and what it tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step


class Unavailable(Exception):
    """A worker that takes no job now."""


class Full(Unavailable):
    """The queue is full; later there is room."""


class Draining(Unavailable):
    """The worker ends: it takes no new jobs, and some may be given up."""


class Interrupted(Exception):
    """The row's evaluation failed, not by its fault, and it cannot be written once more."""


@dataclass(frozen=True)
class Job:
    """One row.

    `prompt`: token ids. `number`: the row's in the address of its random numbers: choice k of a
    request has k. `progress`: whether each evaluation is told; without it only the end is.
    """

    prompt: Sequence[int]
    options: SamplingOptions
    number: int = 0
    progress: bool = True


@dataclass(frozen=True)
class Progress:
    """What one evaluation did to a row, on the host.

    `nfe`: its evaluations so far. `at`: the positions it wrote to, counted from the first new
    token, with the `tokens`; `edited`: those of them that held a token before. `final`: how many
    new tokens no later step changes. `logprobs` of `tokens` where the options ask. `seconds` since
    `submit`.
    """

    nfe: int
    at: list[int]
    tokens: list[int]
    edited: list[int]
    final: int
    logprobs: list[float] | None
    seconds: float

    @classmethod
    def of(cls, ticket: Ticket, step: Step, place: int, final: int) -> Progress:
        """Of the row at `place` of a step, of which `final` new tokens are."""
        options, start = ticket.job.options, len(ticket.job.prompt)
        new = slice(start, start + options.max_new_tokens)
        fixed = step.fixed[place, new].numpy()
        edited = None if step.edited is None else step.edited[place, new].numpy()
        at = (fixed if edited is None else fixed | edited).nonzero()[0]
        tokens, logprobs = step.tokens[place, new].numpy()[at], None
        if options.logprobs and step.logprobs is not None:
            logprobs = step.logprobs[place, new].numpy()[at].tolist()
        again = [] if edited is None else edited.nonzero()[0].tolist()
        return cls(ticket.nfe, at.tolist(), tokens.tolist(), again, final, logprobs, ticket.seconds)


@dataclass(frozen=True)
class Finished:
    """A row's end.

    `tokens`: the new ones, EOS included. `finish`: as in `Generation`. `stopped`: by a rule, EOS or
    a constraint, not by its length. `logprobs`: of `tokens`, where the options ask. In seconds:
    `queue_seconds` until it was admitted, `prompt_seconds` from there until its prompt was read,
    `first_seconds` since `submit` until its first new token was final, `seconds` until its end.
    `cached_tokens`: how many of the prompt were known already.
    """

    tokens: list[int]
    nfe: int
    stopped: bool
    finish: str
    logprobs: list[float] | None
    queue_seconds: float
    prompt_seconds: float
    first_seconds: float
    seconds: float
    cached_tokens: int


@dataclass(frozen=True)
class Failed:
    """A row that cannot be finished.

    `error`: an `InputError` where its options and its prompt let nothing follow, `WrongAnswer`
    where an order, rule or processor is to blame; `Draining`; `Interrupted`; or what else was
    raised.
    """

    error: BaseException


Event = Progress | Finished | Failed
State = Literal["queued", "running", "finished", "cancelled", "failed"]
Listener = Callable[["Ticket", Event], None]


class Ticket:
    """A job that was taken; `state` tells how far it is."""

    def __init__(self, job: Job, number: int, need: tuple[int, int], listen: Listener) -> None:
        self.job, self.id, self.listen = job, number, listen
        self.state: State = "queued"
        self.need = need  # tokens of the cache, and bytes beside it
        self.submitted = time.perf_counter()
        self.admitted = self.read = self.first = 0.0  # seconds since then
        self.nfe = 0
        # Steps that wrote something: how many were told, and how many of these are to come once
        # more since the row was begun anew; and up to which evaluation all was told.
        self.told = self.again = self.seen = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.submitted


@dataclass(frozen=True)
class Stats:
    """Plain numbers.

    `rows` running, `queued`, how many rows there may be (`capacity`), bytes of kept beginnings
    (`prefix_bytes`); and since the start new `tokens`, network `evaluations`, tokens of the prompts
    (`prompt_tokens`) and those of them that were known (`cached_tokens`), jobs by their end, and
    rows that were begun anew because an evaluation failed (`restarted`).
    """

    rows: int = 0
    queued: int = 0
    capacity: int = 0
    tokens: int = 0
    evaluations: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restarted: int = 0
    prefix_bytes: int = 0
