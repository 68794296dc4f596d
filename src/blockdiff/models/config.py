"""Sizes and kinds of the network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import AutoConfig

from blockdiff.checks import one_of, whole_number
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout, Clean, Inside, Prediction
from blockdiff.models.denoiser import Remainder
from blockdiff.models.remote import PackagedConfig

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "cond_size")

# About 1M, 4M and 5M parameters without embeddings; `small` and `medium` are the paper's size and
# GPT-2 medium's.
PRESETS: dict[str, dict[str, int]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "nano": (128, 5, 2, 32),
        "slim": (192, 10, 3, 48),
        "micro": (256, 6, 4, 64),
        "small": (768, 12, 12, 128),
        "medium": (1024, 24, 16, 128),
    }.items()
}


class BlockConfig:
    """What callers ask of any network's configuration: its kind and its conventions.

    The conventions are those of `models.denoiser`. `block_sizes`: those it was trained for,
    `block_size`, its own, among them. `slides`: whether text may outgrow the context `length`,
    which is then a window that slides along.
    """

    vocab_size: int
    length: int
    block_size: int
    block_sizes: tuple[int, ...]
    causal: bool
    score: bool = False
    prompt_grid: Literal["absolute", "prompt_end"] = "absolute"
    inside_block: Inside = "bidirectional"
    clean_stream: Clean = "block"
    prediction: Prediction = "same"
    remainder: Remainder = "first"
    slides: bool = True
    chain_rank: int = 0

    @property
    def kind(self) -> str:
        """ "ar", "bd3lm", "mdlm" (L' = L) or "sedd" (L' = L, scores)."""
        if self.causal:
            return "ar"
        if self.score:
            return "sedd"
        return "mdlm" if self.block_size == self.length else "bd3lm"

    @property
    def next_from_cache(self) -> bool:
        return self.prediction == "shift"

    def choose_block_size(self, block_size: int | None = None, length: int | None = None) -> int:
        """The block size asked for, the model's own for None; checked against `length`.

        An AR model has blocks of one token, whatever is asked for. Warns, once for each size, when
        it is none that the model was trained with. Raises `InputError` for a size below 1 or one
        that does not divide the length (the model's own when left out).
        """
        size = self.block_size if block_size is None else whole_number("block_size", block_size)
        if length is not None and not self.slides:
            if length > self.length:
                raise InputError(
                    f"the model's context is {self.length} tokens, and the text has {length}"
                )
            if block_size is None:
                size = min(size, length)  # a whole text may be one block
        BlockLayout(self.length if length is None else length, size)
        if size not in self.block_sizes and not (block_size is None and self.kind == "mdlm"):
            known = ", ".join(map(str, self.block_sizes))
            warnings.warn(
                f"the model was trained with block size {known}, not {size}: expect it to be worse",
                stacklevel=1,
            )
        return 1 if self.causal else size

    def sampling_blocks(self, block_size: int | None = None) -> tuple[int, int]:
        """(K, how many of a block's tokens are fixed before the next): L' both, of most models.

        One trained on whole texts writes them in parts of any other size, with masks behind them.
        Raises as `choose_block_size`.
        """
        wanted = self.block_size if block_size is None else whole_number("block_size", block_size)
        whole = max(self.block_sizes) >= self.length and not (self.causal or self.score)
        if whole and wanted not in self.block_sizes:
            return self.length, min(wanted, self.length)
        size = self.choose_block_size(block_size)
        return size, size

    def layout_of(
        self,
        length: int,
        block_size: int | None = None,
        *,
        documents: Tensor | None = None,
        window: int | None = None,
        offset: int = 0,
    ) -> BlockLayout:
        """`length` positions in blocks of `block_size`, the model's own by default.

        Under the model's conventions; for the rest see `BlockLayout`.
        """
        return BlockLayout(
            length,
            self.block_size if block_size is None else block_size,
            window,
            documents,
            clean=self.clean_stream,
            inside=self.inside_block,
            prediction="same" if self.causal else self.prediction,
            offset=offset,
        )

    @property
    def layout(self) -> BlockLayout:
        return self.layout_of(self.length)


class DiTConfig(BlockConfig, PackagedConfig):
    """Sizes and kind of a `DiT`.

    `length` is the training context L and `block_size` L'; `causal` makes it AR (block size 1).
    `block_sizes`: all that it is trained for, `block_size` among them.
    `mask_token_id`, the last id by default, is never predicted by any kind. `adaln` adds the
    modulations, which see σ only with `time_conditioning` (otherwise σ = 0 and they are constants).
    `score` says that the logits are SEDD's unnormalised scores and are trained by score entropy.
    `keep_first`: position 0 is never masked and has no loss. `clip`: the (β, ω) a clipped run was
    last trained with, for information. `initial_shift`: standard deviation of the adaLN shifts at
    initialisation. `initial_gate`: the adaLN gates there; 0 makes every layer start as the
    identity, 1 as a plain transformer layer. `objective`: the name of what it is trained by (see
    `laws.Objective`); by default that of its kind. `clean_stream`: what a clean token sees of
    its block, all of it or, "causal", the tokens up to itself. `prediction`: whether the logits at
    i are for token i or, "shift", for token i + 1, the clean stream predicting the first token of
    each block; blocks of one token are then exactly AR. `chain_rank`: of the chain that a drafter
    adds (`models.chain`); 0 is none.

    Example:
        >>> import blockdiff
        >>> blockdiff.DiTConfig(vocab_size=300, length=32, block_size=4).kind
        'bd3lm'
    """

    model_type = "blockdiff"
    model_class = "DiT"

    def __init__(
        self,
        vocab_size: int = 50258,
        length: int = 1024,
        block_size: int = 16,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        cond_size: int = 128,
        dropout: float = 0.1,
        causal: bool = False,
        adaln: bool = True,
        time_conditioning: bool = False,
        score: bool = False,
        keep_first: bool = True,
        mask_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        initial_shift: float = 0.0,
        initial_gate: float = 0.0,
        clip: tuple[float, float] | None = None,
        objective: str | None = None,
        clean_stream: Clean = "block",
        block_sizes: Sequence[int] | None = None,
        prediction: Prediction = "same",
        chain_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.length = length
        self.block_size = 1 if causal else block_size
        self.block_sizes = (self.block_size,) if causal else _sizes(block_size, block_sizes)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.cond_size = cond_size
        self.dropout = dropout
        self.causal = causal
        self.adaln = adaln and not causal
        self.time_conditioning = time_conditioning
        self.score = score
        self.prediction = "shift" if causal else prediction
        self.keep_first = keep_first or prediction == "shift"  # which predicts no token 0
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.initial_shift = initial_shift
        self.initial_gate = initial_gate
        self.clip = list(clip) if clip is not None else None
        self.objective = objective or self.kind
        self.clean_stream = "causal" if causal else clean_stream
        self.chain_rank = chain_rank
        _check_sizes(self)
        for name in ("tie_word_embeddings", "inside_block"):
            kwargs.pop(name, None)
        if causal:
            self.inside_block = "causal"
        super().__init__(**kwargs)
        self.tie_word_embeddings = False


def _sizes(own: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """Block sizes, ascending; `InputError` where the model's own is none of them."""
    found = tuple(sorted(sizes or (own,)))
    if own not in found:
        raise InputError(f"block_size {own} is none of block_sizes {list(found)}")
    return found


def _check_sizes(config: DiTConfig) -> None:
    for name in ("vocab_size", "length", "block_size", "hidden_size", "num_hidden_layers"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.hidden_size % (2 * config.num_attention_heads):
        raise InputError(
            f"hidden_size {config.hidden_size} must be an even multiple of the "
            f"{config.num_attention_heads} heads (RoPE turns pairs)"
        )
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout {config.dropout} must be at least 0 and under 1")
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise InputError(
            f"mask token id {config.mask_token_id} is outside the vocabulary of {config.vocab_size}"
        )
    one_of("clean_stream", config.clean_stream, get_args(Clean))
    one_of("prediction", config.prediction, get_args(Prediction))
    whole_number("chain_rank", config.chain_rank, 0)
    if config.prediction == "shift" and config.clean_stream != "causal":
        raise InputError("prediction shift needs a causal clean_stream, which predicts as AR does")
    if config.prediction == "shift" and (config.time_conditioning or config.score):
        raise InputError(
            "prediction shift reads logits off the clean stream, which knows no time: leave "
            "time_conditioning and score out"
        )
    for size in config.block_sizes:
        BlockLayout(config.length, size)
    if config.score and config.block_size != config.length:
        raise InputError(
            f"a SEDD model has one block: block_size {config.block_size} must be the length "
            f"{config.length}"
        )
    if config.time_conditioning and not config.adaln:
        raise InputError("time_conditioning needs adaln: it is adaLN that reads the time")


AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
