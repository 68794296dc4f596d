"""From the compute thread to the event loop, in bounded memory however slowly a client reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from fastapi import Request
from starlette.types import Receive

from blockdiff.serving.errors import Refused
from blockdiff.serving.jobs import Event, Job, Progress, Ticket
from blockdiff.serving.worker import Worker

# Seconds between two parts of a text: each takes time from the cores that compute.
PAUSE = 0.05


class Inbox:
    """The events of one request's rows.

    Of a row at most `apart` events wait apart from each other; what comes then is joined with the
    last, so that what waits grows with the row's tokens and not with its evaluations. Where
    `apart` is 1, text is what is wanted: tokens that have an unfixed one before them wait for it,
    and text that comes sooner than `PAUSE` after other text waits for more.
    """

    def __init__(self, apart: int = 1) -> None:
        self.apart, self._lock = apart, threading.Lock()
        self._loop, self._there = asyncio.get_running_loop(), asyncio.Event()
        self._events: dict[Ticket, list[Event]] = {}
        self._told: dict[Ticket, tuple[int, float]] = {}  # how much text, and when
        self._woken = False
        self.tickets: list[Ticket] = []
        self.gone = False  # whether the client is

    def listen(self, ticket: Ticket, event: Event) -> None:
        with self._lock:
            mine = self._events.setdefault(ticket, [])
            last = mine[-1] if len(mine) >= self.apart else None
            if isinstance(last, Progress) and isinstance(event, Progress):
                mine[-1] = joined(last, event)
            else:
                mine.append(event)
            if isinstance(event, Progress) and self.apart == 1:
                final, seconds = self._told.get(ticket, (0, -PAUSE))
                if event.final <= final or event.seconds < seconds + PAUSE:
                    return
                self._told[ticket] = event.final, event.seconds
            woken, self._woken = self._woken, True
        if not woken:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._there.set)

    def _take(self) -> dict[Ticket, list[Event]]:
        with self._lock:
            events, self._events, self._woken = self._events, {}, False
        return events

    async def events(self, until: float) -> AsyncIterator[tuple[int, Event]]:
        """The number of each row and what came of it, until all have ended.

        Raises `Refused` at the time `until` of the loop's clock.
        """
        number = {ticket: place for place, ticket in enumerate(self.tickets)}
        left = len(number)
        timer = self._loop.call_at(until, self._there.set)
        try:
            while left and not self.gone:
                await self._there.wait()
                if self._loop.time() >= until:
                    raise Refused(504, "the request took longer than the server allows",
                                  code="timeout")  # fmt: skip
                self._there.clear()
                for ticket, events in self._take().items():
                    for event in events:
                        left -= not isinstance(event, Progress)
                        yield number[ticket], event
        finally:
            timer.cancel()

    def submit(self, worker: Worker, jobs: Sequence[Job], request: Request) -> None:
        """Queues the rows; they are cancelled when the client goes away."""
        self.worker = worker
        self.tickets = worker.submit(jobs, self.listen)
        self._watch = asyncio.create_task(self._watched(request.receive))

    async def _watched(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self.gone = True
        self._there.set()

    def cancel(self) -> None:
        for ticket in self.tickets:
            self.worker.cancel(ticket)

    def close(self) -> None:
        """Cancels what still runs."""
        self._watch.cancel()
        self.cancel()


def joined(one: Progress, two: Progress) -> Progress:
    """Two steps of a row as one; of a position written twice the later token counts."""
    known: list[float] | None = None
    if one.logprobs is not None and two.logprobs is not None:
        known = [*one.logprobs, *two.logprobs]
    return Progress(
        two.nfe, [*one.at, *two.at], [*one.tokens, *two.tokens], [*one.edited, *two.edited],
        two.final, known, two.seconds,
    )  # fmt: skip
