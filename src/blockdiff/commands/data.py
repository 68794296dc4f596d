"""The options of a text to measure on, which several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockdiff.training.config import Detokenizer

Part = Literal["all", "train", "validation"]


@dataclass(frozen=True)
class DataOptions:
    """A text to measure on.

    Attributes:
        data: Corpus: pydoc, files (txt, jsonl, parquet; .xz and .gz too), a folder, or a hub id;
            may be given several times.
        part: all, or the train or validation documents of the split training made; of the text
            the model was trained on, what its run held out, else all. There, what is left out
            below is as in that run, too.
        validation_fraction: Share of the text held out in that split; else 0.05.
        split_seed: Seed of that split; else 0.
        text_column: Column of JSON lines, Parquet or a hub data set that holds the text.
        split: Split of a hub data set.
        subset: Subset of a hub data set.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        length: Tokens per sequence; the model's own context when left out.
        bos: Put a beginning-of-text token before each document.
        eos: Put an end-of-text token behind each document; else true.
        across_documents: Let windows run across documents; otherwise pad at each document's end.
        window_marks: Begin every window with a beginning-of-text token and end it with an
            end-of-text token.
        detokenizer: What undoes a benchmark's own marks.
    """

    data: str | list[str]
    part: Part | None = None
    validation_fraction: float | None = None
    split_seed: int | None = None
    text_column: str | None = None
    split: str | None = None
    subset: str | None = None
    tokenizer: str | None = None
    length: int | None = None
    bos: bool | None = None
    eos: bool | None = None
    across_documents: bool | None = None
    window_marks: bool | None = None
    detokenizer: Detokenizer | None = None
