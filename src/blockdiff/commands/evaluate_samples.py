"""`blockdiff evaluate-samples`."""

from __future__ import annotations

from blockdiff.commands.options import Command, Given, JsonOption, print_record
from blockdiff.evaluation.options import SampleOptions


def _run(given: Given) -> None:
    from blockdiff.evaluation.samples import measure_samples, quality_table

    found = measure_samples(given.make(SampleOptions))
    records = {name: quality.record() for name, quality in found.items()}
    print_record(given, records, lambda _: quality_table(found))


COMMAND = Command(
    summary="Measure generated texts: perplexity under a judge, entropy, diversity.",
    kinds=(SampleOptions, JsonOption),
    run=_run,
    places=("samples",),
    sections={"samples": "Samples and judge", "reference": "Real text", "seed": "Other"},
    examples=(
        "blockdiff evaluate-samples samples.json --judge gpt2-large --reference pydoc",
        "blockdiff evaluate-samples samples.json --judge runs/ar --json",
    ),
)
