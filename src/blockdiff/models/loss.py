"""What a masked token costs, from the last hidden states, without the logits of a whole batch.

    z = W h + b over v ≠ mask                                SUBS: the mask token has none
    subs    −log p_θ(target),  p_θ = softmax(z)
    score   S − 1 − log p̃(target),  p̃_v = e^(z_v) / (V − 1),  S = Σ_v p̃_v

`score` is SEDD's score entropy (Lou et al. 2024) with the factor α/(1 − α) of its scores taken out,
which is part of the NELBO's weight. It equals −log p_θ(target) + (S − 1 − log S): the same cross
entropy and a penalty that is 0 only where the network's scores add up to a probability, S = 1.

The vocabulary is walked in slices: the forward keeps the running log-sum-exp, the backward computes
a slice of the probabilities again and leaves its part of every gradient. The largest tensor is
[P, slice], whatever the vocabulary.

Shapes: P chosen positions, E width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits computed at a time: 8 MiB in float32, so that a slice stays in a CPU's cache.
LOGITS = 2**21


def subs_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask_token_id: int,
    score: bool = False,
) -> Tensor:
    """−log p_θ(target) [P] in nats, float32, for h [P, E], weight [V, E], bias [V], targets [P].

    With `score`, SEDD's score entropy instead. Computes in the weight's precision, or autocast's
    where that is on; sums are float32. A target that is the mask token has probability 0: +inf.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
    with torch.autocast(h.device.type, enabled=False):
        result: Tensor = _SubsNLL.apply(h.to(dtype), weight, bias, targets, mask_token_id, score)
    return result


def subs_nll_from_logits(logits: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """The same from whole logits [..., V]: the obvious way, for those who have them."""
    logits = logits.float()
    column = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    logits = logits.masked_fill(column, -torch.inf)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(
        targets
    )


def score_entropy_from_logits(logits: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """SEDD's score entropy of a masked token, from whole logits [..., V]: the obvious way."""
    logits = logits.float() - math.log(logits.shape[-1] - 1)
    column = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    logits = logits.masked_fill(column, -torch.inf)
    of_target = logits.gather(-1, targets[..., None]).squeeze(-1)
    return logits.exp().sum(-1) - 1 - of_target


def _slices(positions: int, vocabulary: int) -> Iterator[slice]:
    size = max(256, LOGITS // max(positions, 1))
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))


def _logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, part: slice, mask_token_id: int
) -> Tensor:
    """Logits [P, slice] in float32, the mask token's at −inf."""
    own_bias = None if bias is None else bias[part].to(h.dtype)
    logits = F.linear(h, weight[part].to(h.dtype), own_bias).float()
    if part.start <= mask_token_id < part.stop:
        logits[:, mask_token_id - part.start] = -torch.inf
    return logits


def _inside(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Which positions [n] have their target in the slice, and where in it [n]."""
    rows = ((targets >= part.start) & (targets < part.stop)).nonzero().squeeze(-1)
    return rows, targets[rows] - part.start


class _SubsNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask_token_id: int,
        score: bool,
    ) -> Tensor:
        log_sum = torch.full(targets.shape, -torch.inf, device=h.device)
        of_target = torch.empty_like(log_sum)
        for part in _slices(len(h), len(weight)):
            logits = _logits(h, weight, bias, part, mask_token_id)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
            rows, columns = _inside(targets, part)
            of_target[rows] = logits[rows, columns]
        nll = log_sum - of_target
        if score:
            fixed = torch.full_like(log_sum, math.log(len(weight) - 1))
            nll, log_sum = torch.exp(log_sum - fixed) - 1 + fixed - of_target, fixed
        ctx.save_for_backward(h, weight, bias, targets, log_sum)
        ctx.mask_token_id = mask_token_id
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets, log_sum = ctx.saved_tensors
        (outer,) = gradients
        of_h = torch.zeros(h.shape, device=h.device)
        of_weight = torch.empty_like(weight)
        of_bias = None if bias is None else torch.empty_like(bias)
        for part in _slices(len(h), len(weight)):
            # ∂ nll / ∂ logits = p − [v = target], with p̃ for p where scores are fitted
            slope = _logits(h, weight, bias, part, ctx.mask_token_id)
            slope = slope.sub_(log_sum[:, None]).exp_()
            rows, columns = _inside(targets, part)
            slope[rows, columns] -= 1
            slope *= outer[:, None]
            if of_bias is not None:
                of_bias[part] = slope.sum(0)
            slope = slope.to(h.dtype)
            of_h += slope @ weight[part].to(h.dtype)
            of_weight[part] = slope.mT @ h
        return of_h.to(h.dtype), of_weight, of_bias, None, None, None
