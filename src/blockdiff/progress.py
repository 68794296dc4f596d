"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then.

Imports nothing heavy, for the command line's sake.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from blockdiff.printing import printable

Item = TypeVar("Item")


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    every: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Passes `items` on and tells on stderr how many are done.

    A terminal shows a bar, which is gone at the end. Anything else (a log, a pipe) gets a flushed
    line whenever `every` seconds have gone by since the last one, so short work prints nothing.

    Args:
        items: what is worked through.
        description: what the work is, for the bar or line: "Tokenising".
        total: how many items there are; by default `len(items)` where that is known.
        every: seconds between two lines.
        clock: seconds, for tests.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with advance(description, total, every=every, clock=clock) as done:
        for item in items:
            yield item
            done(1)


@contextmanager
def advance(
    description: str,
    total: int | None = None,
    unit: str = "",
    *,
    speed: Callable[[], str] | None = None,
    every: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Like `track`, for work that reports itself: gives what is called with how much more is done.

    `unit`: what is counted, for the line: "sequences". `speed`: what is shown behind the count,
    "300 tokens/s", asked anew each time.
    """
    description = printable(description).replace("\n", "␊")  # one line, whatever a name holds
    if sys.stderr.isatty():
        with _bar(description, total, speed) as done:
            yield done
    else:
        yield _Lines(description, total, unit, every, clock, speed).more


@contextmanager
def _bar(
    description: str, total: int | None, speed: Callable[[], str] | None
) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.completed:,.0f}", markup=False), TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    try:
        bar.start()
    except LiveError:  # rich shows one live display at a time; the work goes on without a second
        yield lambda more: None
        return
    task = bar.add_task(description, total=total, speed="")
    try:
        yield lambda more: bar.update(task, advance=more, speed=speed() if speed else "")
    finally:
        bar.stop()


class _Lines:
    """A line now and then."""

    def __init__(
        self, description: str, total: int | None, unit: str, every: float,
        clock: Callable[[], float], speed: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        self.speed = speed
        self.description, self.total, self.every, self.clock = description, total, every, clock
        self.unit = f" {unit}" if unit else ""
        self.begin = self.last = clock()
        self.done = 0

    def more(self, done: int) -> None:
        self.done += done
        now = self.clock()
        if now - self.last < self.every:
            return
        self.last = now
        of = left = ""
        if self.total is not None:
            of = f" of {self.total:,}"
            if 0 < self.done < self.total:
                seconds = (now - self.begin) * (self.total - self.done) / self.done
                left = f", about {_duration(seconds)} left"
        far = f"{self.done:,}{of}{self.unit} after {_duration(now - self.begin)}"
        fast = f", {self.speed()}" if self.speed else ""
        line = f"{self.description}: {far}{left}{fast}"
        print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
