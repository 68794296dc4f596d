"""`blockdiff zero-shot`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from blockdiff.commands.evaluate import Precision
from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given, as_typed
from blockdiff.outputs import to_json
from blockdiff.printing import printable
from blockdiff.registry import BoundName


@dataclass(frozen=True)
class ZeroShotOptions:
    """Perplexity on texts the model was not trained on: the paper's, or any other, in one table.

    A text that cannot be measured is named, and the others are measured.

    Attributes:
        texts: With commas: ptb, wikitext2, wikitext103, lm1b, lambada, ag_news, pubmed, arxiv (from
            the Hugging Face hub), files, or hub ids, with :DETOKENIZER after those that need one,
            for example news.txt:lm1b.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        length: Tokens per sequence; the model's own context when left out.
        bos: Put a beginning-of-text token before each document.
        eos: Put an end-of-text token behind each document.
        window_marks: Begin every window with a beginning-of-text token and end it with an
            end-of-text token; with --no-eos as the paper does.
        windows: Sequences measured of each text, evenly spread; 0 is all of them.
        estimator: What bounds the likelihood: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per sequence, where masks are not enumerated.
        seed: Seed of the masks.
        precision: Weights; auto is bf16 where the processor is made for it.
        json: Print one JSON array.
    """

    texts: str | list[str] = "ptb,wikitext103,lm1b,lambada,ag_news,pubmed,arxiv"
    tokenizer: str | None = None
    length: int | None = None
    bos: bool = False
    eos: bool = True
    window_marks: bool = False
    windows: int = 0
    estimator: BoundName = "auto"
    draws: int = 8
    seed: int = 0
    precision: Precision = "float32"
    json: bool = False


def _run(given: Given) -> None:
    from blockdiff.evaluation.zero_shot import measure_texts, zero_shot_table

    options = asdict(given.make(ZeroShotOptions))
    as_json, texts = options.pop("json"), options.pop("texts")
    model = given.make(ModelOptions)
    names = texts if isinstance(texts, str) else ",".join(texts)
    records: list[dict[str, Any]] = []
    try:
        for record in measure_texts(model.model, names, device=model.device, **options):
            records.append(record)
    finally:  # an interruption loses no text that was measured
        if any("error" not in record for record in records):
            print(to_json(records, indent=2) if as_json else zero_shot_table(records), flush=True)
            for record in records:
                if "error" in record:
                    line = f"blockdiff: {record['data']} was not measured: {record['error']}"
                    print(printable(as_typed(" ".join(line.split()), COMMAND)), file=sys.stderr)


COMMAND = Command(
    summary="Perplexity on texts the model was not trained on, in one table.",
    kinds=(ModelOptions, ZeroShotOptions),
    run=_run,
    places=("model", "texts"),
    sections={"model": "Model", "texts": "Measurement"},
    examples=(
        "blockdiff zero-shot runs/bd3lm wikitext103,lambada",
        "blockdiff zero-shot starter notes.txt news.txt:lm1b --windows 200",
    ),
)
