"""What a masked token costs, from the last hidden states, without the logits of a whole batch.

    z = W h + b over v ≠ mask                                SUBS: the mask token has none
    with a soft cap c: c tanh(z / c) in place of z
    subs    −log p_θ(target),  p_θ = softmax(z)
    score   S − 1 − log p̃(target),  p̃_v = e^(z_v) / (V − 1),  S = Σ_v p̃_v

`score` is SEDD's score entropy (Lou et al. 2024) with the factor α/(1 − α) of its scores taken out,
which is part of the NELBO's weight. It equals −log p_θ(target) + (S − 1 − log S): the same cross
entropy and a penalty that is 0 only where the network's scores add up to a probability, S = 1.

The logits are made a slice at a time: the forward keeps the log-sum-exp, the backward computes a
slice of the probabilities again and leaves its part of every gradient. On a CPU a slice is some
words of the vocabulary for all positions, small enough for its cache, whatever the vocabulary. On a
GPU it is some positions with the whole vocabulary (`loss_by_position`).

Shapes: P chosen positions, E width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdiff.models.loss_by_position import ByPosition

LOGITS = 2**21  # computed at a time: 8 MiB in float32, so that a slice stays in a CPU's cache


def subs_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask_token_id: int,
    score: bool = False,
    *,
    softcap: float | None = None,
) -> Tensor:
    """−log p_θ(target) [P] in nats, float32, for h [P, E], weight [V, E], bias [V], targets [P].

    With `score`, SEDD's score entropy instead. `softcap` c turns a logit z into c·tanh(z/c), as in
    Gemma 2. A `mask_token_id` of V is no word's: there is no mask token. Computes in the weight's
    precision, or autocast's where that is on; sums are float32. A target that is the mask token has
    probability 0: +inf.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
    with torch.autocast(h.device.type, enabled=False):
        law = _SubsNLL if h.device.type == "cpu" else ByPosition
        result: Tensor = law.apply(
            h.to(dtype), weight, bias, targets, mask_token_id, score, softcap
        )
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


def slices(positions: int, vocabulary: int) -> list[slice]:
    """The words of each slice; the largest has `LOGITS` logits or little more."""
    size = max(256, LOGITS // max(positions, 1))
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def _logits(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    words: slice,
    mask_token_id: int,
    softcap: float | None,
) -> Tensor:
    """Logits [p, v] in float32 of h [p, E] for the slice's words, the mask token's at −inf."""
    own_bias = None if bias is None else bias[words].to(h.dtype)
    logits = F.linear(h, weight[words].to(h.dtype), own_bias).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if words.start <= mask_token_id < words.stop:
        logits[:, mask_token_id - words.start] = -torch.inf
    return logits


def _columns(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """[p, 1]: the column of each target in the slice, and whether the target is in it at all.

    Where it is not, the column is some other, to be masked.
    """
    inside = (targets >= words.start) & (targets < words.stop)
    column = (targets - words.start).clamp(0, words.stop - words.start - 1)
    return column[:, None], inside[:, None]


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
        softcap: float | None,
    ) -> Tensor:
        log_sum = torch.full(targets.shape, -torch.inf, device=h.device)
        of_target = torch.zeros_like(log_sum)
        for words in slices(len(h), len(weight)):
            logits = _logits(h, weight, bias, words, mask_token_id, softcap)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
            column, inside = _columns(targets, words)
            of_target += torch.where(inside, logits.gather(-1, column), 0.0).squeeze(-1)
        nll = log_sum - of_target
        if score:
            fixed = torch.full_like(log_sum, math.log(len(weight) - 1))
            nll, log_sum = torch.exp(log_sum - fixed) - 1 + fixed - of_target, fixed
        ctx.save_for_backward(h, weight, bias, targets, log_sum)
        ctx.mask_token_id, ctx.softcap = mask_token_id, softcap
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, targets, log_sum = ctx.saved_tensors
        (outer,) = gradients
        of_h = torch.zeros(h.shape, device=h.device)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = None if bias is None else torch.empty_like(bias)
        for words in slices(len(h), len(weight)):
            # ∂ nll / ∂ logits = p − [v = target]; for the score entropy p̃ in place of p
            slope = _logits(h, weight, bias, words, ctx.mask_token_id, ctx.softcap)
            bend = None
            if ctx.softcap is not None:  # of c tanh(z / c); 0 for the mask token, at −inf
                bend = 1 - (slope / ctx.softcap).square_().clamp_(max=1)
            slope = slope.sub_(log_sum[:, None]).exp_()
            column, inside = _columns(targets, words)
            slope.scatter_add_(-1, column, -inside.to(slope.dtype))
            slope *= outer[:, None]
            if bend is not None:
                slope *= bend
            if of_bias is not None:
                of_bias[words] = slope.sum(0)
            slope = slope.to(h.dtype)
            of_h += slope @ weight[words].to(h.dtype)
            if of_weight is not None:
                of_weight[words] = slope.mT @ h
        return of_h.to(h.dtype), of_weight, of_bias, None, None, None, None
