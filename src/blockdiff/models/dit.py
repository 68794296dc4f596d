"""The denoising network: the paper's DiT, as a `transformers` model.

    tokens → embedding → M × [ adaLN · attention · adaLN · MLP ] → adaLN · linear → logits

One network, three uses, told apart by what it is given:

    model(x_t, x_0=x_0)   block diffusion: x_t reads the clean blocks before it (L' from the config)
    model(x_t)            MDLM: x_t reads itself, everywhere
    model(x_0)            AR, when `config.causal`: a causal stream; logits at i are for i + 1

With prediction "shift" block diffusion, too, has logits at i − 1 for i (`models.shifted`).

With one noised copy per text both streams go through the layers side by side, as 2L tokens, and
the clean one stops at the last layer's keys and values. The clean stream never depends on x_t.
So where several copies share a text, or a text is written block by block, it runs first (`encode`,
or the cache), and the noised stream reads its keys and values.

Shapes: B batch, R draws, L positions, Q queries, H heads, D head width, E width, V vocabulary,
N blocks, M layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdiff.attention import Mask, attend, choose_backend, flex, make_mask, repeat
from blockdiff.cache import BlockCache, LayerShape
from blockdiff.device import cached, compile_every_shape
from blockdiff.layout import BlockLayout
from blockdiff.models.chain import chain_of
from blockdiff.models.config import DiTConfig
from blockdiff.models.denoiser import Context, DenoiserOutput
from blockdiff.models.initial import initialise
from blockdiff.models.layers import (
    Chosen,
    DiTLayer,
    FoldedLayer,
    FoldedNorm,
    OutputLayer,
    SigmaEmbedding,
    is_constant,
    rope,
)
from blockdiff.models.pretrained import DenoiserModel, register
from blockdiff.models.shifted import Given, predicting

Attention = Callable[[int, Tensor, Tensor, Tensor], "Tensor | None"]


class Condition(NamedTuple):
    """What the adaLN of each layer and of the output layer reads, or what `fold` made of that.

    `constant`: it is the same for every token.
    """

    layers: Sequence[Tensor | FoldedLayer | None]
    final: Tensor | FoldedNorm | None
    constant: bool


@cached
def _rope_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return rope(torch.arange(length, device=device), head_dim)


class DiT(DenoiserModel):
    """The denoiser; see the module's text for its three uses.

    Example:
        >>> import torch, blockdiff
        >>> config = blockdiff.DiTConfig(
        ...     vocab_size=9, length=8, block_size=4, hidden_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, cond_size=8
        ... )
        >>> model = blockdiff.DiT(config)
        >>> x_0 = torch.zeros(1, 8, dtype=torch.int64)
        >>> x_t = torch.full_like(x_0, config.mask_token_id)
        >>> model(x_t, x_0=x_0).logits.shape
        torch.Size([1, 8, 9])
    """

    config_class = DiTConfig
    base_model_prefix = "dit"
    _no_split_modules = ["DiTLayer"]  # noqa: RUF012 - transformers reads it from the class

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.sigma = SigmaEmbedding(config.cond_size) if config.adaln else None
        self.layers = nn.ModuleList(DiTLayer(config) for _ in range(config.num_hidden_layers))
        self.output = OutputLayer(config)
        self.chain = chain_of(config)
        self.post_init()

    # transformers' interface

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.output.linear

    def set_output_embeddings(self, value: nn.Module) -> None:
        # transformers makes plain linear maps; ours also has a loss.
        made, own = cast(nn.Linear, value), self.output.linear
        own.weight, own.bias, own.out_features = made.weight, made.bias, made.out_features

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compiles each layer around its attention, which runs its own kernels.

        A copy of the model, such as its average, is not compiled. `backend`: torch.compile's.
        """
        compile_every_shape()
        for layer in self.layers:
            layer.compile(backend=backend)

    # the network; `forward` is `DenoiserModel`'s

    def denoise(
        self,
        x_t: Tensor,
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
        """Logits for every position of x_t, or for the chosen ones only.

        `x_t` int64 [R·B, L]; `x_0` int64 [B, L], the clean tokens its blocks may look back on (row
        r·B + i of x_t is a copy of row i), or `context`, what `encode(x_0)` gave. `layout`: the
        blocks, by default the configuration's, and the documents. `sigma` [R·B] or [R·B, N], read
        only when `config.time_conditioning`. `at` bool [R·B, L]: where logits are wanted; nothing
        else goes through the output layer. With `targets` int64 [P] the result is their `nll` [P]
        in place of logits. `clean_at`: see `Denoiser`. `backend`: of attention.
        """
        length, rows = x_t.shape[1], len(x_t)
        backend = backend or self.attention_backend
        alone = x_0 is None and context is None
        if layout is None:
            layout = self.own_layout(length, alone)
        if self._reads_clean:
            h = predicting(self, Given(x_t, x_0, layout, context, backend), at, clean_at)
            return self._read_out(h, self.condition(), None, targets)
        if layout.blocks == 1 and backend != "dense":
            x_0 = context = None  # no block has one before it to look back on
        chosen = None if at is None else Chosen(at)
        # `dense` is the reference: always the paper's one pass over all 2L tokens. Elsewhere the
        # copies of a text share its clean stream, at whatever times they are: it has σ = 0.
        single = x_0 is not None and len(x_0) == rows and not self.config.time_conditioning
        if x_0 is not None and (single or backend == "dense"):
            condition = self.condition(sigma, layout, clean_tokens=length)
            h = self.two_streams(x_t, x_0, condition, layout, backend, chosen)
            return self._read_out(h, condition, chosen, targets)
        condition = self.condition(sigma, layout)
        if x_0 is not None:
            context = self.encode(x_0, layout, backend=backend)
        h = self.one_stream(x_t, layout, context, condition, backend, chosen)
        return self._read_out(h, condition, chosen, targets)

    @property
    def _reads_clean(self) -> bool:
        """Whether the clean stream predicts tokens, beside a noised one."""
        return self.config.prediction == "shift" and not self.config.causal

    def encode(
        self, x_0: Tensor, layout: BlockLayout | None = None, *, backend: str | None = None
    ) -> Context:
        """The clean stream of x_0 [B, L] under M_BC; `hidden` where it predicts tokens."""
        layout = layout or self.own_layout(x_0.shape[1])
        backend = backend or self.attention_backend
        length, last = x_0.shape[1], len(self.layers) - 1
        facts = backend, x_0.device, self._head_dim, layout, "clean", len(x_0)
        if (
            choose_backend(*facts) == "flex"
            and length != self.config.length
            and not torch.is_grad_enabled()
        ):
            # Long prompts have many lengths, and `flex` compiles for each. The padding is in later
            # blocks, where no token sees it.
            layout = flex.padded(layout)
            x_0 = F.pad(x_0, (0, layout.length - length))
        mask = self._mask(layout, "clean", backend, len(x_0))
        context = Context([], [])

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            if i == len(context.keys):  # not when activation checkpointing computes it again
                context.keys.append(k[:, :, :length])
                context.values.append(v[:, :, :length])
            return None if i == last and not self._reads_clean else attend(q, k, v, mask)

        cos, sin = _rope_table(x_0.shape[1], self._head_dim, x_0.device)
        h = self._run(x_0, cos, sin, self.condition(), attention)
        if self._reads_clean:
            context.hidden = h[:, :length]
        return context

    def _mask(self, layout: BlockLayout, kind: str, backend: str, rows: int) -> Mask:
        return make_mask(layout, kind, backend, self.device, rows=rows, head_dim=self._head_dim)

    def new_cache(self, rows: int, capacity: int, block_size: int) -> BlockCache:
        """Room for the keys and values of `capacity` clean tokens of each of `rows` rows."""
        shape = LayerShape(self.config.num_attention_heads, self._head_dim, self._head_dim)
        layers, kind = [shape] * self.config.num_hidden_layers, self.dtype
        return BlockCache(layers, rows, capacity, block_size, dtype=kind, device=self.device)

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
        """Logits [P, V] of x int64 [n, T] after the cached prefixes; see `Denoiser.decode`.

        Without `config.time_conditioning` adaLN is folded once for all evaluations with this cache.
        """
        cos, sin = (part[:, None].to(self.dtype) for part in rope(positions, self._head_dim))

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = cache.stage(i, k, v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        if self.config.time_conditioning:
            noised = x.shape[1] - clean
            layout = BlockLayout(noised, noised) if noised else None
            condition = self.condition(sigma, layout, clean)
        else:
            condition = cache.folded = cache.folded or self.fold()
        chosen = Chosen(at, x.shape)
        h = self._run(x, cos, sin, condition, attention, chosen)
        return cast(Tensor, self._read_out(h, condition, chosen, None).logits)

    def fold(self) -> Condition:
        """Every layer under constant conditioning, for any number of passes without a gradient."""
        with torch.inference_mode(False), torch.no_grad():
            constant = self.condition().final
            assert not isinstance(constant, FoldedNorm)
            folded = [cast(DiTLayer, layer).fold(constant) for layer in self.layers]
            return Condition(folded, self.output.fold(constant), True)

    # parts of a forward pass

    @property
    def _head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def condition(
        self,
        sigma: Tensor | None = None,
        layout: BlockLayout | None = None,
        clean_tokens: int = 0,
    ) -> Condition:
        """What adaLN reads under σ: [1, 1, C] where it is constant, else [rows of σ, 1 or L, C].

        `clean_tokens`: how many tokens of a clean text, with σ = 0, come before the noised ones.
        """
        final = None
        if self.sigma is not None:
            with torch.autocast(self.device.type, enabled=False):
                final = clean = self.sigma(torch.zeros(1, 1, device=self.device))
                if sigma is not None and self.config.time_conditioning:
                    by_row = sigma[:, None] if sigma.dim() == 1 else sigma
                    if layout is not None and by_row.shape[1] > 1:
                        by_row = by_row.repeat_interleave(layout.block_size, dim=1)
                    final = self.sigma(by_row)
        of_layers = final
        if final is not None and self.config.time_conditioning and clean_tokens and layout:
            rows = len(final)
            parts = clean.expand(rows, clean_tokens, -1), final.expand(rows, layout.length, -1)
            of_layers = torch.cat(parts, dim=1)
        return Condition([of_layers] * len(self.layers), final, is_constant(of_layers))

    def _run(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        condition: Condition,
        attention: Attention,
        chosen: Chosen | None = None,
        whole: bool = False,
    ) -> Tensor:
        """The residual stream [B, T, E] of tokens [B, T], or [P, E] at the chosen positions.

        `attention(i, q, k, v)` is that of layer i; see `DiTLayer.forward` for what it may answer.
        The last layer's MLP and the output are computed for the chosen positions alone, unless the
        `whole` is wanted, or modulations differ by token.
        """
        h = self.embedding(tokens).float()  # the sum of all branches is float32 in any precision
        few = chosen if condition.constant and not whole else None
        for i, (layer, own) in enumerate(zip(self.layers, condition.layers, strict=True)):
            last = i == len(self.layers) - 1
            h = layer(h, cos, sin, own, partial(attention, i), few if last else None)
        return h if few is not None or chosen is None else chosen.of(h)

    def one_stream(
        self,
        x_t: Tensor,
        layout: BlockLayout,
        context: Context | None,
        condition: Condition,
        backend: str,
        chosen: Chosen | None,
    ) -> Tensor:
        """A pass over x_t alone, which reads the `context` if there is one; as `_run`."""
        length, rows = x_t.shape[1], len(x_t)
        kind = "noised" if context is not None else "clean"
        if context is None and layout.blocks == 1 and not self.config.causal:
            kind = "alone"  # one noised block, whatever a clean stream sees
        mask = self._mask(layout, kind, backend, rows)

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if context is not None:
                k = torch.cat([repeat(context.keys[i], rows), k], dim=2)
                v = torch.cat([repeat(context.values[i], rows), v], dim=2)
            return attend(q, k, v, mask)

        cos, sin = _rope_table(length, self._head_dim, x_t.device)
        return self._run(x_t, cos, sin, condition, attention, chosen, whole=backend == "dense")

    def two_streams(
        self,
        x_t: Tensor,
        x_0: Tensor,
        condition: Condition,
        layout: BlockLayout,
        backend: str,
        chosen: Chosen | None,
    ) -> Tensor:
        """One pass over x_0 ⊕ x_t under the whole 2L × 2L mask; the x_t half, as `_run`.

        Where the clean stream predicts tokens, `chosen` counts through both halves.
        """
        length, rows, whole = layout.length, len(x_t), backend == "dense"
        cos, sin = _rope_table(length, self._head_dim, x_t.device)
        mask = self._mask(layout, "two_stream", backend, rows)
        # Nothing reads the last layer's clean half, unless it predicts tokens.
        mask_last = (
            None if whole or self._reads_clean else self._mask(layout, "noised", backend, rows)
        )

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if mask_last is None or i < len(self.layers) - 1:
                return attend(q, k, v, mask)
            return attend(q[:, :, length:], k, v, mask_last)

        tokens = torch.cat([repeat(x_0, rows), x_t], dim=1)
        cos, sin = cos.repeat(2, 1), sin.repeat(2, 1)
        h = self._run(tokens, cos, sin, condition, attention, chosen, whole)
        return h if chosen is not None else h[:, -length:]

    def _read_out(
        self, h: Tensor, condition: Condition, chosen: Chosen | None, targets: Tensor | None
    ) -> DenoiserOutput:
        """Logits, or nll, of h [B, L, E], or [P, E] at the chosen positions."""
        out = self.output(h, condition.final, chosen, targets)
        return DenoiserOutput(logits=out) if targets is None else DenoiserOutput(nll=out)


register(DiTConfig, DiT)
