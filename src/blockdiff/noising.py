"""The forward process and its estimators: x_0 → Draw.

Each estimator turns clean tokens into a noised copy and a weight per token such that

    Σ_r Σ_ℓ weight_{r,ℓ} · CE_{r,ℓ},   CE_ℓ = −log p_θ(x_0^ℓ | x_t^b, x_0^{<b})

estimates the bound (eq. 8 of the paper), Σ_b E_t[ −α'_t/(1 − α_t) Σ_{ℓ masked} CE_ℓ ]. With n the
number of tokens of a block that may be masked:

    bernoulli   t ~ U(0, 1), each token masked with probability 1 − α_t, weight −α'_t/(1 − α_t)
    clipped     mask rate ~ U[β, ω], weight 1/rate: less variance, but no longer a bound
    exact_k     k ~ U{1…n}, a uniform k-subset, weight n/k: bernoulli with t integrated out
    paired      k on {0…n}, a subset and its complement, weights (n+1)/k and (n+1)/(n−k), halved
    enumerate   all 2^n − 1 subsets with weight 1/(k·C(n, k)): the bound itself, no noise
    d3pm        t ~ U{1/T, …, 1}, weight T(α_{t−1/T} − α_t)/(1 − α_t): the bound of T steps
    bell        mask rate ~ Beta(2, 2), weight 1/rate: a clip with soft ends, biased like one
    clipped_redraw   clipped, with each block's masked share itself inside [β, ω]

No estimator draws its own random numbers: all are functions of a `Noise`, so the same code serves
training (stratified over batch × blocks) and evaluation (addressed by seed and row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from blockdiff.categorical import real_dtype, uniform
from blockdiff.checks import numbers
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.schedules import Schedule, get_schedule

# Enumeration costs 2^L' − 1 passes: 255 at 8.
ENUMERATE_LIMIT = 8


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


def _draw(
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


def _per_token(per_block: Tensor, layout: BlockLayout) -> Tensor:
    """[.., N] → [.., L]."""
    return per_block.repeat_interleave(layout.block_size, -1)


def _rank_in_block(score: Tensor, layout: BlockLayout) -> Tensor:
    """Rank 0, 1, … of each score [R·B, L] within its block, ascending."""
    by_block = score.view(*score.shape[:-1], layout.blocks, layout.block_size)
    return by_block.argsort(-1).argsort(-1).view_as(score)


def bernoulli(
    x_0: Tensor,
    layout: BlockLayout,
    noise: Noise,
    maskable: Tensor,
    mask_token_id: int,
    schedule: Schedule,
) -> Draw:
    """Each token masked on its own with probability 1 − α_t, t = `noise.block`."""
    draws = noise.token.shape[0] // x_0.shape[0]
    rate = schedule.mask_rate(noise.block)
    masked = (noise.token < _per_token(rate, layout)) & maskable.repeat(draws, 1)
    weight = _per_token(schedule.weight(noise.block), layout) / draws
    return _draw(x_0, masked, weight, rate, mask_token_id)


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
    check_clip(beta, omega)
    draws = noise.token.shape[0] // x_0.shape[0]
    rate = beta + (omega - beta) * noise.block
    masked = (noise.token < _per_token(rate, layout)) & maskable.repeat(draws, 1)
    weight = _per_token(1 / rate, layout) / draws
    whole = beta == 0 and omega == 1
    return _draw(x_0, masked, weight, rate, mask_token_id, unbiased=whole)


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
    check_clip(beta, omega)
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
    # The largest of n uniform scores, to the n-th power, is uniform and knows nothing of their
    # order, which is what chooses the subset.
    largest = noise.token.unflatten(-1, (layout.blocks, size)).amax(-1)
    k = (mass < largest.pow(size)[..., None]).sum(-1).clamp(max=int(allowed.nonzero()[-1]))
    masked, _ = _lowest_k(noise.token, k, torch.ones_like(noise.token, dtype=torch.bool), layout)
    by_rate = torch.ones_like(rate) if beta > 0.5 else 1 / rate.clamp(min=1e-6)
    weight = _per_token(by_rate, layout) / draws
    masked = masked & maskable.repeat(draws, 1)
    return _draw(x_0, masked, weight, rate, mask_token_id, unbiased=False)


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
    draws = noise.token.shape[0] // x_0.shape[0]
    t = ((noise.block * timesteps).floor() + 1).clamp(max=timesteps) / timesteps
    rate, before = schedule.mask_rate(t), schedule.mask_rate((t - 1 / timesteps).clamp(min=0))
    masked = (noise.token < _per_token(rate, layout)) & maskable.repeat(draws, 1)
    weight = _per_token(timesteps * (rate - before) / rate, layout) / draws
    return _draw(x_0, masked, weight, rate, mask_token_id)


def bell(
    x_0: Tensor, layout: BlockLayout, noise: Noise, maskable: Tensor, mask_token_id: int
) -> Draw:
    """Mask rate ~ Beta(2, 2), weight 1/rate: few blocks with hardly a mask or hardly a word.

    Without the importance weight 1/(6·rate·(1 − rate)), which would be unbounded at both ends and
    give the variance back: biased.
    """
    draws = noise.token.shape[0] // x_0.shape[0]
    # The inverse of 3u² − 2u³, by the cubic's trigonometric solution.
    rate = (0.5 - torch.sin(torch.asin(1 - 2 * noise.block) / 3)).clamp(min=1e-6)
    masked = (noise.token < _per_token(rate, layout)) & maskable.repeat(draws, 1)
    return _draw(
        x_0, masked, _per_token(1 / rate, layout) / draws, rate, mask_token_id, unbiased=False
    )


def check_clip(beta: float, omega: float) -> None:
    """Raises `InputError` unless 0 ≤ β ≤ ω ≤ 1 and ω > 0."""
    if not (0 <= beta <= omega <= 1 and omega > 0):
        raise InputError(f"clip [{beta}, {omega}] must satisfy 0 <= beta <= omega <= 1, omega > 0")


def exact_k(
    x_0: Tensor, layout: BlockLayout, noise: Noise, maskable: Tensor, mask_token_id: int
) -> Draw:
    """k ~ U{1…n} tokens of each block, weight n/k."""
    draws = noise.token.shape[0] // x_0.shape[0]
    maskable = maskable.repeat(draws, 1)
    n = _count(maskable, layout)
    k = ((noise.block * n).floor() + 1).minimum(n)  # a number may round to 1 in float32
    masked, rate = _lowest_k(noise.token, k, maskable, layout)
    return _draw(x_0, masked, _per_token(n / k / draws, layout), rate, mask_token_id)


def paired(
    x_0: Tensor, layout: BlockLayout, noise: Noise, maskable: Tensor, mask_token_id: int
) -> Draw:
    """A subset and its complement: 2R rows from R draws, every token masked exactly once a pair.

    k is uniform on 0…n with weight (n+1)/k, nothing for k = 0, so that each member of the pair
    alone is unbiased: E_k[(n+1)/k f_k] = Σ_{k≥1} f_k/k = E_{k~U{1…n}}[(n/k) f_k].
    """
    draws = noise.token.shape[0] // x_0.shape[0]
    maskable = maskable.repeat(draws, 1)
    n = _count(maskable, layout)
    k = (noise.block * (n + 1)).floor().minimum(n)
    masked, rate = _lowest_k(noise.token, k, maskable, layout)
    _, other_rate = _lowest_k(noise.token, n - k, maskable, layout)
    share = (n + 1) / (2 * draws)
    weight = torch.cat([share / k.clamp(min=1), share / (n - k).clamp(min=1)])
    both = torch.cat([masked, maskable & ~masked])
    return _draw(
        x_0, both, _per_token(weight, layout), torch.cat([rate, other_rate]), mask_token_id
    )


def enumerate_masks(x_0: Tensor, layout: BlockLayout, maskable: Tensor, mask_token_id: int) -> Draw:
    """Every non-empty subset of a block's maskable tokens, with weight 1/(k·C(n, k)).

    R = 2^L' − 1 rows a sequence; all blocks go through their subsets side by side. Raises
    `InputError` beyond L' = 8 (255 passes).
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
    n = _count(maskable, layout)
    k = _count(masked, layout)
    # A pattern that reaches beyond the maskable tokens repeats a smaller one: it counts nothing.
    own = k == _count(pattern.expand_as(masked), layout)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    weight = torch.where(own & (k > 0), torch.exp(-log_choose) / k.clamp(min=1), 0.0)
    rate = (k / (n + 1)).flatten(0, 1)
    weight = _per_token(weight, layout).flatten(0, 1)
    return _draw(x_0, masked.flatten(0, 1), weight, rate, mask_token_id, exact=True)


def _count(chosen: Tensor, layout: BlockLayout) -> Tensor:
    """Tokens chosen in each block: bool [.., L] → float [.., N]."""
    return (
        chosen.unflatten(-1, (layout.blocks, layout.block_size))
        .sum(-1)
        .to(real_dtype(chosen.device))
    )


def _lowest_k(
    score: Tensor, k: Tensor, maskable: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """The k maskable tokens of least score in each block, and the k-th least score.

    The set is a uniform k-subset, and independently of it the k-th of n uniform scores is
    Beta(k, n − k + 1): the mask rate given k, which a time-conditioned network is fed.
    """
    score = score.masked_fill(~maskable, 2.0)
    masked = (_rank_in_block(score, layout) < _per_token(k, layout)) & maskable
    by_block = torch.where(masked, score, 0.0).unflatten(-1, (layout.blocks, layout.block_size))
    return masked, by_block.amax(-1)


# (x_0, layout, noise, maskable, mask_token_id) → Draw
Estimator = Callable[[Tensor, BlockLayout, Noise, Tensor, int], Draw]
ESTIMATORS: tuple[str, ...] = (
    "bell", "bernoulli", "clipped", "clipped_redraw", "d3pm", "exact_k", "paired", "enumerate",
)  # fmt: skip


def make_estimator(
    name: str,
    schedule: str = "linear",
    clip: tuple[float, float] | None = None,
    timesteps: int = 1000,
) -> Estimator:
    """The estimator called `name` with its own settings filled in.

    `schedule` is read by `bernoulli` and `d3pm`, which also reads `timesteps`, `clip` = (β, ω) by
    `clipped` and `clipped_redraw`; the others need none of them, since with t integrated out no
    schedule is left. Raises `InputError` on an unknown name.
    """
    if name == "bernoulli":
        return partial(bernoulli, schedule=get_schedule(schedule))
    if name == "d3pm":
        numbers(timesteps=timesteps)
        return partial(d3pm, schedule=get_schedule(schedule), timesteps=timesteps)
    if name in ("clipped", "clipped_redraw"):
        if clip is None:
            raise InputError(f"estimator {name} needs a clip, for example 0.45,0.95")
        chosen = clipped if name == "clipped" else clipped_redraw
        return partial(chosen, beta=clip[0], omega=clip[1])
    if name == "bell":
        return bell
    if name == "exact_k":
        return exact_k
    if name == "paired":
        return paired
    if name == "enumerate":
        return lambda x_0, layout, noise, maskable, mask_token_id: enumerate_masks(
            x_0, layout, maskable, mask_token_id
        )
    raise InputError(f"no estimator called {name!r}; choose one of {', '.join(ESTIMATORS)}")
