"""`blockdiff draft-table`."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff import checks
from blockdiff.commands.options import Command, Given
from blockdiff.evaluation.options import Part
from blockdiff.training.config import Detokenizer


@dataclass(frozen=True)
class DraftTableOptions:
    """Count a text's n-grams, for the order verified to draft with.

    Attributes:
        model: Model folder; the table is written into it.
        data: Corpus: pydoc, files (txt, jsonl, parquet; .xz and .gz too), a folder, or a hub id;
            may be given several times.
        min_count: Leave out triples that occur less often; a smaller file, and fewer drafts that
            are accepted.
        part: all, or the train or validation documents of the split training made.
        validation_fraction: Share of the text held out in that split; else that of the model's
            run, or 0.05.
        split_seed: Seed of that split; else that of the run, or 0.
        text_column: Column of JSON lines, Parquet or a hub data set that holds the text.
        split: Split of a hub data set.
        subset: Subset of a hub data set.
        detokenizer: What undoes a benchmark's own marks.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
    """

    model: str
    data: str | list[str]
    min_count: int = 1
    part: Part = "train"
    validation_fraction: float | None = None
    split_seed: int | None = None
    text_column: str | None = None
    split: str | None = None
    subset: str | None = None
    detokenizer: Detokenizer | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        checks.options(self, {"min_count": (1, checks.LARGEST_TEXT)}, {})


def _run(given: Given) -> None:
    options = given.make(DraftTableOptions)
    from blockdiff.evaluation.draft_table import write_draft_table

    table, path = write_draft_table(options)
    print(f"{path}: {len(table.key):,} different triples of {int(table.count.sum()):,}")


COMMAND = Command(
    summary="Count a text's n-grams, for the order verified to draft with.",
    kinds=(DraftTableOptions,),
    run=_run,
    places=("model", "data"),
    sections={"model": "Model", "data": "Text"},
    examples=("blockdiff draft-table runs/bd3lm pydoc",),
)
