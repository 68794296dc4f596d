"""`blockdiff variance`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given, JsonOption, print_record
from blockdiff.evaluation.options import VarianceOptions
from blockdiff.outputs import new_file


@dataclass(frozen=True)
class PlotOption:
    """A plot.

    Attributes:
        plot: Also draw the result, as a PNG.
    """

    plot: str | None = None


def _run(given: Given) -> None:
    plot = given.make(PlotOption).plot
    path = None if plot is None else new_file("plot", plot)
    from blockdiff.evaluation.variance import measure_corpus, variance_table
    from blockdiff.plots import variance_plot

    model, wish = given.make(ModelOptions), given.make(VarianceOptions)
    found = measure_corpus(model.model, wish, device=model.device, **model.opening)
    records = [one.record() for one in found]
    if path is not None:
        variance_plot(records, Path(path), title=f"{model.model} on {wish.data}")
    record = {
        "model": model.model, "data": wish.data, "precision": "float32", "estimators": records
    }  # fmt: skip
    print_record(given, record, lambda _: variance_table(found))


COMMAND = Command(
    summary="Measure how noisy the estimators of the bound are: loss and gradient.",
    kinds=(ModelOptions, VarianceOptions, PlotOption, JsonOption),
    run=_run,
    places=("model", "data"),
    sections={"model": "Model", "data": "Text", "block_sizes": "Measurement"},
    examples=("blockdiff variance runs/bd3lm pydoc --batches 4 --draws 4 --plot variance.png",),
)
