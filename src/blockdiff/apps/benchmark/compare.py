"""Timing alternatives fairly: A B A B … in one run, medians, and ratios pair by pair.

Each alternative lives in a process of its own, so that its peak memory is its own and what one
does to the allocator, the threads or the caches of torch is not done to the others. They run one
at a time. What the machine can do is measured in the same run, so that a figure can be read as a
share of it.
"""

from __future__ import annotations

import math
import multiprocessing
import platform
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from blockdiff.allocator import keep_freed_memory
from blockdiff.errors import InputError
from blockdiff.progress import advance

# Seconds a repeat lasts at least.
SHORTEST = 0.5
# New processes know nothing of this one.
START = multiprocessing.get_context("spawn")

# What a worker runs: called again and again, it may return what it counted (tokens, evaluations).
Run = Callable[[], dict[str, float] | None]


@dataclass(frozen=True)
class Work:
    """One alternative: `make(*arguments)`, called in its process, gives what is timed.

    `tuned`: whether its process keeps freed memory, as ours do; other people's code does not.
    """

    make: Callable[..., Run]
    arguments: tuple[Any, ...] = ()
    tuned: bool = True


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine: matrix products in GFLOP/s, memory in GB/s."""

    processor: str
    threads: int
    float32_gflops: float
    bf16_gflops: float
    read_gb_per_s: float
    copy_gb_per_s: float


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat; `peak_bytes`: of the process (on CUDA of its tensors), if known.

    `counts`: what the last repeat counted.
    """

    name: str
    seconds: list[float]
    peak_bytes: int | None = None
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def per_token(self) -> list[float]:
        """Seconds per token of each repeat, where tokens were counted; otherwise seconds."""
        return [seconds / self.counts.get("tokens", 1) for seconds in self.seconds]


def measure_machine(device: torch.device) -> Machine:
    """About three seconds on a CPU."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.ones_like(source)
    read = source.nbytes / min(timed(lambda: source.sum(), device) for _ in range(4))
    # Each byte is read once and written once.
    copy = 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(4))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return Machine(
        name, torch.get_num_threads(), product_rate(device, torch.float32),
        product_rate(device, torch.bfloat16), read / 1e9, copy / 1e9,
    )  # fmt: skip


def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    size: int | None = None,
    make: Callable[..., torch.Tensor] = torch.randn,
) -> float:
    """GFLOP/s of the product of two `size` × `size` matrices, which `make` fills.

    Random by default: equal numbers draw less power, and a GPU that is not held back runs faster.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a = make(size, size, device=device).to(dtype)
    few = a[: size // 8]
    timed(lambda: few @ a, device)  # the first call loads the library
    # Formats the processor lacks are emulated very slowly: once is enough to know.
    first = timed(lambda: few @ a, device)
    if first > 1:
        return 2 * len(few) * size**2 / first / 1e9
    repeats = 4 if dtype == torch.float32 else 8
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(repeats)) / 1e9


def processor_name() -> str:
    """The processor's name and the vector formats that matter here, where Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    return ", ".join([names[0] if names else platform.machine(), *flags])


def alternate(
    works: Mapping[str, Work], repeats: int, device: torch.device, warm_ups: int = 2
) -> dict[str, Timing]:
    """Warms every work up, then runs all of them in turn, `repeats` times.

    Raises `InputError` when a work fails, with its reason.
    """
    with ExitStack() as processes:

        def process() -> ProcessPoolExecutor:
            """A process of one work; Ctrl-C ends it without a word."""
            silent = signal.SIGINT, signal.SIG_DFL
            pool = ProcessPoolExecutor(1, START, initializer=signal.signal, initargs=silent)
            return processes.enter_context(pool)

        pools = {name: process() for name in works}

        def ask(name: str, task: Callable[..., Any], argument: Any) -> Any:
            try:
                return pools[name].submit(task, argument).result()
            except BrokenProcessPool:
                raise InputError(f"{name}: the process ended; is there memory for it?") from None
            except Exception as error:
                # What is too large for the machine needs no more than its line.
                if not isinstance(error, RuntimeError | MemoryError | InputError):
                    traceback.print_exception(error)
                raise InputError(f"{name} failed: {type(error).__name__}: {error}") from None

        for name, work in works.items():
            ask(name, _build, work)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        peaks: dict[str, int | None] = {}
        counts: dict[str, dict[str, float]] = {}
        with advance("Timing", (warm_ups + repeats) * len(works), "runs") as done:
            for name in works:
                for _ in range(warm_ups):
                    ask(name, _repeat, device)
                    done(1)
            for _ in range(repeats):
                for name in works:
                    taken, peaks[name], counts[name] = ask(name, _repeat, device)
                    seconds[name].append(taken)
                    done(1)
    return {name: Timing(name, seconds[name], peaks[name], counts[name]) for name in works}


# Of a work's own process: what it runs, and how long that took last.
_run: Run
_taken = SHORTEST


def _build(work: Work) -> None:
    global _run
    if work.tuned:
        keep_freed_memory()
    _run = work.make(*work.arguments)


def _repeat(device: torch.device) -> tuple[float, int | None, dict[str, float]]:
    """(seconds a run, peak memory, what was counted).

    A process that waited for its turn starts with cold caches and sleeping threads: what is short
    is run until it counts.
    """
    global _taken
    times = max(1, min(100, math.ceil(SHORTEST / _taken)))
    counts: dict[str, float] = {}

    def several() -> None:
        for _ in range(times):
            counts.update(_run() or {})

    _taken = timed(several, device) / times
    return _taken, _peak(device), counts


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster, per token: the median over the pairs run side by side, their range."""
    pairs = [a / b for a, b in zip(slow.per_token, fast.per_token, strict=True)]
    return {"median": median(pairs), "lowest": min(pairs), "highest": max(pairs)}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, a GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _peak(device: torch.device) -> int | None:
    """Peak memory of this process so far: its tensors on CUDA, all of it on Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
