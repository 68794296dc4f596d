"""A file of JSON lines that is written line by line, and goes on where it was stopped.

    with open_job("texts.jsonl") as job:              # checked, locked
        job.begin({"model": "starter"}, ids)          # what makes it: it goes on with the same
        for record in work(skip=job.done):            # the lines there are need not be made again
            job.write([record])

Lines are only ever added, in one order, so that at every moment the file is the beginning of the
one that an uninterrupted job writes. What a kill left half-written is cut off. Beside the file lies
FILE.job, which says what made it.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blockdiff.errors import InputError, RunStopped, first_line
from blockdiff.outputs import (
    file_mode,
    local_path,
    sync_folder,
    to_json,
    try_writing,
    write_failure,
    write_text,
)
from blockdiff.training.signals import Signals, signal_name

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".job"
SYNC_EVERY = 2.0  # seconds: what a machine that loses its power may have to make again
_CHUNK = 2**20


@contextmanager
def open_job(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Job]:
    """The job that writes the file `out`, which is locked until the end of the block.

    While it is open Ctrl-C and SIGTERM are noted, and `Job.write` and `Job.stop` raise
    `RunStopped`. A file that was made here and is still empty at the end is gone again. Raises
    `InputError` where nothing can be written, another process writes to the file, or it holds
    something that no job wrote.
    """
    path = local_path("out", out)
    try:
        if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"`out` {path} is no regular file; name another")
        if not path.parent.is_dir():
            raise InputError(f"`out` {path}: there is no folder {path.parent}; make it first")
        try_writing(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode())
    except OSError as error:
        raise InputError(f"`out` {path} cannot be written: {first_line(error)}") from None
    try:
        _lock(path, handle)
    except InputError:
        os.close(handle)
        raise
    job = Job(path, handle, overwrite)
    try:
        if os.fstat(handle).st_size and not job.note_path.is_file():
            raise InputError(
                f"{path} exists, and there is no {job.note_path.name} beside it that says what "
                "made it; name another file for `out`"
            )
        with job.signals:
            yield job
    finally:
        with suppress(OSError):
            if not os.fstat(handle).st_size and not job.note_path.exists():
                path.unlink()
        os.close(handle)


def _lock(path: Path, handle: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(
            f"another process writes to {path}; wait for its end, or name another file for `out`"
        ) from None
    except OSError:
        pass  # a file system without locks


class Job:
    """A file of JSON lines.

    `done`: lines that are there. `told`: settings that are known before it begins. `kept`: what the
    job is told when it begins, and keeps to when it goes on, however the machine is then.
    """

    def __init__(self, path: Path, handle: int, overwrite: bool) -> None:
        self.path, self.note_path = path, path.with_name(path.name + SUFFIX)
        self.handle, self.overwrite, self.signals = handle, overwrite, Signals()
        self.done = self.size = 0
        self.told: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self._synced = time.monotonic()

    def begin(
        self,
        settings: Mapping[str, Any],
        ids: Iterable[Any],
        *,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        """Goes on with the lines there are, or begins anew.

        `settings`: what makes the lines, as JSON has it. `ids`: of each line its `id`, to see that
        the lines there are the job's. Raises `InputError` where they were made with other settings.
        """
        told = json.loads(to_json({**self.told, **settings}))
        whole = 0 if self.overwrite else self._whole()
        if not whole:
            self._cut(0)
            self.kept = dict(kept or {})
            write_text(self.note_path, to_json({"settings": told, "kept": self.kept}) + "\n")
            return
        before = self._note()
        for name in sorted(told.keys() | before["settings"].keys()):
            was, now = before["settings"].get(name), told.get(name)
            if was != now:
                raise InputError(
                    f"{self.path} was begun with {name} {_shown(was)}, not {_shown(now)}: go on "
                    "with the same, name another file for `out`, or begin anew with `overwrite`"
                )
        self.kept = before["kept"]
        wanted = iter(ids)
        self.size = whole
        for number, record in enumerate(self.records(), start=1):
            if not isinstance(record, dict) or record.get("id") != next(wanted, record):
                raise InputError(
                    f"{self.path}, line {number} is not what this job wrote: put back what was "
                    "there, or begin anew with `overwrite`"
                )
            self.done = number
        self._cut(whole)
        self.stop()

    def records(self) -> Iterator[Any]:
        """The lines there are; None for what is no JSON."""
        left = self.size
        with open(self.path, "rb") as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    return
                try:
                    yield json.loads(line)
                except ValueError:
                    yield None

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines.

        Raises `InputError` where the disk takes no more, with the whole lines before kept, and
        `RunStopped` once a signal came.
        """
        lines = [to_json(one) + "\n" for one in records]
        data = memoryview("".join(lines).encode())
        try:
            at = self.size
            while data:
                taken = os.pwrite(self.handle, data, at)
                data, at = data[taken:], at + taken
            if time.monotonic() - self._synced > SYNC_EVERY:
                self.sync()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.handle, self.size)
            raise self._failed(error) from None
        self.size, self.done = at, self.done + len(lines)
        self.stop()

    def stop(self) -> None:
        """Raises `RunStopped` once a signal came."""
        if number := self.signals.received:
            self.sync()
            raise RunStopped(
                f"stopped by {signal_name(number)} after {self.done:,} lines; the same command "
                "goes on",
                exit_code=128 + number,
            )

    def sync(self) -> None:
        """Brings what is written to the disk."""
        try:
            os.fsync(self.handle)
        except OSError as error:
            raise self._failed(error) from None
        self._synced = time.monotonic()

    def _failed(self, error: OSError) -> InputError:
        error.filename = error.filename or str(self.path)
        what = write_failure(error) or first_line(error)
        return InputError(f"{what}; {self.done:,} lines are there, the same command goes on")

    def _note(self) -> dict[str, Any]:
        try:
            found = json.loads(self.note_path.read_text(encoding="utf-8"))
            if isinstance(found["settings"], dict) and isinstance(found["kept"], dict):
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise InputError(
            f"{self.note_path} is not what a job wrote: put it back, or begin anew with `overwrite`"
        )

    def _whole(self) -> int:
        """Where the last whole line ends."""
        at = os.fstat(self.handle).st_size
        while at:
            begin = max(0, at - _CHUNK)
            found = os.pread(self.handle, at - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            at = begin
        return 0

    def _cut(self, size: int) -> None:
        os.ftruncate(self.handle, size)
        os.fsync(self.handle)
        sync_folder(self.path.parent)
        self.size = size


def _shown(value: Any) -> str:
    text = "nothing" if value is None else to_json(value)
    return text if len(text) <= 60 else text[:57] + "..."
