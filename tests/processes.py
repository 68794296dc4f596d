"""New processes that need not import torch and transformers anew, 5 seconds of a processor each.

A server, started once a session, has imported them and done nothing else; each process is forked
from it. It has the environment, folder and streams it is given, as a command's own process has.
"""

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from socket import socket
from typing import Any

from blockdiff import cli

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["blockdiff.training.run", "blockdiff.cli", "blockdiff.plots", "blockdiff.apps.benchmark.works"]
)


def started(
    streams: Path,
    words: Sequence[str],
    before: Callable[[], object] | None = None,
    run: Callable[[Sequence[str]], object] = cli.main,
    **environment: str,
) -> Any:
    """A process that calls `before()`, then `run(words)`: `blockdiff words`.

    What it prints goes to the files `stdout` and `stderr` in the folder `streams`.
    """  # fmt: skip
    streams.mkdir(exist_ok=True)
    own = dict(os.environ) | environment
    process = CONTEXT.Process(target=_child, args=(streams, list(words), before, run, own))
    process.start()
    return process


def _child(
    streams: Path, words: Sequence[str], before: Callable[[], object] | None,
    run: Callable[[Sequence[str]], object], environment: Mapping[str, str],
) -> None:  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(streams / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    if before is not None:
        before()
    run(words)


def ended(process: Any, streams: Path) -> "subprocess.CompletedProcess[str]":
    """Waits for a process; its exit code (−n for signal n) and what it printed."""
    process.join(600)
    assert process.exitcode is not None, "does not end"
    out, err = ((streams / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([], process.exitcode, out, err)


def command(
    streams: Path, words: Sequence[str], before: Callable[[], object] | None = None
) -> "subprocess.CompletedProcess[str]":
    """`blockdiff words` in a process of its own, to its end."""
    return ended(started(streams, words, before), streams)


def pair(
    streams: Path, words: Sequence[str], run: Callable[[Sequence[str]], object] = cli.main
) -> "list[subprocess.CompletedProcess[str]]":
    """Two processes that find each other as torchrun's do, by what it puts in the environment."""
    streams.mkdir(exist_ok=True)
    with socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    folders = [streams / str(rank) for rank in range(2)]
    both = [
        started(folder, words, run=run, RANK=folder.name, LOCAL_RANK=folder.name, **places)
        for folder in folders
    ]
    return [ended(process, folder) for process, folder in zip(both, folders, strict=True)]
