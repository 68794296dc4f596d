"""Every estimator of the bound, by name; and how one of your own is written.

`noising.py` has the three of the reader's path and says what all of them estimate. Beside them:

    paired      k on {0…n}, a subset and its complement, weights (n+1)/k and (n+1)/(n−k), halved
    enumerate   all 2^n − 1 subsets with weight 1/(k·C(n, k)): the bound itself, no noise
    d3pm        t ~ U{1/T, …, 1}, weight T(α_{t−1/T} − α_t)/(1 − α_t): the bound of T steps
    bell        mask rate ~ Beta(2, 2), weight 1/rate: a clip with soft ends, biased like one
    clipped_redraw   clipped, with each block's masked share itself inside [β, ω]

An estimator is a function that makes a `Draw`, and an `Estimator` that says what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blockdiff import checks
from blockdiff.checks import numbers
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.noising import (
    Draw,
    Noise,
    apply_mask,
    bernoulli,
    clipped,
    count_in_blocks,
    exact_k,
    lowest_k,
    mask_at_rate,
)
from blockdiff.registry import ESTIMATORS, register_estimator
from blockdiff.schedules import Schedule, get_schedule

# Enumeration costs 2^L' − 1 passes: 255 at 8.
ENUMERATE_LIMIT = 8


def paired(
    x_0: Tensor, layout: BlockLayout, noise: Noise, maskable: Tensor, mask_token_id: int
) -> Draw:
    """A subset and its complement: 2R rows from R draws, every token masked exactly once a pair.

    k is uniform on 0…n with weight (n+1)/k, nothing for k = 0, so that each member of the pair
    alone is unbiased: E_k[(n+1)/k f_k] = Σ_{k≥1} f_k/k = E_{k~U{1…n}}[(n/k) f_k].
    """
    draws = noise.token.shape[0] // x_0.shape[0]
    maskable = maskable.repeat(draws, 1)
    n = count_in_blocks(maskable, layout)
    k = (noise.block * (n + 1)).floor().minimum(n)
    masked, rate = lowest_k(noise.token, k, maskable, layout)
    _, other_rate = lowest_k(noise.token, n - k, maskable, layout)
    share = (n + 1) / (2 * draws)
    weight = torch.cat([share / k.clamp(min=1), share / (n - k).clamp(min=1)])
    both = torch.cat([masked, maskable & ~masked])
    return apply_mask(
        x_0, both, layout.per_token(weight), torch.cat([rate, other_rate]), mask_token_id
    )


def enumerate_masks(
    x_0: Tensor, layout: BlockLayout, noise: None, maskable: Tensor, mask_token_id: int
) -> Draw:
    """Every non-empty subset of a block's maskable tokens, with weight 1/(k·C(n, k)).

    `noise` is not read. R = 2^L' − 1 rows a sequence; all blocks go through their subsets side by
    side. Raises `InputError` beyond L' = 8 (255 passes).
    """
    size = layout.block_size
    if size > ENUMERATE_LIMIT:
        raise InputError(
            f"enumerate needs 2^{size} - 1 passes at block size {size}; it is allowed up to "
            f"{ENUMERATE_LIMIT}: use exact_k with more draws"
        )
    code = torch.arange(1, 2**size, device=x_0.device)
    bits = (code[:, None] >> torch.arange(size, device=x_0.device)) & 1  # [R, K]
    pattern = bits.bool().repeat(1, layout.blocks)[:, None]  # [R, 1, L]
    masked = pattern & maskable
    n = count_in_blocks(maskable, layout)
    k = count_in_blocks(masked, layout)
    # A pattern that reaches beyond the maskable tokens repeats a smaller one: its weight is 0.
    own = k == count_in_blocks(pattern.expand_as(masked), layout)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    weight = torch.where(own & (k > 0), torch.exp(-log_choose) / k.clamp(min=1), 0.0)
    rate = (k / (n + 1)).flatten(0, 1)
    weight = layout.per_token(weight).flatten(0, 1)
    return apply_mask(x_0, masked.flatten(0, 1), weight, rate, mask_token_id, exact=True)


def d3pm(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    schedule: Schedule,
    timesteps: int,
) -> Draw:
    """Absorbing D3PM (Austin et al. 2021): T = `timesteps` times instead of a continuum.

    −log p(x) ≤ T · E_i[ (α_s − α_t)/(1 − α_t) Σ_{ℓ masked at t} CE_ℓ ], t = i/T, s = t − 1/T: a
    looser bound, which falls to that of `bernoulli` as T grows.
    """
    t = ((noise.block * timesteps).floor() + 1).clamp(max=timesteps) / timesteps
    rate, before = schedule.mask_rate(t), schedule.mask_rate((t - 1 / timesteps).clamp(min=0))
    weight = timesteps * (rate - before) / rate
    return mask_at_rate(x_0, layout, noise, maskable, mask_token_id, rate=rate, weight=weight)


def bell(
    x_0: Tensor, layout: BlockLayout, noise: Noise, maskable: Tensor, mask_token_id: int
) -> Draw:
    """Mask rate ~ Beta(2, 2), weight 1/rate: few blocks are nearly clean or nearly all masked.

    Biased: the bound's mask rates are uniform, so each block would also need the weight
    1/(6·rate·(1 − rate)), the inverse of this density. That weight has no bound at either end, and
    would bring back the variance that the bell takes away.
    """
    # The inverse of 3u² − 2u³, by the cubic's trigonometric solution.
    rate = (0.5 - torch.sin(torch.asin(1 - 2 * noise.block) / 3)).clamp(min=1e-6)
    return mask_at_rate(
        x_0, layout, noise, maskable, mask_token_id, rate=rate, weight=1 / rate, unbiased=False
    )


def clipped_redraw(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    beta: float,
    omega: float,
) -> Draw:
    """`clipped`, but masks are drawn anew until each block's masked share lies in [β, ω].

    The public code's rule, without its loop: given the rate, k is binomial restricted to
    βL' ≤ k ≤ ωL', and the set a uniform k-subset. As there, the share is that of all L' positions,
    those that are never masked (padding, a kept first token) included; these are put back
    afterwards. A block of one token has no share to hold in a clip (the public code's loop would
    not end there): it is drawn by `clipped`. As there, too, the weight is 1/r for β ≤ 0.5 and 1
    above. Biased. Raises `InputError` where longer blocks have no such k.
    """
    size = layout.block_size
    if size == 1:
        return replace(
            clipped(x_0, layout, noise, maskable, mask_token_id, beta, omega), unbiased=False
        )
    checks.clip(beta, omega)
    draws = noise.token.shape[0] // x_0.shape[0]
    rate = beta + (omega - beta) * noise.block
    count = torch.arange(size + 1, device=x_0.device, dtype=rate.dtype)
    slack = 1e-9 if rate.dtype == torch.float64 else 1e-5  # 0.3 · 10 is 3
    allowed = (count >= beta * size - slack) & (count <= omega * size + slack)
    if not bool(allowed.any()):
        raise InputError(
            f"no number of masked tokens in a block of {size} lies in [{beta}, {omega}] of it: "
            "widen the clip, or use clipped without redrawing"
        )
    inside = rate.clamp(1e-6, 1 - 1e-6)[..., None]
    log_choose = -torch.lgamma(count + 1) - torch.lgamma(size - count + 1)
    log_mass = log_choose + count * inside.log() + (size - count) * torch.log1p(-inside)
    mass = log_mass.masked_fill(~allowed, -torch.inf).softmax(-1).cumsum(-1)
    # The largest of n uniform scores, to the n-th power, is uniform and independent of the scores'
    # order. So it draws k, and the order draws the subset.
    largest = noise.token.unflatten(-1, (layout.blocks, size)).amax(-1)
    k = (mass < largest.pow(size)[..., None]).sum(-1).clamp(max=int(allowed.nonzero()[-1]))
    masked, _ = lowest_k(noise.token, k, torch.ones_like(noise.token, dtype=torch.bool), layout)
    by_rate = torch.ones_like(rate) if beta > 0.5 else 1 / rate.clamp(min=1e-6)
    weight = layout.per_token(by_rate) / draws
    masked = masked & maskable.repeat(draws, 1)
    return apply_mask(x_0, masked, weight, rate, mask_token_id, unbiased=False)


# (x_0, layout, noise, maskable, mask_token_id) → Draw
MakeDraw = Callable[[Tensor, BlockLayout, Noise | None, Tensor, int], Draw]


@dataclass(frozen=True)
class Estimator:
    """A way to draw masks: its function and what that reads.

    Attributes:
        name: What it is chosen by.
        draw: (x_0, layout, noise, maskable, mask_token_id, settings by keyword) → `Draw`. x_0 and
            maskable are [B, L], what is noised [R·B, L]: row r·B + i is draw r of sequence i.
        reads: Which of "noise", "schedule" (as `schedule`), "clip" (as `beta` and `omega`) and
            "timesteps" the function takes; `noise` is None for one that reads none.
        unbiased: Whether the weighted sum estimates the bound, so that it may be reported.

    Example:
        >>> import blockdiff
        >>> from blockdiff.noising import mask_at_rate
        >>> def half(x_0, layout, noise, maskable, mask_token_id):
        ...     rate = noise.block * 0 + 0.5
        ...     return mask_at_rate(x_0, layout, noise, maskable, mask_token_id,
        ...                         rate=rate, weight=1 / rate, unbiased=False)
        >>> blockdiff.Estimator("half", half, unbiased=False).needs_clip
        False
    """

    name: str
    draw: Callable[..., Draw]
    reads: tuple[str, ...] = ("noise",)
    unbiased: bool = True

    @property
    def needs_clip(self) -> bool:
        return "clip" in self.reads

    @property
    def random(self) -> bool:
        """Whether it draws at all: one that reads no noise gives the bound itself."""
        return "noise" in self.reads


def make_estimator(
    chosen: str | Estimator,
    schedule: str | Schedule = "linear",
    clip: tuple[float, float] | None = None,
    timesteps: int = 1000,
) -> MakeDraw:
    """The estimator called `chosen`, or an `Estimator` itself, with the settings that it reads.

    `clip` is (β, ω). Raises `InputError` on an unknown name, or without a clip where one is read.
    """
    estimator = ESTIMATORS.find(chosen)
    settings: dict[str, Any] = {}
    if "schedule" in estimator.reads:
        settings["schedule"] = get_schedule(schedule)
    if "timesteps" in estimator.reads:
        numbers(timesteps=timesteps)
        settings["timesteps"] = timesteps
    if "clip" in estimator.reads:
        if clip is None:
            raise InputError(f"estimator {estimator.name} needs a clip, for example 0.45,0.95")
        settings["beta"], settings["omega"] = clip
    return partial(_draw, estimator, settings)


def _draw(
    estimator: Estimator,
    settings: dict[str, Any],
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise | None,
    maskable: Tensor,
    mask_token_id: int,
) -> Draw:
    """What an estimator draws; `InputError` where that is no `Draw` of x_0 by its shapes.

    Where the clean stream predicts the first token of each block, that token is never masked, and
    its exact loss is counted once: weight 1 in the first copy.
    """
    starts = layout.starts(x_0.device) & maskable if layout.prediction == "shift" else None
    own = maskable if starts is None else maskable & ~starts
    draw = estimator.draw(x_0, layout, noise, own, mask_token_id, **settings)
    if isinstance(draw, Draw):
        parts = (draw.x_t, draw.weight, draw.sigma)
        if all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
            count = len(draw.x_t)
            sizes = (x_0.shape[1], x_0.shape[1], layout.blocks)
            fits = all(part.shape == (count, n) for part, n in zip(parts, sizes, strict=True))
            if fits and count and count % len(x_0) == 0 and draw.x_t.dtype == torch.int64:
                if starts is not None:
                    weight = draw.weight.clone()
                    weight[: len(x_0)][starts] = 1.0
                    draw = replace(draw, weight=weight)
                return replace(draw, maskable=maskable)
    raise InputError(
        f"the estimator {estimator.name} gave no Draw of x_0 {list(x_0.shape)}: x_t int64 and "
        f"weight [R*B, L], sigma [R*B, N = {layout.blocks}]"
    )


for _estimator in (
    Estimator("enumerate", enumerate_masks, reads=()),
    Estimator("exact_k", exact_k),
    Estimator("paired", paired),
    Estimator("bernoulli", bernoulli, reads=("noise", "schedule")),
    Estimator("d3pm", d3pm, reads=("noise", "schedule", "timesteps")),
    Estimator("bell", bell, unbiased=False),
    Estimator("clipped", clipped, reads=("noise", "clip"), unbiased=False),
    Estimator("clipped_redraw", clipped_redraw, reads=("noise", "clip"), unbiased=False),
):
    register_estimator(_estimator)
