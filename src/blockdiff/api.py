"""The package in three calls: open a model, write text with it, watch it write.

model, tokenizer = blockdiff.load("runs/demo/bd3lm")
blockdiff.generate(model, "The function returns", tokenizer=tokenizer).texts[0]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from blockdiff.data.loading import load
from blockdiff.data.tokenizers import bos_id
from blockdiff.errors import InputError
from blockdiff.models.dit import DiT
from blockdiff.sampling.generate import Generation, Step, generate_tokens, stream_tokens
from blockdiff.sampling.options import SamplingOptions

__all__ = ["TextGeneration", "encode_prompts", "generate", "load", "stream", "to_text"]

Prompts = None | str | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class TextGeneration(Generation):
    """Finished rows as text; `texts` without the prompts and special tokens."""

    texts: list[str]


def stream(
    model: DiT,
    prompts: Prompts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    rows: Sequence[int] | None = None,
    options: SamplingOptions | None = None,
    **changes: object,
) -> Iterator[Step]:
    """Yields a `Step` after every network evaluation; takes what `generate` takes."""
    ids = encode_prompts(model, prompts, tokenizer, samples)
    return stream_tokens(model, ids, options or SamplingOptions(**changes), rows)  # type: ignore[arg-type]


def generate(
    model: DiT,
    prompts: Prompts = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    rows: Sequence[int] | None = None,
    options: SamplingOptions | None = None,
    **changes: object,
) -> TextGeneration:
    """Prompt in, text out.

    `prompts`: a text, several, rows of token ids, or nothing to start at the beginning of a text;
    any lengths. `samples`: rows per prompt. The fields of `SamplingOptions` may be given as
    keywords (max_new_tokens=64, top_p=0.9, seed=1, …). A row's text depends on the seed and its
    number only: `rows=[3]` gives the fourth row of a batch alone. Raises `InputError` on bad input.
    """
    ids = encode_prompts(model, prompts, tokenizer, samples)
    options = options or SamplingOptions(**changes)  # type: ignore[arg-type]
    return to_text(generate_tokens(model, ids, options, rows), ids, tokenizer)


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


def continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]
) -> str:
    """The text of the `new` tokens as it reads after the prompt.

    Tokenizers that mark words rather than spaces (WordPiece, SentencePiece) drop the space before
    the first token they are given, so the new tokens are decoded along with the prompt's last.
    """
    special = set(tokenizer.all_special_ids)
    before = [token for token in prompt if token not in special][-8:]
    alone = str(tokenizer.decode(before, clean_up_tokenization_spaces=False))
    both = tokenizer.decode(
        before + [token for token in new if token not in special],
        clean_up_tokenization_spaces=False,
    )
    if not str(both).startswith(alone):  # a character whose bytes the prompt only begins
        return str(tokenizer.decode(list(new), skip_special_tokens=True))
    return str(both)[len(alone) :]


def encode_prompts(
    model: DiT,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int = 1,
) -> list[list[int]]:
    """Token ids of every row, `samples` rows a prompt.

    Texts start with the tokenizer's beginning-of-text token (its end-of-text token where it has
    none: what follows one is the beginning of a text). Rows of ids are taken as they are.
    """
    if samples < 1:
        raise InputError(f"samples is {samples}; it must be at least 1")
    if prompts is None:
        prompts = ""
    if isinstance(prompts, str):
        prompts = [prompts]
    rows = [_encode(model, prompt, tokenizer) for prompt in prompts]
    return [row for row in rows for _ in range(samples)]


def _encode(
    model: DiT, prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError("the prompt is not valid UTF-8; save or type it as UTF-8") from None
    else:
        return [int(token) for token in prompt]
    first = bos_id(tokenizer) if tokenizer is not None else model.config.bos_token_id
    start = [] if first is None else [first]
    if not prompt:
        if not start:
            raise InputError("the tokenizer has no token to begin a text with; give a prompt")
        return start
    if tokenizer is None:
        raise InputError("a text prompt needs the model's tokenizer")
    if tokenizer.mask_token and tokenizer.mask_token in prompt:
        raise InputError(
            f"the prompt contains the mask token {tokenizer.mask_token!r}; take it out"
        )
    return start + list(tokenizer.encode(prompt, add_special_tokens=False))
