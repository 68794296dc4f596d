"""One thread computes; rows come, go and are told about between evaluations.

    worker = Worker(model)
    worker.start()
    tickets = worker.submit([Job([1, 2, 3], SamplingOptions())], lambda ticket, event: ...)

Rows of all callers share an engine: each `step` is one network evaluation of all of them. A row's
tokens depend on its prompt, options and number only (in float32), so that a row may be run again
from its prompt and comes to the same place.

That is how a failure is kept apart. Where an evaluation raises, nothing is known of the engine any
more: its rows are admitted to two new ones, half and half, and run again from their prompts, and
what was told of them before is not told again. A half that raises is halved in its turn, and a row
that raises alone in its engine fails. So the rows that fail are those that raise by themselves, and
the others go on, in fewer rows an evaluation until they are finished. Below float32 a row that was
run again may differ from what was told of it; `Finished` has its tokens as they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import count, groupby
from typing import Any, TypeVar

import psutil
import torch

from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser
from blockdiff.registry import ORDERS
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.fitting import check_options, check_prompt
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step
from blockdiff.serving.jobs import (
    Draining,
    Event,
    Failed,
    Finished,
    Full,
    Job,
    Listen,
    Progress,
    Stats,
    Ticket,
)

T = TypeVar("T")
_LOG = logging.getLogger("blockdiff.serving")
MOST_ROWS = 128  # what free memory never raises the rows over


class _Batch:
    """An engine and the rows in it."""

    def __init__(self, model: Denoiser) -> None:
        self.engine = Engine(model)
        self.rows: dict[int, Ticket] = {}

    def admit(self, tickets: Sequence[Ticket]) -> None:
        for _, same in groupby(tickets, key=lambda one: _Same(one.job.options)):
            members = list(same)
            prompts, numbers = zip(*((t.job.prompt, t.job.number) for t in members), strict=True)
            names = self.engine.admit_all(prompts, members[0].job.options, numbers)
            self.rows |= dict(zip(names, members, strict=True))

    def drop(self, name: int) -> None:
        del self.rows[name]
        self.engine.drop(name)

    def leave(self, tickets: Collection[Ticket]) -> None:
        for name in [name for name, ticket in self.rows.items() if ticket in tickets]:
            self.drop(name)


class _Same:
    """Options that are compared and not hashed."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.options == other.options


class Worker:
    """The thread that owns a model."""

    def __init__(self, model: Denoiser, *, rows: int | None = None, queue: int = 256) -> None:
        """`rows`: at most so many at once; None: as free memory has room for. `queue`: wait."""
        self.model, self.queue = model, queue
        self.capacity = rows_by_memory(model) if rows is None else rows
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._leaving: set[Ticket] = set()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._batches: list[_Batch] = []  # the first takes new rows
        self._running = 0
        self._draining = self._over = False
        self._ids = count(1)
        self._stats = Stats(self.capacity)
        self._thread = threading.Thread(target=self._run, name="blockdiff-worker", daemon=True)

    def start(self) -> None:
        self.model.eval()
        self._thread.start()

    def submit(self, jobs: Sequence[Job], listen: Listen) -> list[Ticket]:
        """Queues all of the jobs, or none; `listen` is called in the compute thread.

        Raises `InputError` for what does not fit the model, `Full` or `Draining`.
        """
        config = self.model.config
        for job in jobs:
            check_options(config, job.options, ORDERS.find(job.options.sampler, "sampler"))
            check_prompt(config, job.prompt, job.options)
        with self._wake:
            if self._draining:
                raise Draining("the server is stopping")
            room = self.queue + max(self.capacity - self._running, 0)
            if len(self._waiting) + len(jobs) > room:
                raise Full(f"{len(self._waiting)} rows wait already")
            tickets = [Ticket(job, next(self._ids), listen) for job in jobs]
            self._waiting.extend(tickets)
            self._wake.notify_all()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """The row leaves before the next evaluation and is told of no more."""
        with self._wake:
            if ticket.state not in ("queued", "running"):
                return
            if ticket.state == "queued":
                with suppress(ValueError):  # `drain` has it
                    self._waiting.remove(ticket)
            else:
                self._leaving.add(ticket)
                self._wake.notify_all()
            ticket.state = "cancelled"
            self._stats.cancelled += 1

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Other work of the model, done in the compute thread between two evaluations."""
        future: Future[T] = Future()
        with self._wake:
            if self._draining:
                raise Draining("the server is stopping")
            if len(self._calls) >= self.queue:
                raise Full(f"{len(self._calls)} calls wait already")
            self._calls.append((future, work))
            self._wake.notify_all()
        return future

    def drain(self, seconds: float) -> bool:
        """Takes no more rows; those running finish within the limit, and the thread ends.

        What waits, or is not finished by then, fails with `Draining`. Returns whether all that ran
        was finished.
        """
        until = time.monotonic() + seconds
        with self._wake:
            self._draining = True
            waiting, self._waiting = list(self._waiting), deque()
            self._wake.notify_all()
        self._fail(waiting, Draining("the server is stopping"))
        with self._wake:
            while self._running or self._calls:
                if (left := until - time.monotonic()) <= 0:
                    break
                self._wake.wait(left)
            done = not self._running
            self._over = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(max(seconds, 5.0))
        return done

    @property
    def draining(self) -> bool:
        return self._draining

    def stats(self) -> Stats:
        with self._wake:
            return replace(self._stats, rows=self._running, queued=len(self._waiting))

    # What follows runs in the compute thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:  # a mistake here: better no server than one that never answers
            _LOG.exception("the compute thread ended")
        with self._wake:
            self._draining = self._over = True
            calls, waiting = list(self._calls), list(self._waiting)
            self._calls.clear()
            self._waiting.clear()
        for future, _ in calls:
            future.set_exception(Draining("the server is stopping"))
        rest = [ticket for batch in self._batches for ticket in batch.rows.values()]
        rest = [*waiting, *(ticket for ticket in rest if ticket.state == "running")]
        self._fail(rest, Draining("the server stopped before the text was finished"))
        with self._wake:
            self._batches, self._running = [], 0
            self._wake.notify_all()

    def _turn(self) -> bool:
        """Lets rows leave and come, and evaluates each engine once; False at the end of it all."""
        with self._wake:
            while not (self._waiting or self._calls or self._batches or self._over):
                self._wake.wait()
            if self._over:
                return False
            leaving, self._leaving = self._leaving, set()
            call = self._calls.popleft() if self._calls else None
        begin = time.monotonic()
        if call is not None:
            _answer(*call)
        for batch in list(self._batches):
            self._guarded(batch, batch.leave, leaving)
        self._batches = [batch for batch in self._batches if batch.rows]
        room = max(self.capacity - sum(len(batch.rows) for batch in self._batches), 0)
        with self._wake:
            new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            for ticket in new:
                ticket.state, ticket.wait = "running", time.monotonic() - ticket.submitted
        if new:
            if not self._batches:
                self._batches.append(_Batch(self.model))
            first = self._batches[0]
            self._guarded(first, first.admit, new, new)
        for batch in list(self._batches):
            self._guarded(batch, self._step, batch)
        with self._wake:
            self._batches = [batch for batch in self._batches if batch.rows]
            self._running = sum(len(batch.rows) for batch in self._batches)
            self._stats.busy += time.monotonic() - begin
            self._wake.notify_all()
        return True

    def _guarded(
        self, batch: _Batch, work: Callable[[Any], None], on: Any, new: Sequence[Ticket] = ()
    ) -> None:
        """Does something with an engine; its rows and the `new` are set apart where it raises."""
        before = list(batch.rows.values())
        try:
            work(on)
        except Exception as error:
            self._batches.remove(batch)
            members = [ticket for ticket in [*before, *new] if ticket.state == "running"]
            self._apart(members, error)

    def _step(self, batch: _Batch) -> None:
        step = batch.engine.step()
        self._stats.evaluations += 1
        self._tell(batch, step)

    def _apart(self, tickets: list[Ticket], error: Exception) -> None:
        """The rows of an engine that raised, half and half in new ones; one that is alone fails."""
        if len(tickets) < 2:
            if not isinstance(error, InputError):
                _LOG.error("a row failed", exc_info=error)
            self._fail(tickets, error)
            return
        middle = len(tickets) // 2
        for half in (tickets[:middle], tickets[middle:]):
            batch = _Batch(self.model)
            try:
                batch.admit(half)
            except Exception as again:
                self._apart(half, again)
            else:
                self._batches.append(batch)

    def _fail(self, tickets: Iterable[Ticket], error: BaseException) -> None:
        for ticket in tickets:
            self._say(ticket, Failed(error))

    def _tell(self, batch: _Batch, step: Step) -> None:
        now, mask = time.monotonic(), self.model.config.mask_token_id
        nfe, lengths = step.nfe.tolist(), step.lengths.tolist()
        for place, name in enumerate(step.rows.tolist()):
            ticket = batch.rows[name]
            if lengths[place] < 0 and nfe[place] <= ticket.told:
                continue  # nothing new, or run again
            self._stats.row_evaluations += max(nfe[place] - ticket.told, 0)
            start, seconds = len(ticket.job.prompt), now - ticket.submitted
            over = None if step.edited is None else step.edited[place]
            at = (step.fixed[place] if over is None else step.fixed[place] | over).nonzero()[:, 0]
            if len(at) and nfe[place] > ticket.told:
                edited = [] if over is None else over.nonzero()[:, 0].tolist()
                asked = ticket.job.options.logprobs and step.logprobs is not None
                self._say(ticket, Progress(
                    nfe[place], (at - start).tolist(), step.tokens[place, at].tolist(),
                    [one - start for one in edited],
                    len(step.final(place, start, mask)),
                    step.logprobs[place, at].tolist() if asked else None,  # type: ignore[index]
                    seconds,
                ))  # fmt: skip
                self._stats.tokens += len(at) - len(edited)
            ticket.told = max(ticket.told, nfe[place])
            if lengths[place] < 0:
                continue
            tokens, options = (
                step.tokens[place, start : lengths[place]].tolist(),
                ticket.job.options,
            )
            stopped = len(tokens) < options.max_new_tokens or (
                step.stopped is not None and bool(step.stopped[place])
            )
            stopped |= bool(tokens) and tokens[-1] == self.model.config.eos_token_id
            logprobs = None
            if options.logprobs and step.logprobs is not None:
                logprobs = step.logprobs[place, start : lengths[place]].tolist()
            batch.drop(name)
            self._say(ticket, Finished(tokens, nfe[place], stopped, logprobs, ticket.wait, seconds))

    def _say(self, ticket: Ticket, event: Event) -> None:
        with self._wake:
            if ticket.state == "cancelled":
                return
            if isinstance(event, Finished):
                ticket.state = "finished"
                self._stats.finished += 1
            elif isinstance(event, Failed):
                ticket.state = "failed"
                self._stats.failed += 1
        try:
            ticket.listen(ticket, event)
        except Exception:
            _LOG.exception("a listener failed")


def _answer(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        with torch.inference_mode():
            future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def rows_by_memory(model: Denoiser) -> int:
    """How many rows of a full context half of the free memory has room for, 1 to `MOST_ROWS`."""
    config, device = model.config, model.device
    size = torch.empty(0, dtype=model.dtype).element_size()
    cache = 2 * config.num_hidden_layers * config.length * config.hidden_size * size
    logits = 4 * config.sampling_blocks(None)[0] * config.vocab_size * 4
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(min(max(free // 2 // (cache + logits), 1), MOST_ROWS))
