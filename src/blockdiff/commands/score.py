"""`blockdiff score`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision
from blockdiff.outputs import to_json
from blockdiff.registry import BoundName


@dataclass(frozen=True)
class ScoreOptions:
    """Measure how likely continuations are, given their beginnings.

    Attributes:
        context: Beginning of a text; may be empty.
        continuation: What follows it.
        file: JSON lines instead, each with a context and a continuation, - for standard input; what
            else a line holds is printed again with --json.
        estimator: What bounds the likelihood: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per pair, where masks are not enumerated.
        timesteps: Time steps T of d3pm.
        greedy: Also tell whether greedy decoding gives the continuation.
        batch_size: Pairs per pass; chosen by size when left out.
        seed: Seed of the masks, and of the order of greedy decoding.
        precision: Weights; auto is bf16 where the processor is made for it.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        json: Print one JSON object a pair and line.
    """

    context: str | None = None
    continuation: str | None = None
    file: str | None = None
    estimator: BoundName = "auto"
    draws: int = 8
    timesteps: int = 1000
    greedy: bool = True
    batch_size: int | None = None
    seed: int = 0
    precision: Precision = "float32"
    tokenizer: str | None = None
    json: bool = False


def read_pairs(options: ScoreOptions) -> list[dict[str, Any]]:
    """The pairs of the file, or the one of the command line; `InputError` where one is none."""
    if options.file is None:
        if options.context is None or options.continuation is None:
            raise InputError("give `context` and `continuation`, or a `file` of JSON lines")
        return [{"context": options.context, "continuation": options.continuation}]
    if options.context is not None or options.continuation is not None:
        raise InputError("`file` stands for `context` and `continuation`; leave these out")
    try:
        is_input = options.file == "-"
        text = sys.stdin.read() if is_input else Path(options.file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {options.file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{options.file} is not valid UTF-8; save it as UTF-8") from None
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{options.file}, line {number}"
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON: {error}") from None
        for name in ("context", "continuation"):
            if not isinstance(pair, dict) or not isinstance(pair.get(name), str):
                raise InputError(f"{where} holds no text {name!r}")
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{options.file} holds no pairs")
    return pairs


def _run(given: Given) -> None:
    options = given.make(ScoreOptions)
    pairs = read_pairs(options)
    from blockdiff.api import load, score
    from blockdiff.device import choose_device
    from blockdiff.evaluation.likelihood import check_estimator
    from blockdiff.models.weights import convert, resolve_precision
    from blockdiff.printing import printable, table_text
    from blockdiff.progress import advance

    check_estimator(options.estimator)
    place = given.make(ModelOptions)
    model, words = load(
        place.model,
        tokenizer=options.tokenizer,
        device=choose_device(place.device),
        **place.opening,
    )
    convert(model, resolve_precision(options.precision, model.device), model.device)
    with advance(f"{model.config.kind} on {options.file or 'a pair'}", len(pairs), "pairs") as done:
        found = score(
            model, [pair["context"] for pair in pairs], [pair["continuation"] for pair in pairs],
            tokenizer=words, estimator=options.estimator, draws=options.draws,
            timesteps=options.timesteps, seed=options.seed, greedy=options.greedy,
            batch_size=options.batch_size, progress=done,
        )  # fmt: skip
    if options.json:
        for pair, one in zip(pairs, found, strict=True):
            print(to_json({**pair, **asdict(one)}))
        return
    rows = []
    for pair, one in zip(pairs, found, strict=True):
        same = "" if one.greedy is None else "yes" if one.greedy else "no"
        bound = "" if model.config.causal else "≤ "
        rows.append((f"{bound}{one.nats:.4f}", f"{one.error:.4f}", str(one.tokens), same,
                     printable(pair["continuation"])))  # fmt: skip
    head = ("nats", "± error", "tokens", "greedy", "continuation")
    title = f"−log p(continuation | context) under {place.model}, in nats"
    print(table_text(head, rows, 100, title=title))


COMMAND = Command(
    summary="Measure how likely continuations are, given their beginnings.",
    kinds=(ModelOptions, ScoreOptions),
    run=_run,
    places=("model", "context", "continuation"),
    sections={"model": "Model", "context": "Text", "estimator": "Measurement"},
    examples=(
        'blockdiff score starter "The people of the" " United States"',
        "blockdiff score runs/bd3lm --file pairs.jsonl --json > scores.jsonl",
    ),
)
