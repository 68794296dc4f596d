"""The network's parts: rotary positions, adaLN, one transformer layer, the output layer.

    h ← h + gate_1 · W_o attention(qkv(adaLN_1(h)))
    h ← h + gate_2 · MLP(adaLN_2(h)),     adaLN(h) = LayerNorm(h) · (1 + scale) + shift

Without time conditioning scale, shift and gate are constants: they are then folded into the norms'
weights and the branches' last maps once per pass (`Conditioned`), and cost nothing per token.

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
from blockdiff.models.packed import expand


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


class _Heads(torch.autograd.Function):
    """qkv [B, T, 3E] → q and k, rotated, and v: each [B, H, T, D] and contiguous.

    Written by hand because the same in plain operators costs twice the memory traffic: halves are
    concatenated forward, and padded with zeros and added backward.
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
    """Dropout, to 1/65,536 of the rate.

    On a CPU `F.dropout` draws one number an element, a sixth of a `nano` model's step: here 64
    random bits decide about four.
    """
    if rate == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    level = round(rate * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= level - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - level))


class LayerNorm(nn.Module):
    """The weight of a LayerNorm without bias; `Affine` applies it, in float32."""

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


class ResidualLinear(nn.Linear):
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


class Affine(NamedTuple):
    """A LayerNorm with what adaLN does after it, in float32.

    `weight`, `bias` [E]; `shift`, `scale` [B, 1 or T, E] only where they are no constants.
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

    def at(self, chosen: Tensor) -> Affine:
        """The same for tokens [P, E] of the positions chosen [B, T]."""
        if self.shift is None or self.scale is None:
            return self
        shape = *chosen.shape, -1
        return self._replace(
            shift=self.shift.expand(shape)[chosen], scale=self.scale.expand(shape)[chosen]
        )


class Branch(NamedTuple):
    """The last map of a residual branch and its gate.

    `linear` itself, or where the gate is a constant its weight and bias with the gate in them.
    """

    linear: nn.Module
    gate: Tensor | None = None
    folded: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, h: Tensor, x: Tensor, dropout: float) -> Tensor:
        branch = apply(self.linear, x) if self.folded is None else F.linear(x, *self.folded)
        branch = drop(branch, dropout)
        return (
            h + branch
            if self.gate is None
            else torch.addcmul(h, branch, self.gate.to(branch.dtype))
        )


class Conditioned(NamedTuple):
    """A layer under one condition, for as many passes as share it."""

    norm_1: Affine
    attention_out: Branch
    norm_2: Affine
    mlp_out: Branch

    @property
    def constant(self) -> bool:
        """Whether nothing in it differs from token to token."""
        return self.norm_1.scale is None


def _affine(norm: LayerNorm, shift: Tensor | None, scale: Tensor | None) -> Affine:
    weight = norm.weight.float()
    if shift is None or scale is None:
        return Affine(weight)
    if shift.shape[:-1].numel() > 1:
        return Affine(weight, None, shift, scale)
    return Affine(weight * (1 + scale.flatten()), shift.flatten())


def _branch(linear: nn.Module, gate: Tensor | None) -> Branch:
    if gate is None or gate.shape[:-1].numel() > 1 or not isinstance(linear, nn.Linear):
        return Branch(linear, gate)
    gate = gate.flatten()
    bias = None if linear.bias is None else (linear.bias * gate).to(linear.bias.dtype)
    return Branch(linear, None, ((linear.weight * gate[:, None]).to(linear.weight.dtype), bias))


def apply(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear map of x in the precision of its weights (or of autocast)."""
    if isinstance(linear, nn.Linear):
        x = x.to(linear.weight.dtype)
    out: Tensor = linear(x)  # one that `convert` made knows its own precision
    return out


@torch.compiler.disable
def _outside(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor | None], q: Tensor, k: Tensor, v: Tensor
) -> Tensor | None:
    """Attention runs its own kernels: a compiled layer is compiled before and after it."""
    return attention(q, k, v)


class DiTLayer(nn.Module):
    """One layer: project, attend, finish. Whose keys are attended to is the caller's affair."""

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

    def under(self, condition: Tensor | None) -> Conditioned:
        """The layer under a condition [B, 1 or T, C]; a single one is folded into the weights."""
        if self.modulation is None or condition is None:
            parts: tuple[Tensor | None, ...] = (None,) * 6
        else:
            parts = self.modulation(condition).float().chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        return Conditioned(
            _affine(self.norm_1, shift_1, scale_1),
            _branch(self.attention_out, gate_1),
            _affine(self.norm_2, shift_2, scale_2),
            _branch(self.mlp_out, gate_2),
        )

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        conditioned: Conditioned,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor | None],
        at: Tensor | None = None,
    ) -> Tensor | None:
        """h [B, T, E] → the residual stream after this layer.

        `attention` gets the rotated q and k, and v, each [B, H, T, D], and answers [B, H, T', D].
        Where T' < T only the last T' tokens go on; where it answers None nothing does, and None
        comes back (the last layer of a clean stream is wanted for its keys and values alone).
        With `at` bool [B, T'] only the chosen positions go on: [P, E] comes back.
        """
        attended = _outside(attention, *self.project(h, cos, sin, conditioned))
        if attended is None:
            return None
        h = h[:, h.shape[1] - attended.shape[2] :]
        if at is None:
            return self.finish(h, attended, conditioned)
        h, attended = h[at][:, None], attended.transpose(1, 2)[at][:, :, None]
        return self.finish(h, attended, conditioned).squeeze(1)

    def project(
        self, h: Tensor, cos: Tensor, sin: Tensor, conditioned: Conditioned
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, E] → rotated q, rotated k, v, each [B, H, T, D]."""
        return _Heads.apply(apply(self.qkv, conditioned.norm_1(h)), cos, sin, self.heads)

    def finish(self, h: Tensor, attended: Tensor, conditioned: Conditioned) -> Tensor:
        """The residual stream after attention's output [B, H, T, D] and the MLP."""
        dropout = self.dropout if self.training else 0.0
        h = conditioned.attention_out(h, attended.transpose(1, 2).flatten(2), dropout)
        x = expand(self.mlp_in, conditioned.norm_2(h))
        return conditioned.mlp_out(h, x, dropout)


class OutputLayer(nn.Module):
    """Final norm, modulation and the map to logits."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.modulation = Modulation(config, 2) if config.adaln else None

    def under(self, condition: Tensor | None) -> Affine:
        """The final norm under a condition."""
        if self.modulation is None or condition is None:
            return _affine(self.norm, None, None)
        shift, scale = self.modulation(condition).float().chunk(2, dim=-1)
        return _affine(self.norm, shift, scale)
