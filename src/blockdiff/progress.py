"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then.

Imports nothing heavy, for the command line's sake.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, total: int | None = None, *, every: float = 30.0
) -> Iterator[Item]:
    """Passes `items` on and tells on stderr how many are done.

    A terminal shows a bar, which is gone at the end. Anything else (a log, a pipe) gets a flushed
    line whenever `every` seconds have gone by since the last one, so short work prints nothing.

    Args:
        items: what is worked through.
        description: what the work is, for the bar or line: "Tokenising".
        total: how many items there are; by default `len(items)` where that is known.
        every: seconds between two lines.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        yield from _bar(items, description, total)
    else:
        yield from _lines(items, description, total, every)


def _bar(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.errors import LiveError
    from rich.markup import escape
    from rich.progress import track as bar

    console = Console(file=sys.stderr)
    done = 0
    source = iter(items)
    shown = bar(source, escape(description), total=total, console=console, transient=True)
    try:
        for item in shown:
            done += 1
            yield item
    except LiveError:  # rich shows one live display at a time; the work goes on without a second
        if done:
            raise
        yield from source


def _lines(
    items: Iterable[Item], description: str, total: int | None, every: float
) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            of = f" of {total:,}" if total else ""
            left = ""
            if total and done < total:
                left = f", about {_duration((now - start) * (total - done) / done)} left"
            line = f"{description}: {done:,}{of} after {_duration(now - start)}{left}"
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
