"""`blockdiff generate`."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.evaluation.options import Precision
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class GenerateOptions:
    """Write text.

    Attributes:
        prompt: Text to continue, - for standard input; without one a new text is begun.
        prompt_file: File with one prompt a line.
        samples: Texts per prompt.
        precision: Weights: float32, bf16, int8 (fastest for one text on a CPU), or auto (bf16
            where the processor is made for it).
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        compile: Compile the layers; on CUDA into CUDA graphs.
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
    from blockdiff.writing import write_texts

    model = given.make(ModelOptions)
    write_texts(model.model, wish, options, device=model.device, told=given.named, **model.opening)


COMMAND = Command(
    summary="Write text.",
    kinds=(ModelOptions, GenerateOptions, SamplingOptions),
    run=_run,
    places=("model", "prompt"),
    sections={
        "model": "Model",
        "prompt": "Text",
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
        "echo Hello | blockdiff generate starter -",
    ),
)
