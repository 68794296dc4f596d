"""`blockdiff zero-shot`."""

from __future__ import annotations

import sys
from typing import Any

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given, JsonOption, as_typed, print_record
from blockdiff.evaluation.options import ZeroShotOptions
from blockdiff.printing import printable


def _run(given: Given) -> None:
    from blockdiff.evaluation.zero_shot import measure_texts, zero_shot_table

    model, wish = given.make(ModelOptions), given.make(ZeroShotOptions)
    records: list[dict[str, Any]] = []
    try:
        for record in measure_texts(model.model, wish, device=model.device, **model.opening):
            records.append(record)
    finally:  # an interruption loses no text that was measured
        if any("error" not in record for record in records):
            print_record(given, records, zero_shot_table)
            for record in records:
                if "error" in record:
                    line = f"blockdiff: {record['data']} was not measured: {record['error']}"
                    print(printable(as_typed(" ".join(line.split()), COMMAND)), file=sys.stderr)


COMMAND = Command(
    summary="Perplexity on texts the model was not trained on, in one table.",
    kinds=(ModelOptions, ZeroShotOptions, JsonOption),
    run=_run,
    places=("model", "texts"),
    sections={"model": "Model", "texts": "Measurement"},
    examples=(
        "blockdiff zero-shot runs/bd3lm wikitext103,lambada",
        "blockdiff zero-shot starter notes.txt news.txt:lm1b --windows 200",
    ),
)
