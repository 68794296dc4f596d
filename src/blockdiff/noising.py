"""The forward process and its estimators: x_0 → Draw.

Each estimator turns clean tokens into a noised copy and a weight per token such that

    Σ_r Σ_ℓ weight_{r,ℓ} · CE_{r,ℓ},   CE_ℓ = −log p_θ(x_0^ℓ | x_t^b, x_0^{<b})

estimates the bound (eq. 8 of the paper), Σ_b E_t[ −α'_t/(1 − α_t) Σ_{ℓ masked} CE_ℓ ]; b is the
block of token ℓ. With n the number of tokens of a block that may be masked:

    bernoulli   t ~ U(0, 1), each token masked with probability 1 − α_t, weight −α'_t/(1 − α_t)
    clipped     mask rate ~ U[β, ω], weight 1/rate: less variance, but no longer a bound
    exact_k     k ~ U{1…n}, a uniform k-subset, weight n/k: bernoulli with t integrated out

`estimators.py` has the others, and how one of your own is registered. No estimator draws its own
random numbers: each is a function of a `Noise`. So the same code serves training, whose noise is
stratified over batch × blocks, and evaluation, whose noise depends on the seed and the sequence
alone (`evaluation/likelihood.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockdiff import checks
from blockdiff.categorical import real_dtype
from blockdiff.layout import BlockLayout
from blockdiff.schedules import Schedule


@dataclass(frozen=True)
class Noise:
    """Uniform numbers in (0, 1): one per block [R·B, N] and one per token [R·B, L].

    R draws of each of B sequences, draw-major: row r·B + i is for draw r of sequence i. With B = 2
    sequences and R = 3 draws the rows belong to the sequences 0, 1, 0, 1, 0, 1.
    """

    block: Tensor
    token: Tensor

    def rows(self, start: int, end: int) -> Noise:
        """The noise of the rows from `start` up to `end`."""
        return Noise(self.block[start:end], self.token[start:end])


@dataclass(frozen=True)
class Draw:
    """R noised copies of B sequences, in the order of `Noise`: row r·B + i is draw r of sequence i.

    `x_t` [R·B, L] int64. `weight` [R·B, L]: the factor of each token's cross entropy, 0 where the
    token is not masked. The loss is summed over the R copies, so the 1/R of their mean is in it.
    `sigma` [R·B, N]: σ = −log α of each block, for a time-conditioned network.
    `unbiased`: whether the weighted sum estimates the bound without bias.
    `exact`: whether the weighted sum is the bound itself, because every mask is among the copies.
    `maskable` bool [B, L]: the tokens that count; `make_estimator`'s draws know them.
    """

    x_t: Tensor
    weight: Tensor
    sigma: Tensor
    unbiased: bool
    exact: bool = False
    maskable: Tensor | None = None

    @property
    def masked(self) -> Tensor:
        """bool [R·B, L]: the masked tokens, which are those that have a loss."""
        return self.weight > 0

    def split(self, rows: int) -> list[Draw]:
        """The same copies as several draws of `rows` rows each."""
        parts = zip(*(x.split(rows) for x in (self.x_t, self.weight, self.sigma)), strict=True)
        return [Draw(x_t, weight, sigma, self.unbiased, self.exact) for x_t, weight, sigma in parts]


def stratified_noise(
    sequences: int, layout: BlockLayout, generator: torch.Generator, draws: int = 1
) -> Noise:
    """Noise for a training batch of B `sequences`, on the generator's device.

    The block numbers are stratified over draws × batch × blocks: (0, 1) is cut into R·B·N equal
    cells, and each block gets a number from a cell of its own. Which cell is random, so that each
    number alone is still uniform.
    """
    rows, device = draws * sequences, generator.device
    cells = rows * layout.blocks
    own: dict[str, Any] = {"generator": generator, "device": device}
    cell = torch.randperm(cells, **own)
    jitter = torch.rand(cells, **own, dtype=real_dtype(device))
    token = torch.rand(rows, layout.length, **own, dtype=real_dtype(device))
    return Noise(((cell + jitter) / cells).view(rows, layout.blocks), token)


def apply_mask(
    x_0: Tensor, masked: Tensor, weight: Tensor, rate: Tensor, mask_token_id: int, **facts: Any
) -> Draw:
    """The draw of a mask [R·B, L]; `weight` broadcasts to it, `rate` [R·B, N] is the mask rate.

    `facts`: `unbiased`, true by default, and `exact` of the `Draw`.
    """
    x_0 = x_0.repeat(len(masked) // len(x_0), 1)
    x_t = torch.where(masked, mask_token_id, x_0)
    weight = torch.where(masked, weight, 0.0).float()
    return Draw(x_t, weight, total_noise(rate).float(), **{"unbiased": True, **facts})


def total_noise(rate: Tensor) -> Tensor:
    """σ = −log α at a mask rate; at most 6.9, since log-linear noise ends at α = 0.001."""
    return -torch.log1p(-rate.clamp(max=1 - 1e-3))


def mask_at_rate(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    *,
    rate: Tensor,
    weight: Tensor,
    unbiased: bool = True,
) -> Draw:
    """Each token is masked on its own, with the `rate` of its block.

    `rate` and `weight` are [R·B, N]; the weight is that of a single draw, here divided by R.
    """
    draws = len(noise.token) // len(x_0)
    masked = (noise.token < layout.per_token(rate)) & maskable.repeat(draws, 1)
    weight = layout.per_token(weight) / draws
    return apply_mask(x_0, masked, weight, rate, mask_token_id, unbiased=unbiased)


def bernoulli(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    schedule: Schedule,
) -> Draw:
    """Each token is masked on its own with probability 1 − α_t, where t is the block's number."""
    rate, weight = schedule.mask_rate(noise.block), schedule.weight(noise.block)
    return mask_at_rate(x_0, layout, noise, maskable, mask_token_id, rate=rate, weight=weight)


def clipped(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    beta: float,
    omega: float,
) -> Draw:
    """Mask rate ~ U[β, ω], weight 1/rate. Biased, except under the clip [0, 1]: `bernoulli`.

    At L' = 1 the clip [1, 1] is the paper's tuned schedule: every token is masked, with weight 1.
    """
    checks.clip(beta, omega)
    rate = beta + (omega - beta) * noise.block
    return mask_at_rate(
        x_0, layout, noise, maskable, mask_token_id,
        rate=rate, weight=1 / rate, unbiased=beta == 0 and omega == 1,
    )  # fmt: skip


def exact_k(
    x_0: Tensor, layout: BlockLayout, noise: Noise, maskable: Tensor, mask_token_id: int
) -> Draw:
    """k ~ U{1…n} tokens of each block, weight n/k."""
    draws = len(noise.token) // len(x_0)
    maskable = maskable.repeat(draws, 1)
    n = count_in_blocks(maskable, layout)
    k = ((noise.block * n).floor() + 1).minimum(n)  # a number may round to 1 in float32
    masked, rate = lowest_k(noise.token, k, maskable, layout)
    return apply_mask(x_0, masked, layout.per_token(n / k / draws), rate, mask_token_id)


def count_in_blocks(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """How many tokens of each block are chosen: bool [.., L] → float [.., N]."""
    return layout.by_block(chosen).sum(-1).to(real_dtype(chosen.device))


def lowest_k(
    score: Tensor, k: Tensor, maskable: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """The k maskable tokens with the lowest scores of each block, and the k-th lowest score.

    Of uniform scores these tokens are a uniform k-subset. The k-th lowest of n scores follows
    Beta(k, n − k + 1), whatever the subset: that is the distribution of the mask rate given k, and
    a time-conditioned network is fed it.
    """
    by_block = layout.by_block(score.masked_fill(~maskable, 2.0))
    rank = by_block.argsort(-1).argsort(-1)
    masked = (rank < k[..., None]) & layout.by_block(maskable)
    return masked.flatten(-2), torch.where(masked, by_block, 0.0).amax(-1)
