"""Timing alternatives fairly: A B A B … in one run, medians, and ratios pair by pair.

What a machine can do is measured in the same run, so that a figure can be read as a share of it.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine: matrix products in GFLOP/s, copying in GB/s."""

    processor: str
    threads: int
    float32_gflops: float
    bf16_gflops: float
    copy_gb_per_s: float


@dataclass(frozen=True)
class Timing:
    """One alternative: seconds of each repeat, and the peak memory of one in bytes, if known."""

    name: str
    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure_machine(device: torch.device) -> Machine:
    """About two seconds on a CPU."""

    def rate(dtype: torch.dtype) -> float:
        size = 8192 if device.type == "cuda" else 1024
        a = torch.ones(size, size, dtype=dtype, device=device)
        return 2 * size**3 / min(_timed(lambda: a @ a, device) for _ in range(4)) / 1e9

    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    # Each byte is read once and written once.
    copy = 2 * source.nbytes / min(_timed(lambda: target.copy_(source), device) for _ in range(4))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Machine(
        name, torch.get_num_threads(), rate(torch.float32), rate(torch.bfloat16), copy / 1e9
    )


def alternate(
    works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Runs every work once to warm up, noting its peak memory, then all of them in turn."""
    peaks = {name: _peak(work, device) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(_timed(work, device))
    return {name: Timing(name, seconds[name], peaks[name]) for name in works}


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster: the median over the pairs run side by side, and their range."""
    pairs = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return {"median": median(pairs), "lowest": min(pairs), "highest": max(pairs)}


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of one run; of the whole process on a CPU, where only Linux tells it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier work left free
        reset.write_text("5")
    except OSError:
        work()
        return None
    work()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
