"""`blockdiff draft-table`."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff import checks
from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.evaluation.options import CorpusOptions, Part


@dataclass(frozen=True)
class DraftTableOptions(CorpusOptions):
    """Count a text's n-grams, for the order verified to draft with.

    Attributes:
        part: all, or the train or validation documents of the split training made.
        min_count: Leave out triples that occur less often; a smaller file, and fewer drafts that
            are accepted.
    """

    part: Part | None = "train"
    min_count: int = 1

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        checks.options(self, {"min_count": (1, checks.LARGEST_TEXT)}, {})


def _run(given: Given) -> None:
    place, options = given.make(ModelOptions), given.make(DraftTableOptions)
    from blockdiff.evaluation.draft_table import write_draft_table

    table, path = write_draft_table(place.model, options, device=place.device, **place.opening)
    print(f"{path}: {len(table.key):,} different triples of {int(table.count.sum()):,}")


COMMAND = Command(
    summary="Count a text's n-grams, for the order verified to draft with.",
    kinds=(ModelOptions, DraftTableOptions),
    run=_run,
    places=("model", "data"),
    sections={"model": "Model", "data": "Text"},
    examples=("blockdiff draft-table runs/bd3lm pydoc",),
)
