"""What an adapted model is, beside its base model's own configuration."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

from blockdiff.checks import one_of
from blockdiff.errors import InputError
from blockdiff.models.config import BlockConfig

PREDICTIONS = ("shift", "same")
CLEAN_STREAMS = ("causal", "block")


class AdaptedConfig(BlockConfig, PreTrainedConfig):
    """The base model's sizes, and the conventions of `models.denoiser` as fields.

    `record` is what config.json of an adapted folder keeps of it under "block_diffusion". `causal`:
    a plain autoregressive model, which has no such record. `length` is the context, which text
    cannot outgrow (`slides` is false): a base model may know no position beyond it.
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
        block_sizes: tuple[int, ...] | None = None,
        mask_token_id: int = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        causal: bool = False,
        keep_first: bool = True,
        prediction: Literal["same", "shift"] = "shift",
        clean_stream: Literal["block", "causal"] = "causal",
        inside_block: Literal["bidirectional", "causal"] = "bidirectional",
        prompt_grid: Literal["absolute", "prompt_end"] = "absolute",
        objective: str | None = None,
        clip: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        one_of("prediction", prediction, PREDICTIONS)
        one_of("clean", clean_stream, CLEAN_STREAMS)
        if not causal and not 0 <= mask_token_id < vocab_size:
            raise InputError(
                f"mask token id {mask_token_id} is outside the vocabulary of {vocab_size}"
            )
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.causal, self.score, self.time_conditioning = causal, False, False
        self.block_size = 1 if causal else block_size
        self.block_sizes = (self.block_size,) if causal else tuple(block_sizes or (block_size,))
        self.length = length - length % self.block_size
        if self.length < 1:
            raise InputError(f"block size {block_size} is more than the context of {length} tokens")
        self.mask_token_id = mask_token_id
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.keep_first = keep_first
        self.prediction, self.clean_stream = prediction, clean_stream
        self.inside_block, self.prompt_grid = inside_block, prompt_grid
        self.clip = None if clip is None else list(clip)
        self.objective = objective or self.kind
        super().__init__(**kwargs)

    def record(self) -> dict[str, Any]:
        """The fields that the base model's configuration does not have."""
        names = (
            "block_size block_sizes length mask_token_id prediction clean_stream inside_block "
            "prompt_grid keep_first objective clip"
        )
        return {name: getattr(self, name) for name in names.split()}
