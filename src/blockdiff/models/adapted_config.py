"""What an adapted model is, beside its base model's own configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from blockdiff.checks import one_of, whole_number, whole_numbers
from blockdiff.errors import InputError
from blockdiff.layout import Clean, Inside, Prediction
from blockdiff.models.config import BlockConfig
from blockdiff.models.denoiser import Remainder

PromptGrid = Literal["absolute", "prompt_end"]
RECORDED = (
    *("block_size", "block_sizes", "length", "mask_token_id", "bos_token_id", "eos_token_id"),
    *("prediction", "clean_stream", "inside_block", "prompt_grid", "keep_first"),
    "remainder",
    *("objective", "clip", "chain_rank", "draft_rank"),
)


class AdaptedConfig(BlockConfig, PreTrainedConfig):
    """The base model's sizes, and the conventions of `models.denoiser` as fields.

    `record` is what config.json of an adapted folder keeps of it under "block_diffusion". `causal`:
    a plain autoregressive model, which has no such record. `length` is the context, which text
    cannot outgrow (`slides` is false): a base model may know no position beyond it. `draft_rank`:
    of the pairs that only noised tokens go through (`models.gated`); 0 is none.
    """

    model_type = "blockdiff_adapted"
    slides = False

    def __init__(
        self,
        vocab_size: int = 1,
        length: int = 8,
        hidden_size: int = 1,
        num_hidden_layers: int = 1,
        block_size: int = 8,
        block_sizes: Sequence[int] | None = None,
        mask_token_id: int = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        causal: bool = False,
        keep_first: bool = True,
        prediction: Prediction = "shift",
        clean_stream: Clean = "causal",
        inside_block: Inside = "bidirectional",
        prompt_grid: PromptGrid = "absolute",
        remainder: Remainder = "first",
        objective: str | None = None,
        clip: tuple[float, float] | None = None,
        chain_rank: int = 0,
        draft_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        if not causal and (prediction, prompt_grid) == ("shift", "prompt_end"):
            raise InputError(
                "prediction shift reads whole blocks before one: give it an absolute grid"
            )
        one_of("prediction", prediction, get_args(Prediction))
        one_of("clean", clean_stream, get_args(Clean))
        one_of("inside_block", inside_block, get_args(Inside))
        one_of("prompt_grid", prompt_grid, get_args(PromptGrid))
        one_of("remainder", remainder, get_args(Remainder))
        if not causal and whole_number("mask_token_id", mask_token_id, 0) >= vocab_size:
            raise InputError(
                f"mask token id {mask_token_id} is outside the vocabulary of {vocab_size}"
            )
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.causal, self.score, self.time_conditioning = causal, False, False
        self.length = whole_number("length", length)
        self.use_blocks((1,) if causal else (block_size, *(block_sizes or ())))
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.prediction, self.clean_stream = prediction, clean_stream
        self.keep_first = keep_first or prediction == "shift"  # which predicts no token 0
        self.inside_block, self.prompt_grid = inside_block, prompt_grid
        self.remainder = remainder
        self.clip = None if clip is None else list(clip)
        self.objective = objective or self.kind
        self.chain_rank = whole_number("chain_rank", chain_rank, 0)
        self.draft_rank = whole_number("draft_rank", draft_rank, 0)
        if draft_rank and (prediction, clean_stream) != ("shift", "causal"):
            raise InputError(
                "`draft` leaves the clean stream what it was: it needs prediction shift and a "
                "causal clean stream"
            )
        super().__init__(**kwargs)
        # Last: transformers warns of an id behind the vocabulary's end, which AR has for no token.
        self.mask_token_id = mask_token_id

    def use_blocks(self, block_sizes: Sequence[int]) -> None:
        """Makes these the block sizes; the context becomes a multiple of each.

        Raises `InputError` for sizes that it has no room for.
        """
        sizes = tuple(sorted(whole_numbers("block_size", list(dict.fromkeys(block_sizes)))))
        common, known = math.lcm(*sizes), self.length
        self.block_size, self.block_sizes = sizes[-1], sizes
        self.length -= self.length % common
        if not self.length:
            raise InputError(f"block size {common} is more than the context of {known} tokens")

    def record(self) -> dict[str, Any]:
        """The fields that the base model's configuration does not have."""
        return {name: getattr(self, name) for name in RECORDED}
