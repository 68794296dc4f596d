"""`blockdiff benchmark`."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff.apps.benchmark.options import BenchmarkOptions, Work
from blockdiff.commands.options import Command, Given, JsonOption, print_record


@dataclass(frozen=True)
class WorkOptions:
    """What is timed.

    Attributes:
        work: What is timed: a training step, sampling, attention, or a likelihood.
    """

    work: Work


def _run(given: Given) -> None:
    options = given.make(BenchmarkOptions)
    from blockdiff.apps.benchmark.report import benchmark, describe

    record = benchmark(given.make(WorkOptions).work, options)
    print_record(given, record, describe)


COMMAND = Command(
    summary="Time ours against the naive way and the baselines, side by side.",
    kinds=(WorkOptions, BenchmarkOptions, JsonOption),
    run=_run,
    places=("work",),
    sections={"work": "Benchmark"},
    examples=(
        "blockdiff benchmark train --length 128 --block-size 4",
        "blockdiff benchmark sample --batch-size 1 --json",
    ),
)
