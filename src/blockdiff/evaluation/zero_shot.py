"""Perplexity on texts a model was not trained on: the paper's seven, and any other by name.

Their ids are those of the Hugging Face hub. PTB, LM1B and the scientific papers were uploaded with
loading scripts, which `datasets` no longer runs: they are read from the hub's own Parquet copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from blockdiff import checks
from blockdiff.data.corpora import looks_like_path
from blockdiff.data.detokenizers import DETOKENIZERS
from blockdiff.data.loading import load
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.evaluation.corpus import measure_sequences, open_sequences
from blockdiff.evaluation.likelihood import check_estimator
from blockdiff.models.precision import convert, resolve_precision
from blockdiff.printing import table_text

_PARQUET = "@refs/convert/parquet"


@dataclass(frozen=True)
class TextSet:
    """Where a text is and what undoes its files' own marks (see `data.detokenizers`)."""

    data: str
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    detokenizer: str = "none"


PAPERS = "armanc/scientific_papers" + _PARQUET
TEXT_SETS: dict[str, TextSet] = {
    "ptb": TextSet("ptb-text-only/ptb_text_only" + _PARQUET, None, "test", "sentence", "ptb"),
    "wikitext2": TextSet(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", detokenizer="wikitext"
    ),
    "wikitext103": TextSet(
        "Salesforce/wikitext", "wikitext-103-raw-v1", "test", detokenizer="wikitext"
    ),
    "lm1b": TextSet("billion-word-benchmark/lm1b" + _PARQUET, None, "test", detokenizer="lm1b"),
    "lambada": TextSet("EleutherAI/lambada_openai", "default", "test", detokenizer="lambada"),
    "ag_news": TextSet("fancyzhx/ag_news", None, "test"),
    "pubmed": TextSet(PAPERS, "pubmed", "test", "article", "scientific"),
    "arxiv": TextSet(PAPERS, "arxiv", "test", "article", "scientific"),
}


def find_text_sets(names: str) -> dict[str, TextSet]:
    """The sets of a list with commas: names of `TEXT_SETS`, files, or hub ids, `:detokenizer`
    after those that need one (moby.jsonl, ptb.txt:ptb).

    Raises `InputError` for an empty list, or a name that is none of these.
    """
    found: dict[str, TextSet] = {}
    for given in filter(None, (part.strip() for part in names.split(","))):
        if given in TEXT_SETS:
            found.setdefault(given, TEXT_SETS[given])
            continue
        source, _, detokenizer = given.rpartition(":")
        if not source or detokenizer not in DETOKENIZERS:
            source, detokenizer = given, "none"
        known = Path(source).expanduser().exists() or looks_like_path(source) or "/" in source
        if not known and source != "pydoc":
            raise InputError(
                f"no text {given!r}; name a file, a hub id (owner/name), or one of "
                f"{', '.join(TEXT_SETS)}"
            )
        name = Path(source).name.split(".")[0]
        key = given if name in {*found, *TEXT_SETS} else name
        found[key] = TextSet(source, detokenizer=detokenizer)
    if not found:
        raise InputError(f"no text to measure; name some of {', '.join(TEXT_SETS)}, or files")
    return found


def zero_shot(
    model: str | Path,
    texts: str,
    *,
    tokenizer: str | None = None,
    length: int | None = None,
    bos: bool = False,
    windows: int = 0,
    estimator: str = "auto",
    draws: int = 8,
    seed: int = 0,
    precision: str = "float32",
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Measures the model on each of `texts` (see `find_text_sets`): records of `measure_sequences`.

    Every text is opened before the first is measured, so a wrong name costs no time. Raises
    `InputError` on bad input.
    """
    checks.numbers(length=length, windows=windows, draws=draws, seed=seed)
    check_estimator(estimator)
    sets = find_text_sets(texts)
    network, words = load(model, tokenizer=tokenizer, device=choose_device(device))
    precision = resolve_precision(precision, network.device)
    convert(network, precision, network.device)
    opened = {
        name: open_sequences(network, words, length=length, bos=bos, windows=windows, **asdict(one))
        for name, one in sets.items()
    }
    return [
        measure_sequences(
            network, *opened[name], model=str(model), data=name, estimator=estimator, draws=draws,
            seed=seed,
        )
        | {"source": one.data, "detokenizer": one.detokenizer, "precision": precision}
        for name, one in sets.items()
    ]  # fmt: skip


def zero_shot_table(records: Sequence[dict[str, Any]]) -> str:
    """The records for people, a row a text."""
    first = records[0]
    bound = "" if first["estimator"] == "ar" else "≤ "
    table = Table(title=f"{first['model']} on texts it was not trained on")
    for heading in ("text", "perplexity ± s.e.", "nats per token", "bits per byte", "tokens"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for r in records:
        table.add_row(
            r["data"],
            f"{bound}{r['perplexity']:.2f} ± {r['perplexity_stderr']:.2f}",
            f"{bound}{r['nats_per_token']:.4f} ± {r['stderr']:.4f}",
            f"{bound}{r['bits_per_byte']:.4f} ± {r['bits_per_byte_stderr']:.4f}",
            f"{r['counted_tokens']:,}",
        )
    table.caption = (
        f"{first['kind']}, L' = {first['block_size']}, sequences of {first['length']} tokens; "
        f"estimator {first['estimator']}"
    )
    return table_text(table, 100)
