"""Every comparison of docs/performance.md, one after the other, as JSON in benchmarks/results.

    python benchmarks/run.py [NAME ...]      about half an hour on two cores; nothing else may run

What is there already is kept: delete a file to measure it again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from blockdiff.apps.benchmark.options import BenchmarkOptions
from blockdiff.apps.benchmark.report import benchmark, describe

RESULTS = Path(__file__).parent / "results"
PAPER = {"preset": "small", "vocab_size": 50258}
LONG = PAPER | {"length": 1024, "block_size": 16, "batch_size": 1, "repeats": 5}
SHORT = PAPER | {"length": 128, "block_size": 4, "batch_size": 8, "repeats": 5}
ONE = PAPER | {"length": 1024, "batch_size": 1, "tokens": 128, "repeats": 3}

COMPARISONS: dict[str, tuple[str, dict]] = {
    "train-long-bf16": ("train", LONG | {"precision": "bf16"}),
    "train-long-float32": ("train", LONG | {"precision": "float32"}),
    "train-short-bf16": ("train", SHORT | {"precision": "bf16"}),
    "train-nano": ("train", {"repeats": 9}),
    "sample-one-block4": ("sample", ONE | {"block_size": 4}),
    "sample-one-block16": ("sample", ONE | {"block_size": 16}),
    "sample-sixteen-block4": ("sample", ONE | {"block_size": 4, "batch_size": 16}),
    "evaluate": ("evaluate", SHORT | {"repeats": 3}),
    "attention-long": ("attention", LONG),
    "attention-short": ("attention", SHORT),
}


def main(names: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in names or COMPARISONS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            continue
        work, options = COMPARISONS[name]
        record = benchmark(work, BenchmarkOptions(**options))
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(name, describe(record), sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
