"""How the cost of a training step grows with L, L', batch and vocabulary, for each attention.

    python benchmarks/growth.py            measures, ten minutes on two cores; resumes
    python benchmarks/growth.py --report   draws docs/growth.png and prints the tables and fits

A point is a step of the `nano` network (forward, backward, clipping, AdamW) in its own process.
`flex` is measured on CUDA only: on a CPU it has no backward.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from blockdiff.apps.benchmark import works
from blockdiff.apps.benchmark.compare import Work, alternate, measure_machine
from blockdiff.apps.benchmark.options import BenchmarkOptions
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.models.weights import resolve_precision

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "growth.json"
PLOT = HERE.parent / "docs" / "growth.png"

BASE = BenchmarkOptions("nano", 1024, 1024, 16, 1)
SWEEPS: dict[str, tuple[str, list[int]]] = {
    "L": ("length", [256, 512, 1024, 2048, 4096, 8192]),
    "L'": ("block_size", [1, 4, 16, 64, 256, 1024]),
    "batch": ("batch_size", [1, 2, 4, 8, 16]),
    "vocabulary": ("vocab_size", [1024, 4096, 16384, 65536]),
}
# What the fitted line is a polynomial of: a constant, x, and for L its square.
DEGREE = {"L": 2, "L'": 1, "batch": 1, "vocabulary": 1}


def measure() -> None:
    device = choose_device()
    backends = ["dense", "blockwise", *(["flex"] if device.type == "cuda" else [])]
    precision = resolve_precision("auto", device)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"points": []}
    if not record["points"]:
        record["machine"] = vars(measure_machine(device))
        record["precision"] = precision
    done = {(p["sweep"], p["value"], p["backend"]) for p in record["points"]}
    for sweep, (name, values) in SWEEPS.items():
        for value in values:
            for backend in backends:
                if (sweep, value, backend) in done:
                    continue
                changes = {name: value, "precision": precision, "backend": backend}
                options = replace(BASE, **changes)
                point = {"sweep": sweep, "value": value, "backend": backend}
                try:
                    work = Work(works.training_step, (options, str(device), "ours"))
                    timing = alternate({backend: work}, 2, device, warm_ups=1)[backend]
                    point |= {"seconds": timing.seconds, "peak_bytes": timing.peak_bytes}
                except InputError as error:
                    point["failed"] = str(error)
                record["points"].append(point)
                RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(point, flush=True)


def series(record: dict, sweep: str, backend: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, seconds, GiB."""
    points = [
        p
        for p in record["points"]
        if p["sweep"] == sweep and p["backend"] == backend and "seconds" in p
    ]
    rows = [(p["value"], np.median(p["seconds"]), p["peak_bytes"] / 2**30) for p in points]
    x, seconds, memory = np.array(rows, dtype=float).T
    return x, seconds, memory


def fit(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of 1, x, x², … by least squares of the relative error; none is negative."""
    from scipy.optimize import nnls

    terms = np.stack([x**power for power in range(degree + 1)], axis=1)
    coefficients, _ = nnls(terms / y[:, None], np.ones_like(y))
    return coefficients


def report() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    record = json.loads(RESULTS.read_text())
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(15, 6.5), sharex="col", sharey="row")
    colours = {"dense": "#b5482a", "blockwise": "#2a6fb5", "flex": "#4a8f3c"}
    for column, (sweep, _) in enumerate(SWEEPS.items()):
        for backend in ("dense", "blockwise", "flex"):
            if not any(p["backend"] == backend for p in record["points"]):
                continue
            x, seconds, memory = series(record, sweep, backend)
            for row, y in enumerate((seconds, memory)):
                axis, line = axes[row, column], fit(x, y, DEGREE[sweep])
                grid = np.geomspace(x[0], x[-1], 60)
                axis.plot(x, y, "o", color=colours[backend], label=backend)
                axis.plot(grid, np.polyval(line[::-1], grid), "-", lw=1, color=colours[backend])
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.set_xticks(x, [f"{int(value):,}" for value in x], fontsize=8)
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.yaxis.set_minor_formatter(lambda value, _: "")
                axis.grid(alpha=0.3, which="both")
                if column == 0:
                    axis.set_ylabel(("seconds a step", "peak memory, GiB")[row])
            cells = [f"{s:.3f} s, {m:.2f} GiB" for s, m in zip(seconds, memory, strict=True)]
            print(f"| {sweep} | {backend} |", " | ".join(cells), "|")
            line = fit(x, seconds, DEGREE[sweep])
            terms = [f"{c:.3g}·x^{power}" for power, c in enumerate(line)]
            print(f"  {sweep} {backend}: x = {x.astype(int).tolist()}, t = {' + '.join(terms)} s")
        axes[1, column].set_xlabel(sweep)
        axes[1, column].set_yticks([0.5, 1, 2, 4])
    axes[0, 0].legend()
    figure.suptitle(
        "A training step of nano, at L = 1,024, L' = 16, batch 1, vocabulary 1,024 where not varied"
    )
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    torch.manual_seed(0)
    report() if "--report" in sys.argv else measure()
