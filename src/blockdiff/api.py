"""The package in three calls: open a model, write text with it, watch it write.

model, tokenizer = blockdiff.load("runs/demo/bd3lm")
blockdiff.generate(model, "The function returns", tokenizer=tokenizer).texts[0]
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, TypeVar, Unpack

from torch import nn
from transformers import PreTrainedTokenizerBase

from blockdiff.checks import numbers
from blockdiff.errors import InputError
from blockdiff.evaluation.score import score_tokens
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import load
from blockdiff.sampling.defaults import options_for
from blockdiff.sampling.generate import Generation, generate_tokens, stream_tokens
from blockdiff.sampling.guides import bound
from blockdiff.sampling.options import (
    SamplingKeywords,
    SamplingOptions,
    given_settings,
    implied_sampler,
    translated,
)
from blockdiff.sampling.prompts import continuation as continuation
from blockdiff.sampling.prompts import encode, encode_pair, listing
from blockdiff.sampling.step import Step

__all__ = ["TextGeneration", "encode_prompts", "generate", "load", "stream", "to_text"]

Prompts = None | str | Sequence[str] | Sequence[Sequence[int]]
Options = SamplingOptions | Mapping[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class TextGeneration(Generation):
    """Finished rows as text; `texts` without the prompts and special tokens.

    A notebook shows the texts and what they cost.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> done = blockdiff.generate(model, "Return", tokenizer=tokenizer, max_new_tokens=4)
        >>> len(done.texts), done.finish, len(done.tokens[0])
        (1, ['length'], 4)
    """

    texts: list[str]

    def summary(self) -> str:
        """Tokens, network evaluations, speed and what was given up, in a line."""
        return (
            f"{sum(map(len, self.tokens))} tokens, {sum(self.nfe)} network evaluations, "
            f"{self.tokens_per_second:.1f} tokens/s, {self.tokens_per_nfe:.2f} an evaluation, "
            f"{self.rejection_rate:.0%} rejected"
        )

    def _repr_html_(self) -> str:
        texts = "".join(
            f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>' for text in self.texts
        )
        return f"<div>{texts}<small>{self.summary()}</small></div>"


def _listed(function: Function) -> Function:
    """Shows the fields of `SamplingOptions` as the keywords they are, in `help()` and editors."""
    own = inspect.signature(function)
    keywords = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in fields(SamplingOptions)
    ]
    others = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=[*others, *keywords])  # type: ignore[attr-defined]
    return function


@_listed
def stream(
    model: Denoiser,
    prompts: Prompts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    rows: Sequence[int] | None = None,
    options: Options | None = None,
    **changes: Unpack[SamplingKeywords],
) -> Iterator[Step]:
    """Yields a `Step` after every network evaluation; takes what `generate` takes.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> for step in blockdiff.stream(model, "Return", tokenizer=tokenizer, max_new_tokens=3):
        ...     print(step.nfe.item(), int(step.fixed.sum()), step.done.item())
        1 1 False
        2 1 False
        3 1 True
    """
    ids = encode_prompts(model, prompts, tokenizer, samples)
    wish = bound(merge_options(options, model=model, **changes), model, tokenizer)
    return stream_tokens(model, ids, wish, rows)


@_listed
def generate(
    model: Denoiser,
    prompts: Prompts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    rows: Sequence[int] | None = None,
    options: Options | None = None,
    **changes: Unpack[SamplingKeywords],
) -> TextGeneration:
    """Prompt in, text out.

    `prompts`: a text, several, rows of token ids, or nothing to start at the beginning of a text;
    any lengths. `samples`: rows per prompt. The fields of `SamplingOptions` are given as keywords
    (max_new_tokens=64, top_p=0.9, seed=1, …), in `options` (a `SamplingOptions` or a mapping), or
    both: keywords come first. What neither says is as the model's folder asks (the key `blockdiff`
    of its generation_config.json), except that a `SamplingOptions` says everything. A row's text
    depends on the seed and its number only: `rows=[3]` gives the fourth row of a batch alone.
    Raises `InputError` on bad input.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> done = blockdiff.generate(
        ...     model, ["Return the", "This"], tokenizer=tokenizer, max_new_tokens=8, seed=1
        ... )
        >>> [len(tokens) for tokens in done.tokens]
        [8, 8]
    """
    ids = encode_prompts(model, prompts, tokenizer, samples)
    wish = bound(merge_options(options, model=model, **changes), model, tokenizer)
    return to_text(generate_tokens(model, ids, wish, rows), ids, tokenizer)


def merge_options(
    options: Options | None = None, *, model: Any = None, **changes: Unpack[SamplingKeywords]
) -> SamplingOptions:
    """`options` with the keywords' changes; raises `InputError` for what is no option.

    What neither says is what the folder of `model` asks for (`sampling.defaults`), but for a
    `SamplingOptions`, which says everything. Other programs' words are understood, too: see
    `ALIASES` in `blockdiff.sampling.options`.
    """
    whole = isinstance(options, SamplingOptions)
    if isinstance(options, SamplingOptions):
        options = vars(options)
        chosen = options["sampler"]
        if isinstance(chosen, str) and chosen == implied_sampler(given_settings(options)):
            options = options | {"sampler": "auto"}  # as where none was chosen
    elif options is not None and not isinstance(options, Mapping):
        raise InputError(
            f"`options` is {type(options).__name__}; it must be a SamplingOptions or a mapping of "
            "its fields"
        )
    wish = translated(options or {}) | translated(changes)
    known = [field.name for field in fields(SamplingOptions)]
    for name in wish.keys() - known:
        raise InputError(f"there is no sampling option {name!r}; there are {', '.join(known)}")
    return SamplingOptions(**wish) if whole else options_for(model, wish)


def to_text(
    done: Generation,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> TextGeneration:
    """Adds the decoded texts; empty ones without a tokenizer."""
    texts = [
        "" if tokenizer is None else continuation(tokenizer, prompt, row)
        for prompt, row in zip(prompts, done.tokens, strict=True)
    ]
    return TextGeneration(**vars(done), texts=texts)


def encode_prompts(
    model: Denoiser,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int = 1,
) -> list[list[int]]:
    """Token ids of every row, `samples` rows a prompt.

    Texts start with the tokenizer's beginning-of-text token (its end-of-text token where it has
    none: what follows one is the beginning of a text). Rows of ids are taken as they are. Raises
    `InputError` for what is neither.
    """
    if not isinstance(model, nn.Module):
        hint = "; load gives the model and its tokenizer" if isinstance(model, tuple) else ""
        raise InputError(f"`model` is {type(model).__name__}; it must be an opened model{hint}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise InputError(
            f"`tokenizer` is {type(tokenizer).__name__}; it must be the opened tokenizer"
        )
    numbers(samples=samples)
    if prompts is None:
        prompts = ""
    given = [prompts] if isinstance(prompts, str) else listing(prompts)
    if given and all(isinstance(prompt, Integral) for prompt in given):
        raise InputError(
            "`prompts` is a list of ids; it must be a text, several, or rows of ids: put the ids "
            "of a row in a list of their own, [[1, 2, 3]]"
        )
    rows = [encode(model, prompt, tokenizer) for prompt in given]
    return [row for row in rows for _ in range(samples)]


def score(
    model: Denoiser,
    context: str | Sequence[str],
    continuation: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Any:
    """How likely a continuation is, given its beginning: a `Score`.

    A list of either, or of both, gives a list of `Score`s; one context may have several
    continuations. Beginnings start with the tokenizer's beginning-of-text token, as prompts do, and
    blanks at the end of one are counted as part of the continuation, since most tokenizers join a
    blank with the word behind it. `options`: those of `score_tokens`, for example `draws`, `seed`,
    `greedy`. Raises `InputError` on bad input.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> good, bad = blockdiff.score(
        ...     model, "The function returns", [" a list.", " q zx."], tokenizer=tokenizer
        ... )
        >>> good.nats < bad.nats, good.error
        (True, 0.0)
    """
    single = isinstance(context, str) and isinstance(continuation, str)
    before = [context] if isinstance(context, str) else listing(context)
    after = [continuation] if isinstance(continuation, str) else listing(continuation)
    if isinstance(context, str):
        before = before * len(after)
    elif isinstance(continuation, str):
        after = after * len(before)
    if len(before) != len(after):
        raise InputError(
            f"there are {len(before)} contexts and {len(after)} continuations; give as many"
        )
    pairs = [encode_pair(model, *pair, tokenizer) for pair in zip(before, after, strict=True)]
    found = score_tokens(model, [pair[0] for pair in pairs], [pair[1] for pair in pairs], **options)
    return found[0] if single else found
