"""Many lines on many machines: Ray Data gives them to workers, each with a model of its own.

    lines → units → an actor pool: one `many.Task` a worker → records, in the order of the lines

The caller's process looks at all lines, writes the file (`jobs`) and computes nothing. What is
written is what one process writes, so a job that one has begun the other may finish. A worker that
dies is started again by Ray, and its unit is worked on anew.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from blockdiff.data.lines import Line
from blockdiff.errors import InputError, first_line, need
from blockdiff.many import Record, Task
from blockdiff.plugins import load_plugin, loaded_plugins

# What changes where things are found or how fast they are, and a worker has to know.
_ENVIRONMENT = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "BLOCKDIFF_CACHE")

Make = Callable[..., Task]  # (device=…) → the task, its model opened


class _Worker:
    """What Ray starts on a machine."""

    def __init__(self, make: Make, device: str, kept: Record, plugins: list[str]) -> None:
        for name in plugins:
            load_plugin(name)
        self.task = make(device=device)
        self.task.keep(kept)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        # Text both ways: what a line holds, of whatever types, is nobody's business in between.
        units = [[Line(*line) for line in json.loads(lines)] for lines in batch["lines"]]
        return {"records": [json.dumps(list(self.task.records(lines))) for lines in units]}


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Ray as `join` gives it, which a Ray started here leaves at the end of the block."""
    ray, started = join(address)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def join(address: str | None) -> tuple[Any, bool]:
    """(Ray, whether it was not joined before): a cluster's, or one started on this machine.

    `address`: of a cluster's head; else the variable RAY_ADDRESS, else this machine. Raises
    `InputError` where Ray is not installed, or nobody answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which asks a host
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of what Ray mends by itself
    ray: Any = need("ray", "ray.data", extra="ray", what="work on several machines")
    started = not ray.is_initialized()
    if started:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        known = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        more = {"include_dashboard": False} if address == "local" else {}
        try:
            with _hushed():
                ray.init(
                    address, log_to_driver=False, logging_level=logging.ERROR,
                    runtime_env={"env_vars": known}, **more,
                )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"`address` {address}: no Ray cluster to join there: {first_line(error)}"
            ) from None
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray, started


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what Ray's native part says of itself on standard error; its errors are raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def share_of(ray: Any, workers: int | None, device: str) -> tuple[int, Record]:
    """(how many workers, what each takes of the cluster).

    One for each GPU where there are GPUs and `device` does not refuse them, else one. Raises
    `InputError` for more than there is room for.
    """
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), max(1, int(there.get("CPU", 1)))
    on_gpus = device.startswith("cuda") or (device == "auto" and gpus > 0)
    room, what = (gpus, "GPUs") if on_gpus else (cpus, "processors")
    wanted = (max(1, gpus) if on_gpus else 1) if workers is None else workers
    if wanted > room:
        raise InputError(f"`workers` is {wanted}, and the cluster has {room} {what}")
    return wanted, {"num_gpus": 1} if on_gpus else {"num_cpus": cpus // wanted}


def over_workers(
    ray: Any,
    make: Make,
    task: Task,
    kept: Record,
    lines: Iterator[Line],
    *,
    workers: int | None,
    device: str,
) -> Iterator[Record]:
    """The lines' records in their order, made by `workers` models.

    `make` opens one on a worker's machine; `task` is the caller's own, whose model goes; `kept`:
    see `Task.keep`. Raises `InputError` for what one of them raises.
    """
    from ray.data import ActorPoolStrategy, DataContext, from_items

    count, takes = share_of(ray, workers, device)
    task.model = None
    waiting = [[line.id, line.number, line.where, line.row] for line in lines]
    units = [
        {"lines": json.dumps(waiting[at : at + task.unit])}
        for at in range(0, len(waiting), task.unit)
    ]
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    on = "cuda" if "num_gpus" in takes else "cpu"
    made = from_items(units, override_num_blocks=len(units)).map_batches(
        _Worker, batch_size=1, compute=ActorPoolStrategy(size=count),
        fn_constructor_args=(make, on, kept, loaded_plugins()), **takes,
    )  # fmt: skip
    try:
        for row in made.iter_rows():
            yield from json.loads(row["records"])
    except ray.exceptions.RayError as error:
        raise _said(error) from None


def _said(error: BaseException) -> InputError:
    """What a worker raised, as if it had been here."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        if isinstance(found, InputError):
            return InputError(str(found))
        seen.append(found)
        found = getattr(found, "cause", None) or found.__cause__
    return InputError(f"a worker failed: {' '.join(str(seen[-1]).split())[-400:]}")
