"""Generative perplexity against entropy over temperatures.

One temperature's perplexity tells little: a colder one is always lower, and duller. Two samplers or
models are compared by their curves: at the same entropy, which has the lower perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from blockdiff.data.tokenizers import bos_id
from blockdiff.errors import InputError
from blockdiff.evaluation.options import SampleOptions
from blockdiff.evaluation.samples import (
    REAL,
    SampleQuality,
    judge_and_tokens,
    reference_texts,
    sample_quality,
)
from blockdiff.models.denoiser import Denoiser
from blockdiff.progress import advance
from blockdiff.sampling.generate import Generation, generate_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.prompts import continuation

# Texts written at once.
ROWS = 64


def measure_frontier(
    model: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    wish: SampleOptions,
    options: SamplingOptions,
    temperatures: Sequence[float],
    texts: int,
) -> dict[str, SampleQuality]:
    """The quality of texts that are written from nothing, by temperature: "T = 0.7" and so on.

    All begin with the same seed. Beside them stands the real text of a reference, as many pieces.
    Raises `InputError` on bad input.
    """
    if wish.judge is None:
        raise InputError("perplexity over temperatures is that of a `judge`; name one")
    judge, encode = judge_and_tokens(wish)
    measure = partial(sample_quality, encode=encode, judge=judge, seed=wish.seed)
    real: list[str] = []
    if wish.reference is not None:
        real, rest, features = reference_texts(wish, texts, judge)
        measure = partial(measure, reference=rest, real_features=features)
    found = {}
    for temperature in temperatures:
        done = _written(model, replace(options, temperature=temperature), tokenizer, texts)
        written = [continuation(tokenizer, [], row) for row in done.tokens]
        cost = {"nfe": done.nfe, "tokens": [len(row) for row in done.tokens],
                "seconds": done.seconds, "rejection_rate": done.rejection_rate}  # fmt: skip
        found[f"T = {temperature:g}"] = measure(written, cost=cost)
    return found | ({REAL: measure(real)} if real else {})


def _written(
    model: Denoiser, options: SamplingOptions, tokenizer: PreTrainedTokenizerBase, texts: int
) -> Generation:
    """Texts from the beginning-of-text token on, some at a time."""
    first = bos_id(tokenizer)
    if first is None:
        raise InputError("the tokenizer has no token to begin a text with: nothing can be written")
    parts = []
    label = f"{texts} texts at temperature {options.temperature:g}"
    with advance(label, texts, "texts") as done:
        for start in range(0, texts, ROWS):
            rows = list(range(start, min(start + ROWS, texts)))
            parts.append(generate_tokens(model, [[first]] * len(rows), options, rows))
            done(len(rows))
    return Generation(
        tokens=[row for part in parts for row in part.tokens],
        nfe=[n for part in parts for n in part.nfe],
        finish=[how for part in parts for how in part.finish],
        seconds=sum(part.seconds for part in parts),
    )
