"""Any causal language model of `transformers` as a block denoiser, through its attention interface.

    token ids → the model's own layers, with our attention in the place of its own → its own head

Nothing of a model's code is copied: positions, norms, head widths, softcaps and sliding windows
stay its own, and only who attends to whom is decided here. Both streams go through the layers as
rows of one batch: B clean rows, then R·B noised ones of L tokens each, at the positions 0 … L − 1.
A clean row attends within itself (M_BC); a noised row to the keys and values of its clean row and
to its own (M_OBC, M_BD).

With prediction "shift" the model goes on reading the logits at i − 1 for token i, as it was trained
to. The first token of a block then has nothing noised before it: the clean stream predicts it,
which is the autoregressive model itself. The other tokens of the block are diffused given it.

Shapes: B batch, R draws, L positions, T tokens of one evaluation, H heads, H_kv key/value heads,
D head width, E width, P chosen positions, V vocabulary, n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockdiff.attention import repeat
from blockdiff.cache import BlockCache, LayerShape
from blockdiff.layout import BlockLayout
from blockdiff.models.adapted_config import AdaptedConfig
from blockdiff.models.chain import chain_of
from blockdiff.models.denoiser import Context, DenoiserOutput
from blockdiff.models.gated import add_pairs, is_draft, write_draft
from blockdiff.models.loss import subs_nll
from blockdiff.models.passes import (
    INTERFACE,
    Cached,
    Pass,
    Streams,
    recomputed,
    running,
)
from blockdiff.models.pretrained import RECORD as RECORD
from blockdiff.models.pretrained import DenoiserModel
from blockdiff.models.weights import Linear


class Adapted(DenoiserModel):
    """A causal language model `lm` as a denoiser; see the module's text.

    Where `config.causal`, it is the autoregressive model that it was: `model(x_0)` gives its own
    logits, those at i for token i + 1.

    Example:
        >>> import torch, blockdiff
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_attention_heads=2, **sizes))
        >>> model = blockdiff.adapt(lm, block_size=4, mask_token_id=8)
        >>> x_0 = torch.zeros(1, 8, dtype=torch.int64)
        >>> model(torch.full_like(x_0, 8), x_0=x_0).logits.shape
        torch.Size([1, 8, 9])
    """

    config_class = AdaptedConfig
    base_model_prefix = "lm"
    config: AdaptedConfig

    def __init__(self, config: AdaptedConfig, lm: PreTrainedModel) -> None:
        super().__init__(config)
        self.lm = lm
        lm.set_attn_implementation(INTERFACE)
        self.generation_config = lm.generation_config
        for module in lm.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear  # the same map, which `convert` may store otherwise
        if config.draft_rank:
            add_pairs(lm, config.draft_rank, config.mask_token_id)
        self.chain = chain_of(config)
        self.adapter: Any = None  # where LoRA is trained: see lora.py
        self.shapes: list[LayerShape] = []  # of each layer's keys and values; the probe finds them

    # transformers' interface

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm.set_output_embeddings(value)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        given = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if not given["use_reentrant"]:
            given.setdefault("context_fn", recomputed)
        self.lm.gradient_checkpointing_enable(given, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.lm.gradient_checkpointing_disable()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Writes the base model's own folder, with a `block_diffusion` record in config.json.

        What drafts goes into a file of its own beside the model's.
        """
        state = options.pop("state_dict", None)
        if self.adapter is not None and state is None:
            state = self.adapter.merged_state(self)
        elif self.adapter is not None:  # a checkpoint: the base model has the rest
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            state = {name: x for name, x in state.items() if name in trained}
        drafts = self.chain is not None or self.config.draft_rank > 0
        if drafts:
            state = self.state_dict() if state is None else state
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_draft(state, save_directory)
            state = {name: x for name, x in state.items() if not is_draft(name)}
        if state is not None:
            options["state_dict"] = {k.removeprefix("lm."): v for k, v in state.items()}
        with _recorded(self.lm, self.config):
            self.lm.save_pretrained(save_directory, **options)

    def load_state_dict(self, state_dict: Any, *given: Any, **options: Any) -> Any:
        """Takes the names of the base model's folder as well."""
        own = "lm.", "chain."
        named = {k if k.startswith(own) else f"lm.{k}": v for k, v in state_dict.items()}
        return super().load_state_dict(named, *given, **options)

    def _resize_token_embeddings(self, *given: Any, **options: Any) -> nn.Module:
        return self.lm.resize_token_embeddings(*given, **options)

    # the network; `forward` is `DenoiserModel`'s

    def denoise(
        self,
        input_ids: Tensor,
        x_0: Tensor | None = None,
        *,
        layout: BlockLayout | None = None,
        sigma: Tensor | None = None,
        context: Context | None = None,
        at: Tensor | None = None,
        clean_at: Tensor | None = None,
        targets: Tensor | None = None,
        backend: str | None = None,
    ) -> DenoiserOutput:
        """Logits for every position of x_t, or for the chosen ones only; see `Denoiser`.

        The logits at i are for token i whatever the prediction is, but for those of an AR model.
        Position 0, which nothing comes before, has under "shift" the logits that predict token 1.
        """
        rows, length = input_ids.shape
        backend = backend or self.attention_backend
        alone = x_0 is None and context is None
        if layout is None:
            layout = self.own_layout(length, alone)
        if self.config.causal:
            hidden = self._clean(input_ids, layout, backend)[0]
            return self._read_out(hidden if at is None else hidden[at], targets)
        shift = self.config.prediction == "shift"
        clean = None if context is None else context.hidden
        if layout.blocks == 1 and clean_at is None:
            x_0 = context = None  # no block has one before it to look back on
        if shift and layout.block_size == 1 and not alone:
            # Every token is the first of its block: the clean stream predicts them all.
            if clean is None:
                assert x_0 is not None
                clean = self._clean(x_0, layout, backend)[0]
            return self._aligned(repeat(clean, rows), clean, layout, at, clean_at, targets)
        if self.config.draft_rank and x_0 is not None:
            with torch.no_grad():  # the clean stream stays the base model's
                context, x_0 = self.encode(x_0, layout, backend=backend), None
            clean = context.hidden
        order = self._known_first(input_ids, layout.block_size)
        x_t = input_ids if order is None else input_ids.gather(1, order)
        if x_0 is None and context is None:
            hidden = self._run(x_t, order, Streams(layout, 0, backend, None, "alone", 0))
        elif context is None:
            assert x_0 is not None
            streams = Streams(layout, len(x_0), backend)
            both = None if order is None else torch.cat([_positions(x_0), order])
            hidden = self._run(torch.cat([x_0, x_t]), both, streams)
            clean, hidden = hidden[: len(x_0)], hidden[len(x_0) :]
        else:
            hidden = self._run(x_t, order, Streams(layout, 0, backend, context, noised_from=0))
        if order is not None:
            hidden = hidden.gather(1, order.argsort(1)[..., None].expand_as(hidden))
        if shift:
            return self._aligned(hidden, clean, layout, at, clean_at, targets)
        return self._read_out(hidden if at is None else hidden[at], targets)

    def encode(
        self, x_0: Tensor, layout: BlockLayout | None = None, *, backend: str | None = None
    ) -> Context:
        """Keys and values of the clean stream of x_0 [B, L], and its last hidden states."""
        layout = layout or self.config.layout_of(x_0.shape[1])
        hidden, streams = self._clean(x_0, layout, backend or self.attention_backend)
        pairs = [streams.kept[i] for i in range(len(streams.kept))]
        return Context([k for k, _ in pairs], [v for _, v in pairs], hidden)

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
        """Logits [P, V] of x int64 [n, T] after the cached prefixes; see `Denoiser.decode`."""
        # Columns that a shorter block leaves unused may lie past the context.
        positions = positions.clamp(max=self.config.length - 1)
        order = self._known_first(x, x.shape[1], clean)
        if order is not None:
            x, positions = x.gather(1, order), positions.gather(1, order)
            at = at // x.shape[1] * x.shape[1] + order.argsort(1).flatten()[at]
        cached = Cached(cache, positions, None if mask is None else mask == 0, clean)
        hidden = self._run(x, positions, cached)
        logits = self._read_out(hidden.flatten(0, 1)[at], None).logits
        assert logits is not None
        return logits

    def new_cache(self, rows: int, capacity: int, block_size: int) -> BlockCache:
        """Room for the keys and values of `capacity` clean tokens of each of `rows` rows."""
        kind = self.dtype
        return BlockCache(self.shapes, rows, capacity, block_size, dtype=kind, device=self.device)

    # parts of a forward pass

    def _run(self, tokens: Tensor, positions: Tensor | None, attention: Pass) -> Tensor:
        """The last hidden states [b, T, E] of tokens [b, T] at `positions`, 0, 1, … by default."""
        positions = _positions(tokens) if positions is None else positions
        with running(attention):
            out = self.lm.get_decoder()(
                input_ids=tokens,
                position_ids=positions,
                use_cache=False,
                blockdiff_pass=attention,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _clean(self, x_0: Tensor, layout: BlockLayout, backend: str) -> tuple[Tensor, Streams]:
        streams = Streams(layout, len(x_0), backend)
        return self._run(x_0, None, streams), streams

    def _known_first(self, x: Tensor, block_size: int, clean: int = 0) -> Tensor | None:
        """int64 [n, T]: x_t as a causal block reads it, known tokens before masked ones.

        `clean`: how many columns before x_t keep their places. None where blocks are bidirectional.
        """
        if self.config.inside_block == "bidirectional":
            return None
        column = torch.arange(x.shape[1], device=x.device) - clean
        masked = (x == self.config.mask_token_id) & (column >= 0)
        block = column.clamp(min=-1) // block_size
        return (2 * block + masked).argsort(dim=1, stable=True)

    def _aligned(
        self,
        hidden: Tensor,
        clean: Tensor | None,
        layout: BlockLayout,
        at: Tensor | None,
        clean_at: Tensor | None,
        targets: Tensor | None,
    ) -> DenoiserOutput:
        """Under "shift": what predicts i stands at i − 1, for a block's first token in `clean`."""
        rows, length, _ = hidden.shape
        if at is None:
            row = torch.arange(rows, device=hidden.device)[:, None]
            column = torch.arange(length, device=hidden.device)[None, :]
        else:
            row, column = at.nonzero(as_tuple=True)
        before = (column - 1).clamp(min=0)
        found = hidden[row, before]
        if clean is not None:
            first = (column % layout.block_size == 0) & (column > 0)
            found = torch.where(first[..., None], clean[row % len(clean), before], found)
            if clean_at is not None:
                row, column = clean_at.nonzero(as_tuple=True)
                found = torch.cat([found, clean[row, column - 1]])
        return self._read_out(found, targets)

    def _read_out(self, h: Tensor, targets: Tensor | None) -> DenoiserOutput:
        """Logits, or nll, of hidden states [.., E]; what the base model does behind its head."""
        head, base = cast(nn.Linear, self.lm.get_output_embeddings()), self.lm.config
        scale = getattr(base, "logit_scale", None) or 1.0
        scale /= getattr(base, "logits_scaling", None) or 1.0
        softcap = getattr(base, "final_logit_softcapping", None)
        stored = getattr(head, "stored", head.weight)  # see `weights.Linear`
        h = (h if scale == 1 else h * scale).to(stored.device)
        if targets is not None:
            weight = head.dense() if isinstance(head, Linear) else head.weight
            mask = self.config.mask_token_id
            nll = subs_nll(h, weight, head.bias, targets, mask, softcap=softcap)
            return DenoiserOutput(nll=nll)
        logits = head(h)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return DenoiserOutput(logits=logits)


@contextmanager
def _recorded(lm: PreTrainedModel, config: AdaptedConfig) -> Iterator[None]:
    """The base model's configuration as its folder keeps it."""
    setattr(lm.config, RECORD, config.record())
    lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")
    try:
        yield
    finally:
        delattr(lm.config, RECORD)
        lm.set_attn_implementation(INTERFACE)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
