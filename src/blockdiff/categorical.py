"""Categorical distributions and the random numbers to draw from them.

Randomness is addressed, not streamed: the number used at (seed, row, position, step) is a hash of
that address. A row therefore has the same numbers alone or in a batch (and in float32 the same
text: docs/precision.md), and nothing depends on how many were drawn before. One uniform per token
through the inverse distribution function replaces the V Gumbel variables of a Gumbel-max draw: the
same distribution, V times fewer numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockdiff import checks

Array = NDArray[Any]
# SplitMix64's odd constants, as the signed 64-bit integers torch has.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(z: Any, bits: int) -> Any:
    """Logical shift; torch's own and numpy's keep the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Any) -> Any:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every bit in moves every bit out."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def real_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniform(seed: int, *address: Tensor | int) -> Tensor:
    """Uniform numbers in (0, 1), in `real_dtype`, one for each address.

    `address`: integers and int64 tensors that broadcast against each other, such as
    (row, position, step). The same seed and address always give the same number, on every device.
    """
    device = next((part.device for part in address if isinstance(part, Tensor)), None)
    state = _mix(torch.tensor(signed(seed), device=device) + _GOLDEN)
    for part in address:
        part = torch.as_tensor(part, dtype=torch.int64, device=device)
        # The multiplier tells the parts' order: without it (0, 1) and (1, 0) would collide.
        state = _mix(state * _MIX_2 + _mix(part + _GOLDEN))
    # Bits at the middle of their cell: never 0 and never 1, so log and floor(u·n) are safe.
    dtype = real_dtype(state.device)
    bits = 52 if dtype == torch.float64 else 23
    return (_shift_right(state, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


def host_uniform(seed: int | Array, *address: Array | int) -> Array:
    """`uniform` for what the host knows: the same numbers in float64, seeds that may be int64 too.

    numpy's operators cost less than torch's where there are few numbers.
    """
    state = _mix(_array(seed) + _GOLDEN)
    for part in address:
        state = _mix(state * _MIX_2 + _mix(_array(part) + _GOLDEN))
    found: Array = (_shift_right(state, 12).astype(np.float64) + 0.5) * 2.0**-52
    return found


def _array(part: int | Array) -> Array:
    """At least one-dimensional: numpy warns of what overflows in a single number."""
    return np.atleast_1d(np.asarray(signed(part) if isinstance(part, int) else part, np.int64))


def signed(seed: int) -> int:
    """Any Python integer as a signed 64-bit one."""
    return (seed + 2**63) % 2**64 - 2**63


def fold_seed(seed: int, *address: int) -> int:
    """A new 52-bit seed that depends on `seed` and each part of the address."""
    return int(uniform(seed, *address).item() * 2**52)


def warp(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    top_p_rule: str = "nucleus",
) -> Tensor:
    """Logits [..., V] after temperature, top-k and top-p; what is cut off is −inf.

    `top_p_rule` "nucleus" keeps the smallest set whose probability reaches p (Holtzman et al.
    2020); "paper" keeps the tokens whose cumulative probability is at most p and always the first,
    as the paper's public code does: it drops the token that crosses p. Temperature 0 keeps the
    most likely token only. Raises `InputError` on values outside their range.
    """
    checks.warp(temperature, top_k, top_p, top_p_rule)
    if temperature < torch.finfo(torch.float32).tiny:  # greedy; dividing by it would overflow
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    if temperature < 1e-3:  # shifted, so that it sends all others to −inf and nothing to +inf
        logits = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, kept)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        cumulative = probability.cumsum(-1)
        # Before the token itself: the first that reaches p is still inside.
        crossed = cumulative - probability if top_p_rule == "nucleus" else cumulative
        drop = crossed >= top_p if top_p_rule == "nucleus" else crossed > top_p
        drop[..., 0] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)
    return logits


def sample(logits: Tensor, u: Tensor) -> Tensor:
    """Draws from softmax(logits) [n, V] with one uniform u [n] each; int64 [n] out.

    The inverse of the distribution function, so tokens at −inf are never drawn.
    """
    return invert(logits.float().softmax(-1), u)


# Probabilities added up at a time, and of a vocabulary that is added up at once.
_PART, _SMALL = 256, 4096


def invert(probability: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative probability [n, V] exceeds u [n].

    Sums are in `real_dtype`, so that rare tokens of a large vocabulary keep their probability:
    there in two steps, to a part of it and then inside it, without a [n, V] tensor of that type.
    """
    dtype = real_dtype(probability.device)
    size = probability.shape[-1]
    below_one = 1 - torch.finfo(dtype).eps
    if size <= _SMALL:
        cumulative = probability.cumsum(-1, dtype=dtype)
        target = u.to(dtype)[:, None].clamp(max=below_one) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=size - 1)
    whole = size // _PART * _PART
    sums = probability[:, :whole].unflatten(-1, (-1, _PART)).sum(-1, dtype=dtype)
    rest = probability[:, whole:].sum(-1, keepdim=True, dtype=dtype)
    cumulative = torch.cat([sums, rest], dim=-1).cumsum(-1)
    target = u.to(dtype)[:, None].clamp(max=below_one) * cumulative[:, -1:]
    # Of numbers that are not finite the search would give the place behind the last token.
    part = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(part > 0, cumulative.gather(-1, (part - 1).clamp(min=0)), 0)
    index = part * _PART + torch.arange(_PART, device=u.device)
    inside = probability.gather(-1, index.clamp(max=size - 1)).masked_fill(index >= size, 0)
    inside = before + inside.to(dtype).cumsum(-1)
    # Rounded differently, the part's own end may lie a hair below the target.
    target = torch.minimum(target, inside[:, -1:] * below_one)
    found = part * _PART + torch.searchsorted(inside, target, right=True)
    return found.squeeze(-1).clamp(max=size - 1)


# Proposals per token before the vocabulary is sorted after all; each fails with probability 1 − p
# at most, so that at top-p 0.9 one token in 10,000 gets that far.
ATTEMPTS = 4


def draw(
    logits: Tensor,
    uniforms: Callable[[Tensor, int], Tensor],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    top_p_rule: str = "nucleus",
) -> Tensor:
    """Tokens [n] from softmax(warp(logits [n, V])): what `sample` of `warp` gives, without sorting.

    A token drawn before the top-p cut is kept if it lies inside, which takes one sum over the more
    probable ones, and otherwise drawn anew. `uniforms(rows, attempt)`: independent numbers [m] for
    the rows (indices) of that attempt. Raises `InputError` as `warp` does.
    """
    checks.warp(temperature, top_k, top_p, top_p_rule)
    everyone = torch.arange(len(logits), device=logits.device)
    logits = warp(logits, temperature=temperature, top_k=top_k)
    if top_p is None or top_p == 1:
        return sample(logits, uniforms(everyone, 0))
    if logits.device.type != "cpu":  # sorting is cheap there, and asking who is outside a wait
        cut = warp(logits, top_p=top_p, top_p_rule=top_p_rule)
        return sample(cut, uniforms(everyone, 0))
    probability = logits.softmax(-1)
    tokens = invert(probability, uniforms(everyone, 0))
    outside = (~_survives(probability, tokens, top_p, top_p_rule)).nonzero().squeeze(-1)
    for attempt in range(1, ATTEMPTS):
        if not len(outside):
            return tokens
        again = probability[outside]
        tokens[outside] = invert(again, uniforms(outside, attempt))
        outside = outside[~_survives(again, tokens[outside], top_p, top_p_rule)]
    if len(outside):
        cut = warp(logits[outside], top_p=top_p, top_p_rule=top_p_rule)
        tokens[outside] = sample(cut, uniforms(outside, ATTEMPTS))
    return tokens


def _survives(probability: Tensor, tokens: Tensor, top_p: float, rule: str) -> Tensor:
    """Whether each token [n] survives the top-p cut of its row of probability [n, V].

    Among equally probable tokens the one with the lower id comes first.
    """
    own = probability.gather(-1, tokens[:, None])
    more = torch.where(probability > own, probability, 0).sum(-1)
    index = torch.arange(probability.shape[-1], device=tokens.device)
    ties = ((probability == own) & (index < tokens[:, None])).sum(-1)
    before = more + ties * own.squeeze(-1)
    if rule == "nucleus":
        return before < top_p
    return (before == 0) | (before + own.squeeze(-1) <= top_p)
