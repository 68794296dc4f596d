"""Whether options and a prompt fit a model, before it is asked for anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockdiff.checks import whole_number
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Conventions
from blockdiff.registry import ORDERS
from blockdiff.sampling.options import NEED_TOKENIZER, SamplingOptions
from blockdiff.sampling.orders.base import Order
from blockdiff.sampling.twins import prompt_of_twin


@dataclass(frozen=True)
class Fit:
    """How rows with the same options are sampled.

    `size`: K. `part`: the size of the parts a block is fixed in, 0 for none. `twins`: the prompts
    of the rows' twins, where they have some.
    """

    order: Order
    size: int
    part: int
    twins: list[list[int]]


def fitted(
    config: Conventions,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    numbers: Sequence[int] | None = None,
    behind: Sequence[int] | None = None,
    are_twins: bool = False,
) -> Fit:
    """What the options come to; raises `InputError` where they or a prompt do not fit the model.

    `numbers`, `behind`: of each row its number and how much text comes after what is written.
    """
    if not isinstance(options, SamplingOptions):
        raise InputError(f"`options` is {type(options).__name__}; give a SamplingOptions")
    order = ORDERS.find(options.sampler, "sampler")
    for number in numbers or ():
        whole_number("number", number, 0)
    size, part = check_options(config, options, order)
    twins: list[list[int]] = []
    if not are_twins:
        for prompt, tail in zip(prompts, behind or [0] * len(prompts), strict=True):
            check_prompt(config, prompt, options, tail)
        if options.cfg_scale:
            twins = [prompt_of_twin(config, prompt, size) for prompt in prompts]
    return Fit(order, size, part, twins)


def check_options(config: Conventions, options: SamplingOptions, order: Order) -> tuple[int, int]:
    """The block size K to sample with, and the size of the parts it is fixed in, 0 for none.

    Raises `InputError` for options that do not fit the model.
    """
    if order.only not in (None, config.kind):
        raise InputError(
            f"the {order.name} sampler reads the scores of {str(order.only).upper()}, and this is "
            f"{config.kind}: use first_hitting or ancestral"
        )
    if order.edits and (config.kind == "sedd" or config.inside_block == "causal"):
        raise InputError(
            f"the {order.name} sampler asks how probable a token is that the network sees, of "
            "which this model says nothing: use threshold"
        )
    for name in NEED_TOKENIZER:
        if getattr(options, name) is not None:
            raise InputError(
                f"`{name}` needs a tokenizer: use `generate` or `stream` with one, or give what "
                "`sampling.guides.bound` makes of the options"
            )
    biased: Any = options.logit_bias or {}
    if biased and max(biased) >= config.vocab_size:
        raise InputError(
            f"`logit_bias` names the token {max(biased)}; the model has {config.vocab_size}"
        )
    if list(biased.values()).count(-math.inf) >= config.vocab_size - 1:
        raise InputError("`logit_bias` bans every token; leave some")
    if order.verifies:
        check_verifiable(config, options)
        return 1, 0
    size, part = config.sampling_blocks(options.block_size)
    if options.sub_block is not None and options.sub_block > part:
        raise InputError(
            f"`sub_block` {options.sub_block} is no part of a block of {part}; give a smaller one"
        )
    part = part if options.sub_block is None else options.sub_block
    return size, part * (part < size)


def check_verifiable(config: Conventions, options: SamplingOptions) -> None:
    """Raises `InputError` for a model that has no L' = 1 to verify with, beside its drafts."""
    if options.block_size not in (None, 1):
        raise InputError(
            "the verified sampler writes what L' = 1 would: leave `block_size` out (`drafts` says "
            "how many tokens it drafts)"
        )
    if options.cfg_scale:
        raise InputError("the verified sampler takes no `cfg_scale`; leave it out")
    if config.causal:
        if options.drafter == "masks":
            raise InputError("an AR model has no masks to draft with: use the `drafter` table")
        return
    if config.clean_stream != "causal":
        raise InputError(
            "the verified sampler needs a causal clean stream, and this model's is block-causal: "
            "train one with --clean causal --block-size 1,4 (or adapt one with --clean causal)"
        )
    if config.prediction == "same" and 1 not in config.block_sizes:
        known = ", ".join(map(str, config.block_sizes))
        raise InputError(
            f"the verified sampler verifies at L' = 1, and this model was trained with {known}: "
            f"train one with --block-size 1,{known.replace(' ', '')} --clean causal"
        )
    if config.kind in ("mdlm", "sedd") or config.time_conditioning:
        raise InputError(
            f"the verified sampler verifies at L' = 1, which {config.kind} with "
            f"{'the time as an input' if config.time_conditioning else 'one block'} has not: "
            "use first_hitting"
        )
    if config.inside_block == "causal":
        raise InputError(
            "the verified sampler drafts in bidirectional blocks, and this model's are causal: use "
            "threshold"
        )
    if options.drafter == "masks" and max(config.block_sizes) == 1:
        raise InputError(
            "a model of block size 1 has no masks to draft with: use the `drafter` table"
        )


def check_prompt(
    config: Conventions, prompt: Sequence[int], options: SamplingOptions, behind: int = 0
) -> None:
    """Raises `InputError` for a prompt that does not fit the model, or its options.

    `behind`: how many tokens of the text come after what is written.
    """
    ids = np.asarray(prompt)
    # Numbers past int64 make an array of objects; they are refused below, as outside.
    whole = ids.dtype.kind in "iu" or all(isinstance(token, int) for token in ids.flat)
    if ids.ndim != 1 or not whole:
        raise InputError("a prompt is no row of token ids, which are whole numbers")
    if not len(prompt):
        raise InputError("an empty prompt: start it with the beginning-of-text token")
    if config.mask_token_id in prompt and not config.causal:
        raise InputError("a prompt contains the mask token; take it out")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise InputError(
            f"a prompt's token ids run outside the model's vocabulary of {config.vocab_size}; "
            "is this the model's tokenizer?"
        )
    longest = len(prompt) + options.max_new_tokens + behind
    if not config.slides and longest > config.length:
        raise InputError(
            f"the model's context is {config.length} tokens; prompt and new tokens come to "
            f"{longest}: lower `max_new_tokens`"
        )
    one_block = longest <= config.length and (
        {options.block_size, options.sub_block} <= {None, config.length}
    )
    if config.kind == "sedd" and not one_block:
        raise InputError(
            f"SEDD writes within its context of {config.length} tokens, in one block; prompt "
            f"and new tokens come to {longest}: lower `max_new_tokens`"
        )
