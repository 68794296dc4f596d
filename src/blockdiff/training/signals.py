"""SIGTERM and Ctrl-C in a run: the step is finished, a checkpoint written, and then it ends."""

from __future__ import annotations

import shlex
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from blockdiff.errors import RunStopped

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """While entered, notes the first SIGINT or SIGTERM; a second acts at once, as ever.

    `received`: its number, 0 before there is one. Only the main thread can catch signals; elsewhere
    this does nothing.
    """

    received = 0

    def __enter__(self) -> Signals:
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self.note) for number in _CAUGHT}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """What is done about the first one."""
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()


def signal_name(number: int) -> str:
    """What a user knows the signal as: Ctrl-C, SIGTERM."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def stopped_by(number: int, out: str, step: int) -> RunStopped:
    """What a run ended by a signal says: how to go on. The exit code is a shell's, 128 + number."""
    return RunStopped(
        f"stopped by {signal_name(number)} after step {step}, with a checkpoint of it; continue "
        f"with: blockdiff train --resume --out {shlex.quote(out)}",
        exit_code=128 + number,
    )
