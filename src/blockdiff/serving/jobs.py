"""What a worker takes, and what it tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch

from blockdiff.sampling.generate import collect
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step


class Full(RuntimeError):
    """As many rows wait as may."""


class Draining(RuntimeError):
    """The worker takes no more rows, or ended before the row did."""


class Interrupted(RuntimeError):
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
    """What an evaluation that wrote to a row did, on the host.

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
        fixed = step.fixed.numpy()[place, new]
        edited = None if step.edited is None else step.edited.numpy()[place, new]
        at = (fixed if edited is None else fixed | edited).nonzero()[0]
        tokens, logprobs = step.tokens.numpy()[place, new][at], None
        if options.logprobs and step.logprobs is not None:
            logprobs = step.logprobs.numpy()[place, new][at].tolist()
        again = [] if edited is None else edited.nonzero()[0].tolist()
        return cls(ticket.nfe, at.tolist(), tokens.tolist(), again, final, logprobs, ticket.seconds)


@dataclass(frozen=True)
class Finished:
    """A row's end.

    `tokens`: the new ones, EOS included. `stopped`: by a rule, EOS or a constraint, not by its
    length. `logprobs`: of `tokens`, where the options ask. In seconds: `wait` in the queue;
    `seconds` since `submit`; `prompt_seconds` from the queue until its prompt was read;
    `first_seconds` since `submit` until its first new token was final. `finish`: as in
    `Generation`. `cached_tokens`: how many of the prompt were known already.
    """

    tokens: list[int]
    nfe: int
    stopped: bool
    logprobs: list[float] | None
    wait: float
    seconds: float
    prompt_seconds: float = 0.0
    first_seconds: float = 0.0
    finish: str = "length"
    cached_tokens: int = 0

    @classmethod
    def of(cls, ticket: Ticket, step: Step, place: int, eos: int | None, cached: int) -> Finished:
        """Of the row at `place` of its last step."""
        options, prompt = ticket.job.options, ticket.job.prompt
        own = step.of(torch.tensor([place]))
        done = collect(own, [prompt], eos, options.max_new_tokens, 0.0)
        stopped = own.rejected if own.stopped is None else own.stopped
        known = done.path_logprobs[0] if done.path_logprobs and options.logprobs else None
        return cls(
            done.tokens[0], done.nfe[0], bool(stopped[0]), known, ticket.admitted, ticket.seconds,
            max(ticket.read - ticket.admitted, 0.0), ticket.first or ticket.seconds,
            done.finish[0], cached,
        )  # fmt: skip


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
Listen = Callable[["Ticket", Event], None]


class Ticket:
    """A job that was taken; `state` tells how far it is."""

    def __init__(self, job: Job, number: int, need: tuple[int, int], listen: Listen) -> None:
        self.job, self.id, self.listen = job, number, listen
        self.state: State = "queued"
        self.need = need  # tokens of the cache, and bytes beside it
        self.submitted = time.perf_counter()
        self.admitted = self.read = self.first = 0.0  # seconds since then
        self.nfe = self.final = 0  # evaluations, and new tokens that no later one changes
        # Steps that were told, and how many of them are to come once more where a row began anew.
        self.told = self.again = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.submitted


@dataclass(frozen=True)
class Stats:
    """Plain numbers, since the start but for `rows`, `queued` and `prefix_bytes`, which are now.

    `capacity`: rows there may be. `tokens`: new ones that no later evaluation changes.
    `evaluations`: of the network, of all rows at once; `row_evaluations`: each row's own.
    `prompt_tokens`: of prompts that were read, `cached_tokens` of them known. `restarted`: rows
    that began again because an evaluation failed. `busy`: seconds of work. `prefix_bytes`: of kept
    beginnings.
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
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restarted: int = 0
    prefix_bytes: int = 0


def answer(work: Callable[[], Any], future: Future[Any]) -> None:
    """Does the work and gives its result, or what it raises, to the future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        with torch.inference_mode():
            future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
