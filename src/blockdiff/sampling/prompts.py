"""From texts to token ids and back, as prompts and their continuations are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

from blockdiff.data.tokenizers import bos_id
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser


def listing(values: Any) -> list[Any]:
    """What is in a list, tuple, tensor or array of prompts or ids, as Python's own."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, bytes | Mapping | set) or not isinstance(values, Iterable):
        raise InputError(
            f"`prompts` holds {type(values).__name__}; it must be a text, several, or rows of ids"
            + (": give its input_ids" if isinstance(values, Mapping) else "")
        )
    return list(values)


def encode(
    model: Denoiser, prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """The token ids of a text, its beginning-of-text token before it; ids are taken as they are.

    Raises `InputError` for what is neither, or cannot be encoded.
    """
    if not isinstance(prompt, str):
        ids = listing(prompt)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise InputError(
                    f"`prompts` holds a row with {token!r}; it must be a text, or a row of ids, "
                    "which are whole numbers"
                )
        return [int(token) for token in ids]
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid UTF-8; save or type it as UTF-8") from None
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


def encode_pair(
    model: Denoiser, context: Any, continuation: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[int], list[int]]:
    """The tokens of a beginning and of what follows it."""
    if not isinstance(context, str) or not isinstance(continuation, str):
        raise InputError("`context` and `continuation` must be texts, or lists of texts")
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before = encode(model, bare, tokenizer)
    if not continuation:
        return before, []
    whole = encode(model, bare + continuation, tokenizer)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    start = len(encode(model, "", tokenizer))  # a token reaches across the seam: both apart
    return before, encode(model, continuation, tokenizer)[start:]


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
