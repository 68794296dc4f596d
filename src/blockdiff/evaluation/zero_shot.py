"""Perplexity on texts a model was not trained on: the paper's seven, and any other by name.

Their ids are those of the Hugging Face hub. PTB, LM1B and the scientific papers were uploaded with
loading scripts, which `datasets` no longer runs: they are read from the hub's own Parquet copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockdiff.data.corpora import kind_of
from blockdiff.data.detokenizers import DETOKENIZERS
from blockdiff.data.encoding import encode_pieces, mark_windows
from blockdiff.data.hub_sets import HubUnreachable, hub_or_copies
from blockdiff.errors import InputError
from blockdiff.evaluation.corpus import (
    measure_sequences,
    open_documents,
    open_to_measure,
    pack_documents,
    packed_length,
)
from blockdiff.evaluation.options import ZeroShotOptions
from blockdiff.printing import printable, table_text

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

    Raises `InputError` for an empty list, a name that is none of these, or no such detokenizer.
    """
    found: dict[str, TextSet] = {}
    for given in filter(None, (part.strip() for part in names.split(","))):
        if given in TEXT_SETS:
            found.setdefault(given, TEXT_SETS[given])
            continue
        source, detokenizer = given, "none"
        mark = re.fullmatch(r"(.+):([\w-]*)", given)
        if mark and not kind_of(given)[0].exists():
            source, detokenizer = mark.groups()
            if detokenizer not in DETOKENIZERS:
                raise InputError(
                    f"no detokenizer {detokenizer!r} for {source}; choose one of "
                    f"{', '.join(DETOKENIZERS)}"
                )
        if kind_of(source)[1] == "hub" and "/" not in source:
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
    model: str | Path, texts: str, *, device: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Measures the model on each of `texts` (see `find_text_sets`): what `measure_texts` gives.

    `options` are those of `ZeroShotOptions`.

    Example:
        >>> import pathlib, tempfile
        >>> from blockdiff.evaluation.zero_shot import zero_shot
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "notes.txt"
        >>> _ = file.write_text("Returns the number of items in the list. " * 40)
        >>> [record["data"] for record in zero_shot("starter", str(file), windows=1)]
        ['notes']
    """
    return list(measure_texts(model, ZeroShotOptions(texts, **options), device))


def measure_texts(
    model: str | Path, wish: ZeroShotOptions, device: str | None = None, **opening: Any
) -> Iterator[dict[str, Any]]:
    """A record for each text, as soon as it is measured.

    What is on this machine is opened before the model is, so a wrong name costs no time. A text
    that cannot be measured (a data set out of reach, fewer tokens than a sequence) has the record
    {"data": its name, "error": the reason}, and the others go on; a hub that did not answer is not
    asked again. Records are those of `measure_sequences`, with the source, detokenizer and
    precision.

    Raises `InputError` on bad input, and at the end when no text could be measured.
    """
    texts = wish.texts if isinstance(wish.texts, str) else ",".join(wish.texts)
    sets = find_text_sets(texts)
    opened = {
        name: open_documents(**asdict(one))
        for name, one in sets.items()
        if kind_of(one.data)[1] != "hub"
    }
    network, words, precision = open_to_measure(model, wish, device, **opening)
    # What would stop every text, before the first is downloaded.
    network.config.choose_block_size(None, wish.length)
    encode_pieces([], words, bos=wish.bos, eos=wish.eos)
    if wish.window_marks:
        mark_windows([], words, packed_length(network, wish.length))
    unmeasured: dict[str, list[str]] = {}
    with ExitStack() as hub:
        for name, one in sets.items():
            try:
                if name not in opened:
                    hub.enter_context(hub_or_copies(one.data))
                    opened[name] = open_documents(**asdict(one))
                packed, sequences = pack_documents(
                    network, words, opened.pop(name), length=wish.length, windows=wish.windows,
                    bos=wish.bos, eos=wish.eos, window_marks=wish.window_marks,
                )  # fmt: skip
                record = measure_sequences(
                    network, packed, sequences, model=str(model), data=name,
                    estimator=wish.estimator, draws=wish.draws, seed=wish.seed,
                )  # fmt: skip
            except InputError as error:
                reason = error.reason if isinstance(error, HubUnreachable) else str(error)
                unmeasured.setdefault(reason, []).append(name)
                yield {"data": name, "error": reason}
                continue
            yield record | {
                "source": one.data, "detokenizer": one.detokenizer, "precision": precision
            }  # fmt: skip
    if sum(map(len, unmeasured.values())) == len(sets):
        reasons = (f"{', '.join(names)}: {reason}" for reason, names in unmeasured.items())
        raise InputError(f"no text could be measured; {'; '.join(reasons)}")


def zero_shot_table(records: Sequence[dict[str, Any]]) -> str:
    """The records for people, a row a text; at least one of them was measured."""
    measured = [r for r in records if "error" not in r]
    first = measured[0]
    bound = "" if first["estimator"] == "ar" else "≤ "
    rows = [
        (
            r["data"],
            f"{bound}{r['perplexity']:.2f} ± {r['perplexity_stderr']:.2f}",
            f"{bound}{r['nats_per_token']:.4f} ± {r['stderr']:.4f}",
            f"{bound}{r['bits_per_byte']:.4f} ± {r['bits_per_byte_stderr']:.4f}",
            f"{r['counted_tokens']:,}",
        )
        for r in measured
    ]
    caption = (
        f"{first['kind']}, L' = {first['block_size']}, sequences of {first['length']} tokens; "
        f"estimator {first['estimator']}"
    )
    title = f"{first['model']} on texts it was not trained on"
    head = ("text", "perplexity ± s.e.", "nats per token", "bits per byte", "tokens")
    text = table_text(head, rows, 100, title=title, caption=caption)
    missing = ", ".join(printable(r["data"]) for r in records if "error" in r)
    return f"{text}\nnot measured: {missing}" if missing else text
