"""`blockdiff generate`."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class GenerateOptions:
    """Write text.

    Attributes:
        prompt: Text to continue, - for standard input; without one a new text is begun.
        prompt_file: File with one prompt a line; with --out also JSON lines, each with a prompt or
            messages, and with an id and sampling options of its own where it likes.
        samples: Texts per prompt.
        out: File of JSON lines with the texts; a job that was stopped goes on with the same
            command.
        overwrite: Begin the job of --out anew.
        batch_size: Texts of --out written at once; by memory, at most 32, when left out.
        precision: Weights: float32, bf16, int8 (fastest for one text on a CPU), or auto (bf16
            where the processor is made for it; float32 with --out: in the others a text depends on
            those written beside it).
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        compile: Compile the layers with torch.compile.
        watch: Show the denoising live in the terminal.
        delay: Seconds to wait after each step of --watch.
        page: Also write an HTML page that replays the first text's denoising.
        likelihood: Also bound −log p(text | prompt), with its standard error; shown with --json.
        json: Print one JSON object with texts, nfe, tokens per second and per
            evaluation.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    samples: int = 1
    out: str | None = None
    overwrite: bool = False
    batch_size: int | None = None
    precision: Precision = "auto"
    tokenizer: str | None = None
    compile: bool = False
    watch: bool = False
    delay: float = 0.0
    page: str | None = None
    likelihood: bool = False
    json: bool = False


def _run(given: Given) -> None:
    wish, options = given.make(GenerateOptions), given.make(SamplingOptions)
    if wish.out is not None:
        _write_file(given, wish, options)
        return
    for name in given.named & {"overwrite", "batch_size"}:
        raise InputError(f"`{name}` is for a file of texts: give `out` as well")
    from blockdiff.writing import write_texts

    model = given.make(ModelOptions)
    write_texts(model.model, wish, options, device=model.device, told=given.named, **model.opening)


def _write_file(given: Given, wish: GenerateOptions, options: SamplingOptions) -> None:
    if wish.prompt_file is None:
        raise InputError("`out` is for many prompts: give a `prompt_file`")
    for name in given.named & {"prompt", "watch", "delay", "page", "likelihood", "json"}:
        raise InputError(f"`{name}` and `out` exclude each other: leave one out")
    from blockdiff.data.lines import Lines
    from blockdiff.jobs import open_job
    from blockdiff.many import Writing, work

    model, lines = given.make(ModelOptions), Lines("prompt_file", wish.prompt_file)
    with open_job(wish.out or "", overwrite=wish.overwrite) as job:
        task = Writing(model.model, wish, options, model.device, told=given.named, **model.opening)
        work(job, lines, task)


COMMAND = Command(
    summary="Write text.",
    kinds=(ModelOptions, GenerateOptions, SamplingOptions),
    run=_run,
    places=("model", "prompt"),
    sections={
        "model": "Model",
        "prompt": "Text",
        "out": "Many prompts",
        "precision": "How it is written",
        "max_new_tokens": "Sampling",
        "repetition_penalty": "Logits and constraints",
    },
    examples=(
        'blockdiff generate starter "The people of the United States"',
        'blockdiff generate runs/bd3lm "This module provides" --max-new-tokens 64 --watch',
        'blockdiff generate starter "The people" --threshold 0.9',
        'blockdiff generate starter "In the year" --regex " 1[89][0-9]{2}"',
        'blockdiff generate starter "The answer is" --choices " yes" --choices " no"',
        "blockdiff generate starter --json-schema person.json --cfg-scale 0.5",
        "blockdiff generate runs/bd3lm --samples 4 --seed 1 --json > samples.json",
        "blockdiff generate runs/bd3lm --prompt-file prompts.jsonl --out texts.jsonl",
        "echo Hello | blockdiff generate starter -",
    ),
)
