"""One thread that computes for many: rows come and go between the evaluations of one engine.

    submit → queue → admitted between two evaluations → Progress … → Finished

A row's random numbers are its own (its seed, its number), so in float32 its tokens are the same
whatever else runs; it takes part from the evaluation after it was admitted, and leaves with the one
that finishes it, or before the next one where it is cancelled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Any, Literal, TypeVar

import torch

from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.fitting import fitted
from blockdiff.sampling.generate import collect
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step

T = TypeVar("T")
LOG = logging.getLogger(__name__)
ROWS = 64


class Unavailable(Exception):
    """A worker that takes no job now."""


class Full(Unavailable):
    """The queue is full; later there is room."""


class Draining(Unavailable):
    """The worker ends: it takes no new jobs, and some may be given up."""


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


@dataclass(frozen=True)
class Finished:
    """A row's end.

    `tokens`: the new ones, EOS included. `finish`: as in `Generation`. `stopped`: by a rule, EOS or
    a constraint, not by its length. `logprobs`: of `tokens`, where the options ask. In seconds:
    `queue_seconds` until it was admitted, `prompt_seconds` from there until its prompt was read,
    `first_seconds` since `submit` until its first new token was final, `seconds` until its end.
    `cached_tokens`: how many of the prompt were not computed.
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
    """A row that cannot be finished: `InputError` where its request is to blame."""

    error: BaseException


Event = Progress | Finished | Failed
State = Literal["queued", "running", "finished", "cancelled", "failed"]
Listener = Callable[["Ticket", Event], None]


class Ticket:
    """A job that was taken; `state` tells how far it is."""

    def __init__(self, job: Job, number: int, listen: Listener) -> None:
        self.job, self.id = job, number
        self.state: State = "queued"
        self._listen = listen
        self._submitted = time.perf_counter()
        self._admitted = self._read = self._first = 0.0  # seconds since then
        self._nfe = 0

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._submitted


@dataclass(frozen=True)
class Stats:
    """Plain numbers: `rows` running, `queued`, how many rows there may be (`capacity`), and since
    the start: new `tokens`, network `evaluations`, and jobs by their end."""

    rows: int = 0
    queued: int = 0
    capacity: int = 0
    tokens: int = 0
    evaluations: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Worker:
    """Owns the engine of a model; all of its methods may be called from any thread."""

    def __init__(self, model: Denoiser, *, rows: int | None = None, queue: int = 256) -> None:
        """`rows`: how many are written side by side. `queue`: how many more may wait."""
        model.eval()
        self.model, self.rows, self.queue = model, ROWS if rows is None else rows, queue
        self._engine = Engine(model)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # by the engine's names
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._gone: list[Ticket] = []  # cancelled while they ran
        self._draining = self._ended = self._idle = False
        self._ids = count()
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="blockdiff-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job], listen: Listener) -> list[Ticket]:
        """Queues all jobs or none; `listen(ticket, event)` is called in the computing thread.

        Raises `InputError` for what does not fit the model, `Full` and `Draining`.
        """
        for job in jobs:
            fitted(self.model.config, [job.prompt], job.options, [job.number])
        with self._changed:
            if self._draining:
                raise Draining("the server is shutting down and takes no new work")
            busy = len(self._waiting) + len(self._running)
            if busy + len(jobs) > self.rows + self.queue:
                raise Full(f"{busy} texts are being written or wait; try again later")
            tickets = [Ticket(job, next(self._ids), listen) for job in jobs]
            self._waiting += tickets
            self._changed.notify_all()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """The row leaves before the next evaluation, and its listener hears no more of it."""
        with self._changed:
            if ticket.state == "running":
                self._gone.append(ticket)
            elif ticket.state != "queued":
                return
            else:
                self._waiting.remove(ticket)
            ticket.state = "cancelled"
            self._count(cancelled=1)
            self._changed.notify_all()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Other work of the model, done in the computing thread between two evaluations."""
        future: Future[T] = Future()
        with self._changed:
            if self._ended:
                raise Draining("the server is shutting down and takes no new work")
            self._calls.append((work, future))
            self._changed.notify_all()
        return future

    def drain(self, seconds: float) -> bool:
        """Takes no more jobs; whether all were finished in the time. The rest fail, `Draining`."""
        with self._changed:
            self._draining = True
            alive = self._thread.is_alive()
            done = alive and self._changed.wait_for(lambda: self._idle and not self._busy, seconds)
            self._ended = True
            self._changed.notify_all()
        if alive:
            self._thread.join()
        return bool(done) or not (self._busy or alive)

    def stats(self) -> Stats:
        with self._changed:
            return replace(
                self._stats,
                rows=len(self._running), queued=len(self._waiting), capacity=self.rows,
            )  # fmt: skip

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._running or self._calls)

    def _count(self, **more: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()}
        )

    # in the computing thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()  # `drain` waits for the last row
                self._changed.wait_for(lambda: self._busy or self._gone or self._ended)
                self._idle = False
                if self._ended:
                    break
                gone, self._gone = self._gone, []
                call = self._calls.popleft() if self._calls else None
            for ticket in gone:
                self._leave(ticket)
            if call is not None:
                _answer(*call)
            self._admit()
            if self._running:
                self._step()
        with self._changed:
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for ticket in left:
            self._end(ticket, "failed", Failed(Draining("the server was shut down")))
        for _, future in self._calls:
            future.set_exception(Draining("the server was shut down"))

    def _admit(self) -> None:
        with self._changed:
            free = min(self.rows - len(self._running), len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(free)]
            for ticket in taken:
                ticket.state = "running"
        for options, same in groupby(taken, key=lambda ticket: ticket.job.options):
            tickets = list(same)
            jobs = [ticket.job for ticket in tickets]
            names = self._engine.admit_all(
                [job.prompt for job in jobs], options, [job.number for job in jobs]
            )
            with self._changed:
                self._running |= zip(names, tickets, strict=True)
            for ticket in tickets:
                ticket._admitted = ticket._seconds

    def _step(self) -> None:
        step = self._engine.step()
        self._count(evaluations=1)
        places = zip(step.rows.tolist(), step.nfe.tolist(), step.done.tolist(), strict=True)
        for place, (name, nfe, done) in enumerate(places):
            ticket = self._running.get(name)
            if ticket is None or nfe == ticket._nfe:
                continue
            ticket._nfe = nfe
            start = len(ticket.job.prompt)
            row = self._engine.rows.state[self._engine.rows.state["name"] == name][0]
            final = int(step.lengths[place] if done else row["known"]) - start
            if not ticket._read and not row["prompt"]:
                ticket._read = ticket._seconds
            if final and not ticket._first:
                ticket._first = ticket._seconds
            if ticket.job.progress:
                self._tell(ticket, _progress(step, place, ticket, final))
            if done:
                self._finish(ticket, step, place)

    def _finish(self, ticket: Ticket, step: Step, place: int) -> None:
        job = ticket.job
        done = collect(
            step.of(torch.tensor([place])), [job.prompt], self.model.config.eos_token_id,
            job.options.max_new_tokens, 0.0,
        )  # fmt: skip
        self._leave(ticket)
        stopped = bool(step.rejected[place]) if step.stopped is None else bool(step.stopped[place])
        logprobs = done.path_logprobs[0] if done.path_logprobs and job.options.logprobs else None
        first = ticket._first or ticket._seconds
        event = Finished(
            done.tokens[0], done.nfe[0], stopped, done.finish[0], logprobs, ticket._admitted,
            max(ticket._read - ticket._admitted, 0.0), first, ticket._seconds, 0,
        )  # fmt: skip
        self._count(tokens=len(event.tokens))
        self._end(ticket, "finished", event)

    def _leave(self, ticket: Ticket) -> None:
        """The row is out of the engine."""
        with self._changed:
            names = [name for name, one in self._running.items() if one is ticket]
            for name in names:
                del self._running[name]
        for name in names:
            self._engine.drop(name)

    def _end(self, ticket: Ticket, state: State, event: Event) -> None:
        with self._changed:
            if ticket.state == "cancelled":
                return
            self._count(**{state: 1})
        self._tell(ticket, event)
        ticket.state = state

    def _tell(self, ticket: Ticket, event: Event) -> None:
        """A listener's fault is its own: its row leaves."""
        if ticket.state == "cancelled":
            return
        try:
            ticket._listen(ticket, event)
        except Exception:
            LOG.exception("a listener failed; its row is dropped")
            self.cancel(ticket)


def _answer(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _progress(step: Step, place: int, ticket: Ticket, final: int) -> Progress:
    job = ticket.job
    start = len(job.prompt)
    new = slice(start, start + job.options.max_new_tokens)
    fixed = step.fixed[place, new].numpy()
    edited = None if step.edited is None else step.edited[place, new].numpy()
    at = (fixed if edited is None else fixed | edited).nonzero()[0]
    logprobs = None
    if job.options.logprobs and step.logprobs is not None:
        logprobs = step.logprobs[place, new].numpy()[at].tolist()
    return Progress(
        ticket._nfe, at.tolist(), step.tokens[place, new].numpy()[at].tolist(),
        [] if edited is None else edited.nonzero()[0].tolist(), final, logprobs, ticket._seconds,
    )  # fmt: skip
