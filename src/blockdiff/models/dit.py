"""The denoising network: the paper's DiT, as a `transformers` model.

    tokens → embedding → M × [ adaLN · attention · adaLN · MLP ] → adaLN · linear → logits

One network, three uses, told apart by what it is given:

    model(x_t, x_0=x_0)   block diffusion: x_t reads the clean blocks before it (L' from the config)
    model(x_t)            MDLM: x_t reads itself, everywhere
    model(x_0)            AR, when `config.causal`: a causal stream; logits at i are for i + 1

Keys and values of the clean stream never depend on x_t, so the clean stream runs first (`encode`)
and the noised one reads what it left. Training, multi-draw likelihood and cached sampling are thus
the same computation; the `dense` backend keeps the paper's one pass over 2L tokens as reference.

Shapes: B batch, R draws, L positions, Q queries, H heads, D head width, E width, V vocabulary,
N blocks, M layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from blockdiff.attention import attend, choose_backend
from blockdiff.cache import BlockCache
from blockdiff.layout import BlockLayout
from blockdiff.models.config import DiTConfig


@dataclass
class DiTOutput(ModelOutput):
    """What a forward pass gives.

    `logits` [R·B, L, V], or [P, V] at the P chosen positions in row-major order. `nll` [P]: −log p
    of the targets under SUBS, in nats, instead of logits when targets were given.
    """

    logits: Tensor | None = None
    nll: Tensor | None = None


@dataclass
class Context:
    """Rotated keys and values [B, H, L, D] of the clean stream, one pair a layer."""

    keys: list[Tensor]
    values: list[Tensor]


Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=16)
def _rope_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return rope(torch.arange(length, device=device), head_dim)


def rope(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] of RoPE's angles (Su et al. 2021, base 10,000), float32."""
    step = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * 10000.0 ** (-step / head_dim)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of x [..., D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, in float32 whatever the input's precision."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float())


class SigmaEmbedding(nn.Module):
    """σ → [..., cond]: 128 cosines and sines, then an MLP (as in DiT, Peebles and Xie 2023)."""

    frequencies = 256

    def __init__(self, cond_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(self.frequencies, cond_size)
        self.outer = nn.Linear(cond_size, cond_size)

    def forward(self, sigma: Tensor) -> Tensor:
        half = self.frequencies // 2
        rate = torch.exp(
            -math.log(10000) * torch.arange(half, device=sigma.device, dtype=torch.float32) / half
        )
        angle = sigma[..., None].float() * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.inner.weight.dtype)
        return F.silu(self.outer(F.silu(self.inner(waves))))


class ResidualLinear(nn.Linear):
    """The last map of a residual branch."""


class Modulation(nn.Linear):
    """Condition [.., cond] → shift, scale (and gate) of one or two sublayers, [.., parts · E]."""

    def __init__(self, config: DiTConfig, parts: int) -> None:
        super().__init__(config.cond_size, parts * config.hidden_size)
        self.parts = parts

    def initial_bias(self, config: DiTConfig) -> Tensor:
        """Of the order shift, scale, gate, shift, scale, gate (or shift, scale)."""
        bias = torch.zeros(self.parts, config.hidden_size)
        if self.parts == 6:
            bias[[2, 5]] = config.initial_gate
            bias[0].normal_(std=config.initial_shift)
        return bias.flatten()


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)


Modulations = tuple[Tensor | None, ...]


class DiTLayer(nn.Module):
    """One layer in two halves, so that attention (and the choice of its keys) stays outside."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm_1 = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = ResidualLinear(width, width, bias=False)
        self.norm_2 = LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = ResidualLinear(4 * width, width)
        self.modulation = Modulation(config, 6) if config.adaln else None
        self.dropout = config.dropout

    def modulations(self, condition: Tensor | None) -> Modulations:
        """Shift, scale and gate of attention, then of the MLP; [.., E] each, or None."""
        if self.modulation is None or condition is None:
            return (None,) * 6
        return self.modulation(condition).chunk(6, dim=-1)

    def project(
        self, h: Tensor, cos: Tensor, sin: Tensor, modulation: Modulations
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, Q, E] → rotated q, rotated k, v, each [B, H, Q, D]."""
        shift, scale = modulation[:2]
        x = _modulate(self.norm_1(h), shift, scale).to(h.dtype)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype), v

    def finish(self, h: Tensor, attended: Tensor, modulation: Modulations) -> Tensor:
        """The residual stream after attention's output [B, H, Q, D] and the MLP."""
        _, _, gate_1, shift, scale, gate_2 = modulation
        h = self._add(h, self.attention_out(attended.transpose(1, 2).flatten(2)), gate_1)
        x = _modulate(self.norm_2(h), shift, scale).to(h.dtype)
        return self._add(h, self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh")), gate_2)

    def _add(self, h: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        branch = F.dropout(branch, self.dropout, self.training)
        return h + branch if gate is None else torch.addcmul(h, branch, gate)


class OutputLayer(nn.Module):
    """Final norm, modulation and the map to logits."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.modulation = Modulation(config, 2) if config.adaln else None

    def prepare(self, h: Tensor, condition: Tensor | None) -> Tensor:
        """h [B, L, E] normed and modulated, ready for `linear`."""
        shift = scale = None
        if self.modulation is not None and condition is not None:
            shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return _modulate(self.norm(h), shift, scale).to(h.dtype)


class DiT(PreTrainedModel):
    """The denoiser; see the module's text for its three uses."""

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
        self.attention_backend = "auto"
        self.post_init()

    # transformers' interface

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.output.linear

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output.linear = value  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers initialises each tensor once, children first: what is special about a
        # layer's linear map has to be told by the map's own class.
        if isinstance(module, Modulation):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.initial_bias(self.config))
        elif isinstance(module, ResidualLinear):
            # Residual branches start small, the deeper the network the smaller (GPT-2's rule).
            init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LayerNorm):
            init.ones_(module.weight)

    def compile_layers(self) -> None:
        """Compiles each layer's two halves; attention between them runs its own kernels."""
        for layer in self.stack():
            layer.project = torch.compile(layer.project)  # type: ignore[method-assign]
            layer.finish = torch.compile(layer.finish)  # type: ignore[method-assign]

    # the network

    def forward(
        self,
        x_t: Tensor,
        x_0: Tensor | None = None,
        sigma: Tensor | None = None,
        *,
        context: Context | None = None,
        at: Tensor | None = None,
        targets: Tensor | None = None,
        block_size: int | None = None,
        documents: Tensor | None = None,
        backend: str | None = None,
    ) -> DiTOutput:
        """Logits for every position of x_t, or for the chosen ones only.

        `x_t` int64 [R·B, L]; `x_0` int64 [B, L], the clean tokens its blocks may look back on
        (R noised copies share them, draw-major), or `context`, what `encode(x_0)` gave. `sigma`
        [R·B] or [R·B, N], read only when `config.time_conditioning`. `at` bool [R·B, L]: where
        logits are wanted; nothing else goes through the output layer. `targets` int64 [P]: then
        `nll` [P] comes back in place of logits. `block_size` overrides the config's.
        `documents` int64 [B, L]: see `attend`. Returns `DiTOutput`.
        """
        length = x_t.shape[1]
        backend = choose_backend(backend or self.attention_backend, x_t.device)
        if x_0 is None and context is None:
            layout = BlockLayout(length, 1 if self.config.causal else length)
        else:
            layout = BlockLayout(length, block_size or self.config.block_size)
        condition = self._condition(x_t.shape[0], sigma, layout)
        cos, sin = _rope_table(length, self._head_dim, x_t.device)

        if x_0 is not None and backend == "dense":
            h = self._two_streams(x_t, x_0, condition, layout, documents)
        else:
            if x_0 is not None:
                context = self.encode(x_0, layout, documents=documents, backend=backend)

            def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if context is None:
                    return attend(q, k, v, layout, "clean", backend=backend, documents=documents)
                k = torch.cat([_repeat(context.keys[i], q.shape[0]), k], dim=2)
                v = torch.cat([_repeat(context.values[i], q.shape[0]), v], dim=2)
                return attend(q, k, v, layout, "noised", backend=backend, documents=documents)

            h = self._run(x_t, cos, sin, condition, attention)
        return self._read_out(h, condition, at, targets)

    def encode(
        self,
        x_0: Tensor,
        layout: BlockLayout | None = None,
        *,
        documents: Tensor | None = None,
        backend: str | None = None,
    ) -> Context:
        """The clean stream of x_0 [B, L] under M_BC; the last layer stops at keys and values."""
        layout = layout or BlockLayout(x_0.shape[1], self.config.block_size)
        backend = choose_backend(backend or self.attention_backend, x_0.device)
        context = Context([], [])
        last = len(self.layers) - 1

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            context.keys.append(k)
            context.values.append(v)
            if i == last:
                return None
            return attend(q, k, v, layout, "clean", backend=backend, documents=documents)

        cos, sin = _rope_table(x_0.shape[1], self._head_dim, x_0.device)
        self._run(x_0, cos, sin, self._condition(1, None, layout), attention)
        return context

    def decode(
        self, x: Tensor, positions: Tensor, cache: BlockCache, rows: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One network evaluation of blocks x int64 [n, Q] after their cached clean prefixes.

        `positions` int64 [n, Q]; `rows` [n]: which rows of the cache these are; `at` bool [n, Q].
        Queries see every cached token of their row and all of x. Returns logits [P, V] at the
        chosen positions, and x's keys and values [M, n, H, Q, D], to append when x is clean.
        """
        cos, sin = rope(positions, self._head_dim)
        own = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        mask = torch.cat([cache.visible()[rows], own], dim=1)[:, None, None]
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            values.append(v)
            k = torch.cat([cache.keys[i, rows].to(k.dtype), k], dim=2)
            v = torch.cat([cache.values[i, rows].to(v.dtype), v], dim=2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        condition = self._condition(1, None, None)
        h = self._run(x, cos[:, None], sin[:, None], condition, attention)
        logits = self._read_out(h, condition, at, None).logits
        assert logits is not None
        return logits, torch.stack(keys), torch.stack(values)

    # its parts

    def stack(self) -> list[DiTLayer]:
        """The layers, typed."""
        return cast(list[DiTLayer], list(self.layers))

    @property
    def _head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def _condition(
        self, rows: int, sigma: Tensor | None, layout: BlockLayout | None
    ) -> Tensor | None:
        """What adaLN reads: [1, 1, cond] when σ is constant, else [rows, 1 or L, cond]."""
        if self.sigma is None:
            return None
        if sigma is None or not self.config.time_conditioning:
            sigma = torch.zeros(1, 1, device=self.device)
        elif sigma.dim() == 1:
            sigma = sigma[:, None]
        elif layout is not None and sigma.shape[1] > 1:
            sigma = sigma.repeat_interleave(layout.block_size, dim=1)
        return self.sigma(sigma)

    def _run(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        condition: Tensor | None,
        attention: Callable[[int, Tensor, Tensor, Tensor], Tensor | None],
    ) -> Tensor:
        """The residual stream [B, Q, E]; ends early when `attention` gives None."""
        h = self.embedding(tokens)
        for i, layer in enumerate(self.stack()):
            modulation = layer.modulations(condition)
            attended = attention(i, *layer.project(h, cos, sin, modulation))
            if attended is None:
                break
            h = layer.finish(h, attended, modulation)
        return h

    def _two_streams(
        self,
        x_t: Tensor,
        x_0: Tensor,
        condition: Tensor | None,
        layout: BlockLayout,
        documents: Tensor | None,
    ) -> Tensor:
        """The paper's single pass over x_0 ⊕ x_t under the whole 2L × 2L mask; the x_t half."""
        tokens = torch.cat([_repeat(x_0, x_t.shape[0]), x_t], dim=1)
        cos, sin = _rope_table(layout.length, self._head_dim, x_t.device)

        def attention(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, layout, "two_stream", backend="dense", documents=documents)

        if condition is not None and self.config.time_conditioning:
            clean = self._condition(1, torch.zeros(1, device=x_t.device), layout)
            assert clean is not None
            shape = (x_t.shape[0], layout.length, -1)
            condition = torch.cat([clean.expand(shape), condition.expand(shape)], dim=1)
        h = self._run(tokens, cos.repeat(2, 1), sin.repeat(2, 1), condition, attention)
        return h[:, layout.length :]

    def _read_out(
        self, h: Tensor, condition: Tensor | None, at: Tensor | None, targets: Tensor | None
    ) -> DiTOutput:
        h = self.output.prepare(h, condition)
        if at is not None:
            h = h[at]
        logits = self.output.linear(h)
        if targets is None:
            return DiTOutput(logits=logits)
        return DiTOutput(nll=subs_nll(logits, targets, self.config.mask_token_id))


def subs_nll(logits: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """−log p_θ(target) in nats, float32; logits [..., V], the mask token having probability 0."""
    logits = logits.float()
    column = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    logits = logits.masked_fill(column, -torch.inf)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(
        targets
    )


def _repeat(x: Tensor, rows: int) -> Tensor:
    """B rows → R·B rows, draw-major."""
    return x if x.shape[0] == rows else x.repeat(rows // x.shape[0], *[1] * (x.dim() - 1))
