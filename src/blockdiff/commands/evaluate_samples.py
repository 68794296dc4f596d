"""`blockdiff evaluate-samples`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from blockdiff.commands.data import Part
from blockdiff.commands.options import Command, Given
from blockdiff.outputs import to_json


@dataclass(frozen=True)
class SampleOptions:
    """Measure generated texts: perplexity under a judge, entropy, diversity, distance from text.

    Attributes:
        samples: What `generate --json` printed (.json), or a corpus of texts.
        judge: Causal language model (folder or hub id) for generative perplexity, for example
            gpt2-large, or an AR model of this package.
        window: Tokens the judge reads at once; 1024, moved by half, or what it was made for.
        tokenizer: Folder or hub id of the tokenizer whose tokens are counted; the judge's own when
            left out.
        reference: Corpus of real text, for the n-gram divergence; the judge is tried on it too.
        part: all, or the train or validation documents of the split training made.
        validation_fraction: Share of the text held out in that split.
        split_seed: Seed of that split.
        text_column: Column of the reference that holds the text.
        words: Words in each piece of the reference.
        seed: Seed of resampling and shuffling.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
        json: Print one JSON object.
    """

    samples: str
    judge: str | None = None
    window: int | None = None
    tokenizer: str | None = None
    reference: str | None = None
    part: Part = "all"
    validation_fraction: float = 0.05
    split_seed: int = 0
    text_column: str = "text"
    words: int = 200
    seed: int = 0
    device: str = "auto"
    json: bool = False


def _run(given: Given) -> None:
    from blockdiff.evaluation.samples import measure_samples, quality_table

    options = asdict(given.make(SampleOptions))
    as_json = options.pop("json")
    found = measure_samples(options.pop("samples"), **options)
    records = {name: quality.record() for name, quality in found.items()}
    print(to_json(records, indent=2) if as_json else quality_table(found))


COMMAND = Command(
    summary="Measure generated texts: perplexity under a judge, entropy, diversity.",
    kinds=(SampleOptions,),
    run=_run,
    places=("samples",),
    sections={"samples": "Samples and judge", "reference": "Real text", "seed": "Other"},
    examples=(
        "blockdiff evaluate-samples samples.json --judge gpt2-large --reference pydoc",
        "blockdiff evaluate-samples samples.json --judge runs/ar --json",
    ),
)
