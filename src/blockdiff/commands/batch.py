"""`blockdiff batch`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from blockdiff import checks
from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision
from blockdiff.registry import BoundName
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class BatchOptions:
    """Work on many lines with many models, on one machine or on a Ray cluster.

    Attributes:
        prompt_file: JSON lines or, to write, one prompt a line, as for generate --prompt-file and
            score --file.
        out: File of JSON lines, as generate and score write it; a job that was stopped goes on with
            the same command.
        overwrite: Begin the job anew.
        task: generate, which continues prompts, or score, which measures pairs.
        workers: Models, each in a process of its own; one for each GPU, else one, when left out.
        address: Head of the Ray cluster, host:port; this machine when left out. Its machines need
            this package, and the model at the same place.
        samples: Texts per prompt.
        estimator: What bounds a score: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per pair, where masks are not enumerated.
        timesteps: Time steps T of d3pm.
        greedy: Also tell whether greedy decoding gives the continuation.
        batch_size: Texts or pairs a model works on at once; chosen by size when left out. It gets
            four times as many texts at a time: for a small job choose fewer.
        precision: Weights; auto is float32, in which a text hardly depends on its company.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
    """

    prompt_file: str
    out: str
    overwrite: bool = False
    task: Literal["generate", "score"] = "generate"
    workers: int | None = None
    address: str | None = None
    samples: int = 1
    estimator: BoundName = "auto"
    draws: int = 8
    timesteps: int = 1000
    greedy: bool = True
    batch_size: int | None = None
    precision: Precision = "auto"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers and names that cannot be meant."""
        checks.options(self, {}, {})


_SCORES = {"estimator", "draws", "timesteps", "greedy"}


def _run(given: Given) -> None:
    wish, options, place = (given.make(k) for k in (BatchOptions, SamplingOptions, ModelOptions))
    writes = wish.task == "generate"
    wrong = _SCORES if writes else {*vars(options), "samples"} - {"seed", "block_size"}
    for name in sorted(given.named & wrong):
        raise InputError(f"`{name}` is not for the `task` {wish.task}; leave it out")
    from blockdiff.data.lines import Line, Lines
    from blockdiff.jobs import open_job
    from blockdiff.many import Scoring, Task, Writing, work
    from blockdiff.serving.batch import cluster, over_workers

    make: Any
    if writes:
        make = partial(Writing, place.model, wish, options, told=given.named, **place.opening)
    else:
        from blockdiff.commands.score import ScoreOptions
        from blockdiff.evaluation.likelihood import check_estimator

        check_estimator(wish.estimator)
        pairs = given.make(ScoreOptions)
        make = partial(Scoring, place.model, pairs, **place.opening)
    lines = Lines("prompt_file", wish.prompt_file, json=not writes)
    with open_job(wish.out, overwrite=wish.overwrite) as job, cluster(wish.address) as ray:
        task: Task = make(device="cpu")

        def elsewhere(left: Iterator[Line]) -> Iterator[dict[str, Any]]:
            return over_workers(
                ray, make, task, job.kept, left, workers=wish.workers, device=place.device
            )

        work(job, lines, task, elsewhere)


COMMAND = Command(
    summary="Write or score many lines with many models, on one machine or a cluster.",
    kinds=(ModelOptions, BatchOptions, SamplingOptions),
    run=_run,
    places=("model",),
    sections={
        "model": "Model",
        "prompt_file": "Work",
        "workers": "Machines",
        "samples": "How it is done",
        "max_new_tokens": "Sampling",
        "repetition_penalty": "Logits and constraints",
    },
    examples=(
        "blockdiff batch runs/bd3lm --prompt-file prompts.jsonl --out texts.jsonl --workers 2",
        "blockdiff batch runs/bd3lm --task score --prompt-file pairs.jsonl --out scores.jsonl "
        "--address 10.0.0.1:6379",
    ),
)
