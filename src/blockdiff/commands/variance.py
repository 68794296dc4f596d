"""`blockdiff variance`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from blockdiff.commands.data import DataOptions
from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.outputs import new_file, to_json


@dataclass(frozen=True)
class VarianceOptions:
    """Measure how noisy the estimators of the bound are: loss and gradient, masks and data apart.

    Attributes:
        block_sizes: Block sizes L', for example 1,4,16; the model's own when left out.
        estimators: Which, with commas, for example bernoulli:cosine,clipped:0.3:0.8,
            exact_k+stratified; all of the paper's and ours when left out.
        batch_size: Sequences in a batch; the variance is that of a batch's mean.
        batches: Batches, each with its own text.
        draws: Draws of masks for each batch.
        gradient: Measure the gradient too.
        seed: Seed of the masks.
        plot: Also draw the result, as a PNG.
        json: Print one JSON object.
    """

    block_sizes: str | None = None
    estimators: str | None = None
    batch_size: int = 8
    batches: int = 8
    draws: int = 16
    gradient: bool = True
    seed: int = 0
    plot: str | None = None
    json: bool = False


def _run(given: Given) -> None:
    options = asdict(given.make(VarianceOptions))
    as_json, plot = options.pop("json"), options.pop("plot")
    path = None if plot is None else new_file("plot", plot)
    from blockdiff.evaluation.variance import measure_corpus, variance_table
    from blockdiff.plots import variance_plot

    model, data = given.make(ModelOptions), given.make(DataOptions)
    found = measure_corpus(model.model, device=model.device, **options, **asdict(data))
    records = [one.record() for one in found]
    if path is not None:
        variance_plot(records, Path(path), title=f"{model.model} on {data.data}")
    record = {
        "model": model.model, "data": data.data, "precision": "float32", "estimators": records
    }  # fmt: skip
    print(to_json(record, indent=2) if as_json else variance_table(found))


COMMAND = Command(
    summary="Measure how noisy the estimators of the bound are: loss and gradient.",
    kinds=(ModelOptions, DataOptions, VarianceOptions),
    run=_run,
    places=("model", "data"),
    sections={"model": "Model", "data": "Text", "block_sizes": "Measurement"},
    examples=("blockdiff variance runs/bd3lm pydoc --batches 4 --draws 4 --plot variance.png",),
)
