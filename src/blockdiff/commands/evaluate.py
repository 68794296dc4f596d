"""`blockdiff evaluate`."""

from __future__ import annotations

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given, JsonOption, print_record
from blockdiff.evaluation.options import EvaluateOptions


def _run(given: Given) -> None:
    from blockdiff.evaluation.corpus import evaluate_corpus, summary_table

    model = given.make(ModelOptions)
    record = evaluate_corpus(
        model.model, given.make(EvaluateOptions), device=model.device, **model.opening
    )
    print_record(given, record, summary_table)


COMMAND = Command(
    summary="Measure the likelihood of a text under a model.",
    kinds=(ModelOptions, EvaluateOptions, JsonOption),
    run=_run,
    places=("model", "data"),
    sections={"model": "Model", "data": "Text", "block_size": "Measurement"},
    examples=(
        "blockdiff evaluate starter notes.txt",
        "blockdiff evaluate runs/bd3lm --data pydoc --part validation --json",
    ),
)
