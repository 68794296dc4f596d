"""`blockdiff score`."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import IO, Any

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.errors import InputError, first_line
from blockdiff.evaluation.options import Precision
from blockdiff.outputs import local_path, to_json
from blockdiff.registry import BoundName


@dataclass(frozen=True)
class ScoreOptions:
    """Measure how likely continuations are, given their beginnings.

    Attributes:
        context: Beginning of a text; may be empty.
        continuation: What follows it.
        file: JSON lines instead, each with a context and a continuation, - for standard input; what
            else a line holds is printed again with --json.
        out: File of JSON lines with what --json prints, each with an id; a job that was stopped
            goes on with the same command.
        overwrite: Begin the job of --out anew.
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
    out: str | None = None
    overwrite: bool = False
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
    from blockdiff.data.files import json_lines

    pairs = []
    with _opened(options.file) as file:
        for number, pair in json_lines(file, options.file):
            for name in ("context", "continuation"):
                if not isinstance(pair.get(name), str):
                    raise InputError(f"{options.file}, line {number} holds no text {name!r}")
            pairs.append(pair)
    if not pairs:
        raise InputError(f"{options.file} holds no pairs")
    return pairs


def _opened(name: str) -> AbstractContextManager[IO[bytes]]:
    if name == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("`file` is -, but there is no standard input to read")
        return nullcontext(sys.stdin.buffer)
    try:
        return local_path("file", name).open("rb")
    except OSError as error:
        raise InputError(f"cannot read {name}: {first_line(error)}") from None


def _write_file(options: ScoreOptions, place: ModelOptions) -> None:
    if options.file is None or options.json:
        raise InputError(
            "`out` is for a `file` of pairs: give one"
            if options.file is None
            else "`json` and `out` exclude each other: leave one out"
        )
    from blockdiff.data.lines import Lines
    from blockdiff.evaluation.likelihood import check_estimator
    from blockdiff.jobs import open_job
    from blockdiff.many import Scoring, work

    check_estimator(options.estimator)
    lines = Lines("file", options.file, json=True)
    with open_job(options.out or "", overwrite=options.overwrite) as job:
        work(job, lines, Scoring(place.model, options, place.device, **place.opening))


def _run(given: Given) -> None:
    options = given.make(ScoreOptions)
    if options.out is not None:
        _write_file(options, given.make(ModelOptions))
        return
    if options.overwrite:
        raise InputError("`overwrite` is for a file of scores: give `out` as well")
    pairs = read_pairs(options)
    from blockdiff.api import score
    from blockdiff.evaluation.likelihood import check_estimator
    from blockdiff.models.loading import load_in
    from blockdiff.printing import printable, table_text
    from blockdiff.progress import advance

    check_estimator(options.estimator)
    place = given.make(ModelOptions)
    model, words, _ = load_in(
        place.model, options.precision, place.device, tokenizer=options.tokenizer, **place.opening
    )
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
        "blockdiff score runs/bd3lm --file pairs.jsonl --out scores.jsonl",
    ),
)
