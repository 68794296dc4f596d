"""One thread that computes for many: rows come and go between the evaluations of one engine.

    submit → queue → admitted between two evaluations → Progress … → Finished

A row's random numbers are its own (its seed, its number), so in float32 its tokens are the same
whatever else runs; it takes part from the evaluation after it was admitted, and leaves with the one
that finishes it, or before the next one where it is cancelled.

What goes wrong ends as few rows as can be told apart. An order, a rule, a processor or a constraint
that raises, or whose answer is wrong, ends its own row (`sampling.apart`): the others have the
tokens they would have had. Where an evaluation itself fails, memory runs out say, nothing the
engine holds is trusted any more: it is made anew, and its rows begin again, half as many at a time
until all goes well; one that fails alone ends. In float32 a row that begins again writes the same
tokens, and what its listener knows of is not told twice. In other precisions a row of which
something was told ends as `Interrupted`.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count, groupby
from typing import Any, TypeVar

import torch

from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.fitting import fitted
from blockdiff.sampling.prefill import Prefixes
from blockdiff.sampling.step import Step
from blockdiff.serving.jobs import (
    Draining,
    Event,
    Failed,
    Finished,
    Full,
    Interrupted,
    Job,
    Listen,
    Progress,
    State,
    Stats,
    Ticket,
    answer,
)
from blockdiff.serving.room import Room, need_of

__all__ = [
    "Draining", "Event", "Failed", "Finished", "Full", "Interrupted", "Job", "Listen", "Progress",
    "State", "Stats", "Ticket", "Worker",
]  # fmt: skip

T = TypeVar("T")
LOG = logging.getLogger("blockdiff.serving")
# New prompts that are read before the rows that run go on, in tokens.
PROMPTS = 4096


class Worker:
    """Owns the engine of a model; all of its methods may be called from any thread.

    Example:
        >>> import queue, blockdiff
        >>> from blockdiff.serving.worker import Job, Worker
        >>> model, tokenizer = blockdiff.load("starter")
        >>> worker, events = Worker(model), queue.Queue()
        >>> worker.start()
        >>> job = Job([1, 2, 3], blockdiff.SamplingOptions(max_new_tokens=4), progress=False)
        >>> (ticket,) = worker.submit([job], lambda ticket, event: events.put(event))
        >>> finished = events.get()
        >>> [finished.tokens] == blockdiff.generate(model, [[1, 2, 3]], max_new_tokens=4).tokens
        True
        >>> worker.drain(1)
        True
    """

    def __init__(
        self,
        model: Denoiser,
        *,
        rows: int | None = None,
        queue: int = 256,
        memory: int | None = None,
    ) -> None:
        """`rows`: how many are written side by side; as `room` tells where it is left out.

        `queue`: how many more may wait. `memory`: bytes for rows and for beginnings that are known;
        by default a share of what is free.
        """
        model.eval()
        self.model, self.queue = model, queue
        self.room = Room.of(model, rows, memory)
        self.rows = self.room.rows
        self._engine = self._make()
        self._most = self.rows  # fewer after an evaluation failed, until rows finish again
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # by the engine's names
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._gone: list[Ticket] = []  # cancelled while they ran
        self._draining = self._ended = self._idle = False
        self._ids = count()
        self._stats = Stats(self.rows)
        self._thread = threading.Thread(target=self._run, name="blockdiff-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job], listen: Listen) -> list[Ticket]:
        """Queues all jobs or none; `listen(ticket, event)` is called in the computing thread.

        Raises `InputError` for what does not fit the model, `Full` and `Draining`.
        """
        needs = []
        for job in jobs:
            fitted(self.model.config, [job.prompt], job.options, [job.number])
            needs.append(need_of(self.model, len(job.prompt), job.options))
        with self._changed:
            if self._draining:
                raise Draining("the server is stopping")
            busy = len(self._waiting) + len(self._running)
            if busy + len(jobs) > self.rows + self.queue:
                raise Full(f"{len(self._waiting)} rows wait already")
            tickets = [
                Ticket(job, next(self._ids), one, listen)
                for job, one in zip(jobs, needs, strict=True)
            ]
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
            if self._draining:
                raise Draining("the server is stopping")
            if len(self._calls) >= max(self.queue, 1):
                raise Full(f"{len(self._calls)} calls wait already")
            self._calls.append((work, future))
            self._changed.notify_all()
        return future

    def drain(self, seconds: float) -> bool:
        """Takes no more jobs; what runs finishes within the time, and the thread ends.

        What waits, or is not finished by then, fails with `Draining`. Whether all that ran was
        finished.
        """
        with self._changed:
            self._draining = True
            alive = self._thread.is_alive()
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._idle and not self._busy, seconds * alive)
            self._ended = True
            self._changed.notify_all()
        if alive:
            self._thread.join()
        else:
            self._give_up("the server is stopping")
        return bool(done) or not alive

    @property
    def draining(self) -> bool:
        return self._draining

    def stats(self) -> Stats:
        with self._changed:
            prefixes = self._engine.prefixes
            return replace(
                self._stats, rows=len(self._running), queued=len(self._waiting),
                prefix_bytes=0 if prefixes is None else prefixes.held,
            )  # fmt: skip

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._running or self._calls)

    def _count(self, **more: float) -> None:
        with self._changed:
            now = {name: getattr(self._stats, name) + n for name, n in more.items()}
            self._stats = replace(self._stats, **now)

    # in the computing thread

    def _make(self) -> Engine:
        engine = Engine(
            self.model, isolate=True, prefixes=Prefixes(self.model.config, self.room.prefixes)
        )
        engine.cache.most = self.room.cache // self.room.token
        return engine

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
                stranded = []
                if self._draining:  # those that ran may wait to begin again
                    stranded = [ticket for ticket in self._waiting if not ticket.admitted]
                    self._waiting = deque(one for one in self._waiting if one.admitted)
            begin = time.perf_counter()
            for ticket in stranded:
                self._end(ticket, "failed", Failed(Draining("the server is stopping")))
            if call is not None:
                answer(*call)
            try:
                for ticket in gone:
                    self._leave(ticket)
                self._admit()
                if self._engine.active:
                    self._report(self._engine.step())
            except BaseException as error:
                try:
                    self._begin_again(error)
                except BaseException:  # of a device that is lost, say
                    LOG.critical("no evaluation can follow; the worker ends", exc_info=True)
                    with self._changed:
                        self._draining = self._ended = True
            self._count(busy=time.perf_counter() - begin)
        self._give_up("the server stopped before the text was finished")

    def _give_up(self, message: str) -> None:
        with self._changed:
            tickets, calls = [*self._running.values(), *self._waiting], list(self._calls)
            self._running.clear()
            self._waiting.clear()
            self._calls.clear()
        for ticket in tickets:
            self._end(ticket, "failed", Failed(Draining(message)))
        for _, future in calls:
            future.set_exception(Draining(message))

    def _admit(self) -> None:
        """Takes from the queue, in its order, what there is room for."""
        taken: list[Ticket] = []
        with self._changed:
            needs = [ticket.need for ticket in self._running.values()]
            prompts = 0
            while self._waiting and len(needs) < self._most:
                first = self._waiting[0]
                prompts += len(first.job.prompt)
                if (taken and prompts > PROMPTS) or not (
                    self.room.fits([*needs, first.need]) or not needs
                ):
                    break
                needs.append(first.need)
                taken.append(self._waiting.popleft())
                first.state = "running"
        for _, same in groupby(taken, key=lambda ticket: id(ticket.job.options)):
            tickets = list(same)
            jobs = [ticket.job for ticket in tickets]
            try:
                names = self._engine.admit_all(
                    [job.prompt for job in jobs], jobs[0].options, [job.number for job in jobs]
                )
            except Exception as error:  # a constraint that cannot begin, say
                for ticket in tickets:
                    self._end(ticket, "failed", Failed(error))
                continue
            with self._changed:
                self._running |= zip(names, tickets, strict=True)
            for ticket in tickets:
                ticket.admitted = ticket.admitted or ticket.seconds

    def _report(self, step: Step) -> None:
        """Tells the rows of an evaluation what it did."""
        state = self._engine.rows.state
        state = state[state["name"] >= 0]  # as they stand in the step
        places = zip(step.rows.tolist(), step.nfe.tolist(), step.done.tolist(), strict=True)
        more, ended = Counter[str](evaluations=1), []
        for place, (name, nfe, done) in enumerate(places):
            ticket = self._running.get(name)
            if ticket is None or nfe == ticket.nfe or name in self._engine.failed:
                continue
            row, prompt = state[place], len(ticket.job.prompt)
            final = int(step.lengths[place] if done else row["known"]) - prompt
            more["row_evaluations"] += nfe - ticket.nfe
            more["tokens"] += max(final - ticket.final, 0)
            ticket.nfe, ticket.final = nfe, max(final, ticket.final)
            if not ticket.read and not row["prompt"]:
                ticket.read = ticket.seconds
                more["prompt_tokens"] += prompt
                more["cached_tokens"] += int(row["cached"])
            if final and not ticket.first:
                ticket.first = ticket.seconds
            if ticket.job.progress:
                self._progress(ticket, step, place, final)
            if done:
                ended.append((ticket, place, int(row["cached"])))
        self._count(**more)  # before any listener hears of an end
        for ticket, place, cached in ended:
            self._finish(ticket, step, place, cached)
        for name, error in list(self._engine.failed.items()):
            ticket = self._running.get(name)
            if ticket is not None:
                LOG.warning("a text could not be finished: %s", error)
                self._leave(ticket)
                self._end(ticket, "failed", Failed(error))

    def _progress(self, ticket: Ticket, step: Step, place: int, final: int) -> None:
        event = Progress.of(ticket, step, place, final)
        if not event.at:
            return
        if ticket.again:  # its listener knows of it, since before it began again
            ticket.again -= 1
            return
        ticket.told += 1
        self._tell(ticket, event)

    def _finish(self, ticket: Ticket, step: Step, place: int, cached: int) -> None:
        event = Finished.of(ticket, step, place, self.model.config.eos_token_id, cached)
        self._leave(ticket)
        self._most = min(2 * self._most, self.rows)
        self._end(ticket, "finished", event)

    def _begin_again(self, error: BaseException) -> None:
        """After an evaluation failed: a new engine, and its rows at the head of the queue."""
        LOG.error("an evaluation of %d rows failed", len(self._running), exc_info=error)
        self._engine = self._make()
        error.__traceback__ = None  # which holds the old engine
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        with self._changed:
            tickets = [one for one in self._running.values() if one.state == "running"]
            self._running.clear()
            self._gone.clear()
        self._most = max(len(tickets) // 2, 1)
        back = []
        for ticket in tickets:
            if len(tickets) == 1:
                self._end(ticket, "failed", Failed(error))
            elif ticket.told and self.model.dtype != torch.float32:
                self._end(ticket, "failed", Failed(Interrupted("its evaluation failed; ask again")))
            else:
                ticket.nfe, ticket.read, ticket.again = 0, 0.0, ticket.told
                back.append(ticket)
        with self._changed:
            back = [ticket for ticket in back if ticket.state == "running"]
            for ticket in back:
                ticket.state = "queued"
            self._waiting.extendleft(reversed(back))
        self._count(restarted=len(back))

    def _leave(self, ticket: Ticket) -> None:
        """The row is out of the engine."""
        for name in [name for name, one in self._running.items() if one is ticket]:
            with self._changed:
                del self._running[name]
            self._engine.drop(name)

    def _end(self, ticket: Ticket, state: State, event: Event) -> None:
        with self._changed:
            if ticket.state == "cancelled":
                return
            ticket.state = state  # before its listener hears of it, who may cancel at once
            self._count(**{state: 1})
        self._tell(ticket, event)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        """A listener's fault is its own: its row leaves."""
        if ticket.state == "cancelled":
            return
        try:
            ticket.listen(ticket, event)
        except Exception:
            LOG.exception("a listener failed; its row is dropped")
            self.cancel(ticket)
