"""The forward process and its estimators: x_0 → Draw.

Each estimator turns clean tokens into a noised copy and a weight per token such that

    Σ_r Σ_ℓ weight_{r,ℓ} · CE_{r,ℓ},   CE_ℓ = −log p_θ(x_0^ℓ | x_t^b, x_0^{<b})

estimates the bound (eq. 8 of the paper), Σ_b E_t[ −α'_t/(1 − α_t) Σ_{ℓ masked} CE_ℓ ]. With n the
number of tokens of a block that may be masked:

    bernoulli   t ~ U(0, 1), each token masked with probability 1 − α_t, weight −α'_t/(1 − α_t)
    clipped     mask rate ~ U[β, ω], weight 1/rate: less variance, but no longer a bound
    exact_k     k ~ U{1…n}, a uniform k-subset, weight n/k: bernoulli with t integrated out

`estimators.py` has the others, and how one of your own is registered. No estimator draws its own
random numbers: all are functions of a `Noise`, so the same code serves training (stratified over
batch × blocks) and evaluation (addressed by seed and row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff import checks
from blockdiff.categorical import real_dtype, uniform
from blockdiff.layout import BlockLayout
from blockdiff.schedules import Schedule


@dataclass(frozen=True)
class Noise:
    """Uniform numbers in (0, 1): one per block [R·B, N] and one per token [R·B, L].

    R draws of each of B rows, draw-major: row r·B + i belongs to sequence i.
    """

    block: Tensor
    token: Tensor

    def rows(self, start: int, end: int) -> Noise:
        """That of some rows."""
        return Noise(self.block[start:end], self.token[start:end])


@dataclass(frozen=True)
class Draw:
    """R noised copies of B sequences, draw-major.

    `x_t` [R·B, L] int64. `weight` [R·B, L]: what each token's cross entropy counts for, 0 where
    nothing is masked; the R copies of a sequence add up, so an average's 1/R is already in it.
    `sigma` [R·B, N]: total noise −log α of each block, for a time-conditioned network.
    `unbiased`: whether the weighted sum estimates the bound without bias.
    `exact`: whether it *is* the bound, all masks being there.
    """

    x_t: Tensor
    weight: Tensor
    sigma: Tensor
    unbiased: bool
    exact: bool = False

    @property
    def masked(self) -> Tensor:
        """bool [R·B, L]: the tokens that have a loss."""
        return self.weight > 0

    def split(self, rows: int) -> list[Draw]:
        """The same copies as several draws of `rows` rows each."""
        parts = zip(*(x.split(rows) for x in (self.x_t, self.weight, self.sigma)), strict=True)
        return [Draw(x_t, weight, sigma, self.unbiased, self.exact) for x_t, weight, sigma in parts]


def stratified_noise(
    rows: int, layout: BlockLayout, generator: torch.Generator, draws: int = 1
) -> Noise:
    """Noise for a training batch, on the generator's device.

    The block numbers are stratified over draws × batch × blocks: one in each of R·B·N equal cells,
    in random order, so that each of them alone is still uniform.
    """
    device = generator.device
    cells = draws * rows * layout.blocks
    cell = torch.randperm(cells, generator=generator, device=device)
    jitter = torch.rand(cells, generator=generator, device=device, dtype=real_dtype(device))
    token = torch.rand(
        draws * rows, layout.length, generator=generator, device=device, dtype=real_dtype(device)
    )
    return Noise(((cell + jitter) / cells).view(draws * rows, layout.blocks), token)


def independent_groups(draws: int) -> int:
    """How many equal groups the draws of a row are in, each stratified on its own.

    Stratified draws depend on one another, so that their spread overstates the error of their mean;
    groups do not. Two, or as few as divide the draws: the larger a group, the less its noise.
    """
    return next((n for n in range(2, draws + 1) if draws % n == 0), 1)


def addressed_noise(rows: Tensor, layout: BlockLayout, seed: int, draws: int = 1) -> Noise:
    """Noise that depends on the seed and the row's number only, for reproducible evaluation.

    `rows` int64 [B]: each sequence's number in the corpus. Stratified over the blocks of a row and
    the draws of a group (see `independent_groups`), never across groups, whose spread tells the
    masks' noise, nor across rows: a row's noise does not depend on what it is batched with.
    """
    device = rows.device
    groups = independent_groups(draws)
    cells = draws // groups * layout.blocks
    cell_index = torch.arange(groups * cells, device=device).view(groups, cells)
    order = uniform(seed, 0, rows[:, None, None], cell_index).argsort(-1)
    block = (order + uniform(seed, 1, rows[:, None, None], cell_index)) / cells  # [B, G, R/G·N]
    block = block.view(len(rows), draws, layout.blocks).transpose(0, 1).flatten(0, 1)
    draw = torch.arange(draws, device=device)[:, None, None]
    position = torch.arange(layout.length, device=device)
    token = uniform(seed, 2, rows[None, :, None], draw, position).flatten(0, 1)
    return Noise(block, token)


def apply_mask(
    x_0: Tensor,
    masked: Tensor,
    weight: Tensor,
    rate: Tensor,
    mask_token_id: int,
    *,
    unbiased: bool = True,
    exact: bool = False,
) -> Draw:
    """Applies a mask [R·B, L]; `weight` broadcasts to it, `rate` [R·B, N] is the mask rate."""
    x_0 = x_0.repeat(masked.shape[0] // x_0.shape[0], 1)
    return Draw(
        x_t=torch.where(masked, mask_token_id, x_0),
        weight=torch.where(masked, weight, 0.0).float(),
        sigma=total_noise(rate).float(),
        unbiased=unbiased,
        exact=exact,
    )


def total_noise(rate: Tensor) -> Tensor:
    """σ = −log α at a mask rate, up to 6.9: log-linear noise, which ends at α = 0.001."""
    return -torch.log1p(-rate.clamp(max=1 - 1e-3))


def per_token(per_block: Tensor, layout: BlockLayout) -> Tensor:
    """[.., N] → [.., L]."""
    return per_block.repeat_interleave(layout.block_size, -1)


def _rank_in_block(score: Tensor, layout: BlockLayout) -> Tensor:
    """Rank 0, 1, … of each score [R·B, L] within its block, ascending."""
    by_block = score.view(*score.shape[:-1], layout.blocks, layout.block_size)
    return by_block.argsort(-1).argsort(-1).view_as(score)


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
    """Each token masked on its own with the `rate` of its block; both, and `weight`, are [R·B, N].

    A token's cross entropy counts for its block's weight, divided by the number of draws R.
    """
    draws = noise.token.shape[0] // x_0.shape[0]
    masked = (noise.token < per_token(rate, layout)) & maskable.repeat(draws, 1)
    return apply_mask(
        x_0, masked, per_token(weight, layout) / draws, rate, mask_token_id, unbiased=unbiased
    )


def bernoulli(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    schedule: Schedule,
) -> Draw:
    """Each token masked on its own with probability 1 − α_t, t = `noise.block`."""
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
    """Mask rate ~ U[β, ω], weight 1/rate; biased unless β = 0 and ω = 1: then it is `bernoulli`.

    At L' = 1 the clip [1, 1] is the paper's tuned schedule: every token masked, with weight 1.
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
    draws = noise.token.shape[0] // x_0.shape[0]
    maskable = maskable.repeat(draws, 1)
    n = count_in_blocks(maskable, layout)
    k = ((noise.block * n).floor() + 1).minimum(n)  # a number may round to 1 in float32
    masked, rate = lowest_k(noise.token, k, maskable, layout)
    return apply_mask(x_0, masked, per_token(n / k / draws, layout), rate, mask_token_id)


def count_in_blocks(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """Tokens chosen in each block: bool [.., L] → float [.., N]."""
    return (
        chosen.unflatten(-1, (layout.blocks, layout.block_size))
        .sum(-1)
        .to(real_dtype(chosen.device))
    )


def lowest_k(
    score: Tensor, k: Tensor, maskable: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """The k maskable tokens of least score in each block, and the k-th least score.

    The set is a uniform k-subset, and independently of it the k-th of n uniform scores is
    Beta(k, n − k + 1): the mask rate given k, which a time-conditioned network is fed.
    """
    score = score.masked_fill(~maskable, 2.0)
    masked = (_rank_in_block(score, layout) < per_token(k, layout)) & maskable
    by_block = torch.where(masked, score, 0.0).unflatten(-1, (layout.blocks, layout.block_size))
    return masked, by_block.amax(-1)
