"""`blockdiff infill`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given, as_typed
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class InfillOptions:
    """Fill gaps in a text.

    Attributes:
        text: Text with gaps, - for standard input: [[gap:20]] is one of 20 tokens, [[gap:5-20]]
            one of as many as fit best, [[gap]] the same of 1 to 16.
        samples: How many times the text is filled.
        tries: Fillings of each gap that are tried; the one is kept that, with the text behind it,
            is likeliest.
        precision: Weights: float32, bf16, int8 (fastest for one text on a CPU), or auto (bf16
            where the processor is made for it).
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        json: Print one JSON object a filling and line.
    """

    text: str
    samples: int = 1
    tries: int = 1
    precision: Precision = "auto"
    tokenizer: str | None = None
    json: bool = False


def _run(given: Given) -> None:
    wish, options, place = (given.make(k) for k in (InfillOptions, SamplingOptions, ModelOptions))
    for name in given.named & {"max_new_tokens", "stop"}:
        raise InputError(f"`{name}` is said by the gaps of the text; leave it out")
    if options.logprobs:
        raise InputError("`logprobs` are shown by generate only; leave it out")
    from blockdiff.infilling import infill, parse_gaps
    from blockdiff.outputs import to_json
    from blockdiff.printing import plain_console, printable
    from blockdiff.writing import open_to_write, read_prompts

    text = read_prompts(wish.text)[0]
    parse_gaps(text)
    model, tokenizer, precision = open_to_write(place.model, wish, place.device, **place.opening)
    told = False
    for done in infill(
        model,
        text,
        tokenizer=tokenizer,
        samples=wish.samples,
        tries=wish.tries,
        options={name: getattr(options, name) for name in given.named & vars(options).keys()},
    ):
        line = done.blind(model.config)
        if line and not told:
            plain_console(stderr=True).print(
                as_typed(line, COMMAND), style="yellow", highlight=False
            )
            told = True
        if wish.json:
            print(
                to_json({"model": place.model, "precision": precision, **asdict(done)}), flush=True
            )
        else:
            sys.stdout.write(printable(done.text) + "\n")


COMMAND = Command(
    summary="Fill gaps in a text.",
    kinds=(ModelOptions, InfillOptions, SamplingOptions),
    run=_run,
    places=("model", "text"),
    sections={"model": "Model", "text": "Text", "max_new_tokens": "Sampling"},
    examples=(
        'blockdiff infill starter "The people of [[gap:6]] and of the Union"',
        'blockdiff infill runs/mdlm "We have [[gap:3-10]] the law." --tries 8 --temperature 0.7',
        "cat letter.txt | blockdiff infill runs/bd3lm - --samples 3 --json",
    ),
)
