"""`blockdiff evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from blockdiff.commands.data import DataOptions
from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.outputs import to_json
from blockdiff.registry import BoundName

Precision = Literal["auto", "float32", "bf16", "int8"]


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure the likelihood of a text under a model.

    Attributes:
        block_size: Block size L'; the model's own when left out.
        estimator: What bounds the likelihood: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per sequence, where masks are not enumerated.
        timesteps: Time steps T of d3pm.
        windows: Sequences measured, evenly spread; 0 is all of them.
        batch_size: Sequences per pass; chosen by size when left out.
        seed: Seed of the masks.
        precision: Weights; auto is bf16 where the processor is made for it.
        json: Print one JSON object.
    """

    block_size: int | None = None
    estimator: BoundName = "auto"
    draws: int = 8
    timesteps: int = 1000
    windows: int = 0
    batch_size: int | None = None
    seed: int = 0
    precision: Precision = "float32"
    json: bool = False


def _run(given: Given) -> None:
    from blockdiff.evaluation.corpus import evaluate_corpus, summary_table

    options = asdict(given.make(EvaluateOptions))
    as_json = options.pop("json")
    model, data = given.make(ModelOptions), given.make(DataOptions)
    record = evaluate_corpus(model.model, device=model.device, **options, **asdict(data))
    print(to_json(record, indent=2) if as_json else summary_table(record))


COMMAND = Command(
    summary="Measure the likelihood of a text under a model.",
    kinds=(ModelOptions, DataOptions, EvaluateOptions),
    run=_run,
    places=("model", "data"),
    sections={"model": "Model", "data": "Text", "block_size": "Measurement"},
    examples=(
        "blockdiff evaluate starter notes.txt",
        "blockdiff evaluate runs/bd3lm --data pydoc --part validation --json",
    ),
)
