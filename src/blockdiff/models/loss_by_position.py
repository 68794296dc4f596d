"""`subs_nll` for a GPU: some positions at a time, with the whole vocabulary.

    z = h Wᵀ + b             in h's precision, the only numbers of this size that are in memory
    log Σ e^z, z_target      one kernel that reads z
    ∂ nll / ∂ z              one that reads z, made again, and writes the slope in z's precision

What is done to z between products is compiled into these kernels where there is a gradient; plain
operators write it out in float32 several times, a fifth of a step of the paper's `small`. The rows
of a weight are filled up to a multiple of 64: products of 50,258 words run on the slower kernels
for rows that are no multiple of 16 bytes (docs/performance.md).

Shapes: P positions, p of a slice, E width, V vocabulary, V' as it is filled up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 2**28  # of a slice, twice 512 MiB in bf16: launching kernels takes no time to speak of


def slices(positions: int, vocabulary: int) -> list[slice]:
    """The positions of each slice."""
    size = max(1, LOGITS // vocabulary)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


class ByPosition(torch.autograd.Function):
    """−log p [P] in nats of h [P, E], weight [V, E], bias [V] or None and targets [P].

    As `subs_nll` says, whose work it does on a device that is no CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask_token_id: int,
        score: bool,
        softcap: float | None,
    ) -> Tensor:
        ctx.facts = len(weight), mask_token_id, softcap
        read = _fused(_read, h.device) if any(ctx.needs_input_grad) else _read
        filled = _filled(weight, h.dtype), None if bias is None else _filled(bias, h.dtype)
        found = [
            read(F.linear(h[part], *filled), targets[part], *ctx.facts)
            for part in slices(len(h), len(weight))
        ]
        log_sum, of_target = (
            torch.cat(parts) for parts in zip(*found, strict=True)
        ) if found else (h.new_zeros(0, dtype=torch.float32),) * 2  # fmt: skip
        nll = log_sum - of_target
        if score:
            fixed = torch.full_like(log_sum, math.log(len(weight) - 1))
            nll, log_sum = torch.exp(log_sum - fixed) - 1 + fixed - of_target, fixed
        ctx.save_for_backward(h, weight, bias, targets, log_sum)
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets, log_sum = ctx.saved_tensors
        wide, beside = _filled(weight, h.dtype), None if bias is None else _filled(bias, h.dtype)
        slope_of = _fused(_slope, h.device)
        of_h = torch.empty_like(h)
        of_weight: Tensor | None = None
        of_bias: Tensor | None = None
        for part in slices(len(h), len(weight)):
            given = F.linear(h[part], wide, beside), targets[part], log_sum[part]
            slope, of_words = slope_of(*given, gradients[0][part], *ctx.facts)
            of_h[part] = slope @ wide
            if ctx.needs_input_grad[1]:
                product = slope.mT @ h[part]
                of_weight = product.float() if of_weight is None else of_weight.add_(product)
            of_bias = of_words if of_bias is None else of_bias + of_words
        if ctx.needs_input_grad[1]:
            of_weight = weight.new_zeros(weight.shape) if of_weight is None else of_weight
            of_weight = of_weight[: len(weight)].to(weight.dtype)
        if bias is None:
            return of_h, of_weight, *[None] * 5
        of_bias = bias.new_zeros(bias.shape) if of_bias is None else of_bias
        return of_h, of_weight, of_bias[: len(bias)].to(bias.dtype), *[None] * 4


def _filled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [V, …] with zeros up to a multiple of 64 rows, unless it is one of 8 already."""
    extra = -len(x) % 64 if len(x) % 8 else 0
    return F.pad(x.to(dtype), (0, 0) * (x.dim() - 1) + (0, extra))


def _logits(
    z: Tensor, words: int, mask_token_id: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Logits [p, V'] in float32, −inf where there is no word; and the words [V']."""
    word = torch.arange(z.shape[1], device=z.device)
    logits = z.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.where((word < words) & (word != mask_token_id), logits, -torch.inf), word


def _read(
    z: Tensor, targets: Tensor, words: int, mask_token_id: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """log Σ e^z and the target's logit, [p] each."""
    logits, _ = _logits(z, words, mask_token_id, softcap)
    return logits.logsumexp(-1), logits.gather(-1, targets[:, None]).squeeze(-1)


def _slope(
    z: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    outer: Tensor,
    words: int,
    mask_token_id: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(p − [v = target]) · outer [p, V'], which is the gradient of z; and its sum over p."""
    logits, word = _logits(z, words, mask_token_id, softcap)
    slope = (logits - log_sum[:, None]).exp() - (word == targets[:, None]).float()
    slope = slope * outer[:, None]
    if softcap is not None:
        slope = slope * (1 - torch.tanh(z.float() / softcap) ** 2)
    return slope.to(z.dtype), slope.sum(0)


def _fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return compiled(function) if device.type == "cuda" else function


@lru_cache
def compiled(function: Callable[..., Any], backend: Any = "inductor") -> Callable[..., Any]:
    """`function` in few kernels, for any number of positions: it differs from step to step."""
    fused = torch.compile(function, fullgraph=True, backend=backend)

    def run(*given: Any) -> Any:
        for one in given:
            if isinstance(one, Tensor):
                torch._dynamo.maybe_mark_dynamic(one, 0)
        return fused(*given)

    return run
