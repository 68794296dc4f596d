"""What may be asked of a network; types only.

Objectives, likelihood, engine and trainer know a network by what stands here, never by its class.
What tells one published block diffusion model from another are fields of its configuration, the
conventions:

    mask_token_id   what a masked position holds
    block_size      L' it was trained for
    prompt_grid     where the first block of new text begins: "absolute", at a multiple of L', or
                    "prompt_end", right behind the prompt
    inside_block    what a token sees of its own block: "bidirectional" or "causal"
    clean_stream    what a clean token sees of x_0: up to the end of its "block", or "causal", up to
                    itself
    prediction      the logits at i are for token i ("same") or for token i + 1 ("shift", as in AR)
    remainder       where a number of steps does not divide a block's tokens: the "first" steps fix
                    one more each; "rounded", each step fixes its share of what is left; or each
                    rounds that down, and the "last" fixes the rest
    next_from_cache whether caching a finished block also yields the token after it

Shapes: B batch, R draws, L positions, n rows, T tokens of one evaluation, P chosen positions,
V vocabulary, N blocks, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from blockdiff.cache import BlockCache
from blockdiff.layout import BlockLayout
from blockdiff.models.chain import Chain
from blockdiff.models.ngrams import Table

Remainder = Literal["first", "rounded", "last"]


@dataclass
class DenoiserOutput(ModelOutput):
    """What a forward pass gives.

    `logits` [R·B, L, V], or [P, V] at the P chosen positions in row-major order. `nll` [P]: −log p
    of the targets under SUBS (for SEDD their score entropy), in nats, instead of logits when
    targets were given. `loss`: the mean nats per counted token, alone, when labels were given
    (`models.pretrained`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    nll: Tensor | None = None


@dataclass
class Context:
    """Rotated keys and values [B, H, L, D] of the clean stream, one pair a layer.

    `hidden` [B, L, E]: its last hidden states, where the prediction is "shift".
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor | None = None


class Conventions(Protocol):
    """The part of a configuration that callers read; see the module's text."""

    vocab_size: int
    length: int
    hidden_size: int
    num_hidden_layers: int
    mask_token_id: int
    bos_token_id: int | None
    eos_token_id: int | None
    time_conditioning: bool
    keep_first: bool
    clip: list[float] | None
    objective: str
    block_size: int
    causal: bool

    @property
    def kind(self) -> str: ...

    block_sizes: tuple[int, ...]
    slides: bool
    prompt_grid: Literal["absolute", "prompt_end"]
    inside_block: Literal["bidirectional", "causal"]
    clean_stream: Literal["block", "causal"]
    prediction: Literal["same", "shift"]
    remainder: Remainder

    @property
    def next_from_cache(self) -> bool: ...
    def choose_block_size(
        self, block_size: int | None = None, length: int | None = None
    ) -> int: ...
    def sampling_blocks(self, block_size: int | None = None) -> tuple[int, int]: ...
    def layout_of(
        self,
        length: int,
        block_size: int | None = None,
        *,
        documents: Tensor | None = None,
        window: int | None = None,
        offset: int = 0,
    ) -> BlockLayout: ...


class Denoiser(Protocol):
    """A network that denoises blocks; `DiT` is one."""

    # Which ids of the vocabulary stand for a token, bool [V]; None where all do. `load` sets it.
    drawable: Tensor | None
    draft_table: Table | None
    # Whether a sampler on CUDA records its evaluations as graphs (`sampling.recorded`): all that
    # hangs on the cache but its tensors, such as the positions of its tokens, is in the mask.
    graphs: bool
    # What a drafter adds to its logits, by the token before (`models.chain`); None where untrained.
    chain: Chain | None
    training: bool

    @property
    def config(self) -> Conventions: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(
        self,
        input_ids: Tensor,
        x_0: Tensor | None = None,
        *,
        layout: BlockLayout | None = None,
        sigma: Tensor | None = None,
        context: Context | None = None,
        at: Tensor | None = None,
        clean_at: Tensor | None = None,
        previous: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> DenoiserOutput:
        """Logits, or nll of `targets` [P], at the positions `at` bool [R·B, L], or everywhere.

        The blocks of x_t, `input_ids` int64 [R·B, L], read the clean blocks before them, those of
        `x_0` int64 [B, L] or of the `context` that `encode(x_0)` gave: row r·B + i of x_t is a
        noised copy of row i of x_0. Without either, x_t is a single stream, under M_BD where the
        layout has one block, else under M_BC. `layout`: blocks, window and documents; the
        configuration's blocks when left out. `sigma` [R·B] or [R·B, N]: read where the network is
        conditioned on time. `clean_at` bool [B, L], where the prediction is "shift": tokens, never
        the first, that the clean stream is to predict as well, as AR does; their logits, or nll of
        the Q further targets, come after those of `at`. `previous` int64 [P]: the tokens before
        those at `at`; the chain, where there is one, adds its logits.
        """
        ...

    def encode(self, x_0: Tensor, layout: BlockLayout | None = None) -> Context:
        """Keys and values of the clean stream of x_0 int64 [B, L]."""
        ...

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        cache: BlockCache,
        at: Tensor,
        *,
        mask: Tensor | None = None,
        clean: int = 0,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Logits [P, V] of one evaluation of tokens x int64 [n, T] after their cached prefixes.

        `positions` int64 [n, T]. `at` int64 [P]: where logits are wanted, column t of row i as
        i·T + t. `mask`: what `cache.visible` gave. The first `clean` columns are clean tokens, the
        others noised ones at `sigma` [n]. Keys and values stay staged for `cache.append_staged`.
        """
        ...

    def new_cache(self, rows: int, capacity: int, block_size: int) -> BlockCache:
        """Room for the keys and values of `capacity` clean tokens of each of `rows` rows."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def eval(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...
