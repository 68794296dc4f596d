"""`blockdiff tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given, JsonOption, print_record
from blockdiff.evaluation.options import TuneOptions


def _run(given: Given) -> None:
    model, wish = given.make(ModelOptions), given.make(TuneOptions)
    from blockdiff.evaluation.choosing import tuning_table
    from blockdiff.evaluation.tuning import tune
    from blockdiff.plots import frontier_plot

    record = tune(model.model, wish, device=model.device, **model.opening)
    frontier_plot(record, Path(record["folder"]) / "tuning.png")
    # What was measured of each text is in the file alone.
    shown = record | {"points": [_without_texts(one) for one in record["points"]]}
    shown["real"] = _without_texts(record["real"])
    print_record(given, shown, tuning_table)


def _without_texts(point: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != "texts"}


COMMAND = Command(
    summary="Choose how a model decodes: quality against speed.",
    kinds=(ModelOptions, TuneOptions, JsonOption),
    run=_run,
    places=("model", "data"),
    sections={
        "model": "Model",
        "data": "Text",
        "orders": "What is tried",
        "judge": "Measurement",
        "precision": "Other",
    },
    examples=(
        "blockdiff tune runs/bd3lm pydoc",
        "blockdiff tune runs/bd3lm notes.txt --orders threshold --thresholds 0.9,0.8,0.7,0.6",
        "blockdiff tune starter notes.txt --judge gpt2-large --out runs/tuning",
    ),
)
