"""The network's parts: rotary positions, adaLN, one transformer layer, the output layer.

    h ← h + gate_1 · W_o attention(qkv(adaLN_1(h)))
    h ← h + gate_2 · MLP(adaLN_2(h)),     adaLN(h) = LayerNorm(h) · (1 + scale) + shift

Without time conditioning scale, shift and gate are constants: a layer then folds them into its
norms' weights and its branches' last maps (`fold`), and they cost nothing per token. It does so in
its own `forward`, so that a layer can be sharded, compiled or checkpointed by itself; a sampler
folds once for many passes and hands in the result.

Shapes: B rows, T tokens a row, H heads, D head width, E width, C width of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdiff.models.config import DiTConfig
from blockdiff.models.loss import subs_nll
from blockdiff.models.weights import Linear


def rope(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] of RoPE's angles (Su et al. 2021, base 10,000), float32."""
    step = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * 10000.0 ** (-step / head_dim)
    return angle.cos(), angle.sin()


def _turn(source: Tensor, cos: Tensor, sin: Tensor, target: Tensor) -> None:
    """Writes the pairs (i, i + D/2) of source [..., D], turned by the angle, into target."""
    first, second = source.chunk(2, dim=-1)
    to_first, to_second = target.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)


def split_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    """qkv [B, T, 3E] → q and k, rotated, and v: each [B, H, T, D]."""
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Heads.apply(qkv, cos, sin, heads)
    return _plain_heads(qkv, cos, sin, heads)


def _plain_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    """In plain operators, which a compiler fuses."""
    cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
    parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    first, second = parts[:2].chunk(2, dim=-1)
    q, k = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return q, k, parts[2]


class _Heads(torch.autograd.Function):
    """By hand, into contiguous tensors: plain operators take twice the memory traffic.

    These concatenate the halves in the forward, and in the backward pad them with zeros and add.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
        cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
        ctx.save_for_backward(cos, sin)
        parts = qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        out = torch.empty(parts.shape, dtype=qkv.dtype, device=qkv.device)
        _turn(parts[:2], cos, sin, out[:2])
        out[2].copy_(parts[2])
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        of_q, of_k, of_v = gradients
        rows, heads, tokens, width = of_q.shape
        out = torch.empty(rows, tokens, 3, heads, width, dtype=of_q.dtype, device=of_q.device)
        to_q, to_k, to_v = out.permute(2, 0, 3, 1, 4)
        _turn(of_q, cos, -sin, to_q)  # the inverse of a rotation is its transpose
        _turn(of_k, cos, -sin, to_k)
        to_v.copy_(of_v)
        return out.flatten(2), None, None, None


def drop(x: Tensor, rate: float) -> Tensor:
    """Dropout, at `rate` rounded to a multiple of 1/65,536.

    On a CPU `F.dropout` draws a random number for each element, a sixth of a `nano` model's step;
    here 64 random bits decide about four elements. The compiler knows `F.dropout` only.
    """
    if rate == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    level = round(rate * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= level - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - level))


class LayerNorm(nn.Module):
    """The weight of a LayerNorm without bias; `FoldedNorm` applies it, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class SigmaEmbedding(nn.Module):
    """σ → [..., C]: 128 cosines and sines, then an MLP (as in DiT, Peebles and Xie 2023)."""

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


class ResidualLinear(Linear):
    """The last map of a residual branch."""


class Modulation(nn.Linear):
    """Condition [.., C] → shift, scale (and gate) of one or two sublayers, [.., parts · E]."""

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


class FoldedNorm(NamedTuple):
    """A LayerNorm and the shift and scale of adaLN after it, in float32.

    A constant shift and scale are in `weight` and `bias` [E]; `shift` and `scale` [B, 1 or T, E]
    are there where they differ between rows or tokens.
    """

    weight: Tensor
    bias: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None

    def __call__(self, h: Tensor) -> Tensor:
        x = F.layer_norm(h.float(), self.weight.shape, self.weight, self.bias)
        if self.shift is not None and self.scale is not None:
            x = torch.addcmul(self.shift, x, 1 + self.scale)
        return x

    def at(self, chosen: Chosen) -> FoldedNorm:
        """The same norm for the tokens [P, E] at the chosen positions."""
        if self.shift is None or self.scale is None:
            return self
        shift, scale = (chosen.of(x.expand(*chosen.shape, -1)) for x in (self.shift, self.scale))
        return self._replace(shift=shift, scale=scale)


class FoldedBranch(NamedTuple):
    """The last map of a residual branch and its gate.

    `folded`: the map's weight and bias times the gate, where that is constant. Else `linear` is
    applied, and then the `gate`.
    """

    linear: Linear
    gate: Tensor | None = None
    folded: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, h: Tensor, x: Tensor, dropout: float) -> Tensor:
        branch = self.linear(x) if self.folded is None else F.linear(x, *self.folded)
        branch = drop(branch, dropout)
        if self.gate is None:
            return h + branch
        return torch.addcmul(h, branch, self.gate.to(branch.dtype))


class FoldedLayer(NamedTuple):
    """What a layer computes from its condition, for all passes under that condition."""

    norm_1: FoldedNorm
    attention_out: FoldedBranch
    norm_2: FoldedNorm
    mlp_out: FoldedBranch


def _fold_norm(norm: LayerNorm, shift: Tensor | None, scale: Tensor | None) -> FoldedNorm:
    weight = norm.weight.float()
    if shift is None or scale is None:
        return FoldedNorm(weight)
    if not is_constant(shift):
        return FoldedNorm(weight, None, shift, scale)
    return FoldedNorm(weight * (1 + scale.flatten()), shift.flatten())


def _fold_branch(linear: Linear, gate: Tensor | None) -> FoldedBranch:
    if gate is None or not is_constant(gate):
        return FoldedBranch(linear, gate)
    gate = gate.flatten()
    if linear.format != "plain":
        return FoldedBranch(linear, gate)
    bias = None if linear.bias is None else (linear.bias * gate).to(linear.bias.dtype)
    weight = (linear.weight * gate[:, None]).to(linear.weight.dtype)
    return FoldedBranch(linear, None, (weight, bias))


def is_constant(condition: Tensor | None) -> bool:
    """Whether a condition [B, 1 or T, C], or a part of a modulation, is the same everywhere."""
    return condition is None or condition.shape[:-1].numel() == 1


def _parts(modulation: Modulation | None, condition: Tensor | None) -> tuple[Tensor | None, ...]:
    """The shifts, scales and gates of a condition, in float32 whatever the pass computes in."""
    if modulation is None or condition is None:
        return (None,) * 6
    with torch.autocast(condition.device.type, enabled=False):
        return modulation(condition).float().chunk(modulation.parts, dim=-1)


class Chosen:
    """The positions whose output is wanted.

    `at`: bool [B, T]; or int64 [P] with the `shape` [B, T], position t of row i as i·T + t, where
    the host knows them. Made once per pass: to find them in a bool tensor is to wait for the GPU.
    """

    def __init__(self, at: Tensor, shape: torch.Size | None = None) -> None:
        self.shape = at.shape if shape is None else shape
        self.index = at.flatten().nonzero().squeeze(-1) if shape is None else at

    def of(self, x: Tensor) -> Tensor:
        """x [B, S, …] at the chosen positions among its last T ≤ S: [P, …], row by row."""
        size, index = self.shape[1], self.index
        if x.shape[1] > size:
            index = index + (index // size + 1) * (x.shape[1] - size)
        return x.flatten(0, 1)[index]


Attention = Callable[[Tensor, Tensor, Tensor], "Tensor | None"]
KeysAndValues = tuple[Tensor, Tensor]


@torch.compiler.disable
def _outside(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Attention runs its own kernels: a compiled layer is compiled before and after it."""
    return attention(q, k, v)


class DiTLayer(nn.Module):
    """One layer: project, attend, update. The caller decides whose keys are attended to."""

    # transformers' `gradient_checkpointing_enable` sets both.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm_1 = LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.attention_out = ResidualLinear(width, width, bias=False)
        self.norm_2 = LayerNorm(width)
        self.mlp_in = Linear(width, 4 * width)
        self.mlp_out = ResidualLinear(4 * width, width)
        self.modulation = Modulation(config, 6) if config.adaln else None
        self.dropout = config.dropout

    def fold(self, condition: Tensor | None) -> FoldedLayer:
        """The layer under a condition [B, 1 or T, C]; a constant one is put into the weights."""
        with torch.autocast(self.norm_1.weight.device.type, enabled=False):
            parts = _parts(self.modulation, condition)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
            return FoldedLayer(
                _fold_norm(self.norm_1, shift_1, scale_1),
                _fold_branch(self.attention_out, gate_1),
                _fold_norm(self.norm_2, shift_2, scale_2),
                _fold_branch(self.mlp_out, gate_2),
            )

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        condition: Tensor | FoldedLayer | None,
        attention: Attention,
        chosen: Chosen | None = None,
    ) -> Tensor | KeysAndValues:
        """h [B, T, E] → the residual stream after this layer.

        `condition` [B, 1 or T, C] is what adaLN reads, or what `fold` made of it. `attention(q, k,
        v)` gets each [B, H, T, D], q and k rotated, and returns [B, H, T', D]: the result is then
        [B, T', E], of the last T' tokens. With `chosen` positions among these it is [P, E]. Where
        attention returns None, k and v are the result: all that is wanted of the last layer of a
        clean stream.
        """
        given = (h, cos, sin, condition, attention, chosen)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._forward, *given)
        return self._forward(*given)

    def _forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        condition: Tensor | FoldedLayer | None,
        attention: Attention,
        chosen: Chosen | None,
    ) -> Tensor | KeysAndValues:
        folded = condition if isinstance(condition, FoldedLayer) else self.fold(condition)
        q, k, v = self.project(h, cos, sin, folded)
        attended = _outside(attention, q, k, v)
        if attended is None:
            return k, v
        attended = attended.transpose(1, 2).flatten(2)
        if chosen is not None:
            return self.update(chosen.of(h), chosen.of(attended), folded)
        return self.update(h[:, h.shape[1] - attended.shape[1] :], attended, folded)

    def project(
        self, h: Tensor, cos: Tensor, sin: Tensor, folded: FoldedLayer
    ) -> tuple[Tensor, ...]:
        """h [B, T, E] → rotated q, rotated k, v, each [B, H, T, D]."""
        return split_heads(self.qkv(folded.norm_1(h)), cos, sin, self.heads)

    def update(self, h: Tensor, attended: Tensor, folded: FoldedLayer) -> Tensor:
        """The residual stream h [.., E] plus both branches: attention's output, then the MLP's."""
        dropout = self.dropout if self.training else 0.0
        h = folded.attention_out(h, attended, dropout)
        return folded.mlp_out(h, self.mlp_in(folded.norm_2(h), gelu=True), dropout)


class OutputMap(Linear):
    """h [P, E] → logits [P, V], or with targets [P] their −log p [P]: see `subs_nll`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.config = config

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if targets is None:
            return super().forward(x)
        mask_token_id, score = self.config.mask_token_id, self.config.score
        return subs_nll(x, self.dense(), self.bias, targets, mask_token_id, score)


class OutputLayer(nn.Module):
    """Final norm, modulation and the map to logits."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.hidden_size)
        self.linear = OutputMap(config)
        self.modulation = Modulation(config, 2) if config.adaln else None

    def fold(self, condition: Tensor | None) -> FoldedNorm:
        """The final norm under a condition."""
        return _fold_norm(self.norm, *_parts(self.modulation, condition)[:2])

    def forward(
        self,
        h: Tensor,
        condition: Tensor | FoldedNorm | None,
        chosen: Chosen | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits, or −log p of the targets [P], of h [B, T, E], or [P, E] where chosen."""
        norm = condition if isinstance(condition, FoldedNorm) else self.fold(condition)
        norm = norm if chosen is None else norm.at(chosen)
        return self.linear(norm(h), targets)
