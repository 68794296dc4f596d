"""Every estimator against the bound itself.

The network is a table: a random positive CE for each (block, set of masked positions, position),
so that the bound is a finite sum and thousands of draws cost nothing. Means are compared within 4
standard errors: wrong by chance once in 16,000 comparisons; seeds are fixed, so each verdict is
final. A draw's estimate varies without bound as t → 0 (linear: its variance is infinite), so the
schedules are tested under importance sampling: t = v⁴, with density 4v³, v uniform.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from blockdiff.errors import InputError
from blockdiff.estimators import enumerate_masks, make_estimator, paired
from blockdiff.evaluation.likelihood import addressed_noise, independent_groups
from blockdiff.layout import BlockLayout
from blockdiff.noising import Noise, exact_k, stratified_noise
from blockdiff.registry import ESTIMATORS
from blockdiff.schedules import SCHEDULES, get_schedule
from blockdiff.training.clipping import clip_grid

MASK = 4
REJECT = 1e-4
LAYOUT = BlockLayout(16, 4)
# A kept first token; a whole block; nothing maskable; a prompt of one token and a padding token.
MASKABLE = torch.ones(1, 16, dtype=torch.bool)
MASKABLE[0, [0, 8, 9, 10, 11, 12, 14]] = False
X_0 = torch.randint(MASK, (1, 16), generator=torch.Generator().manual_seed(5))
TABLE = torch.from_numpy(np.random.default_rng(5).exponential(2.0, (4, 16, 4)))  # [N, 2^K, K]


def subsets(block):
    """The non-empty sets of maskable offsets of a block."""
    offsets = [i for i in range(4) if MASKABLE[0, 4 * block + i]]
    for k in range(1, len(offsets) + 1):
        yield from itertools.combinations(offsets, k)


def count(block):
    return int(MASKABLE[0, 4 * block : 4 * block + 4].sum())


def loss(block, subset):
    """Σ_{ℓ masked} CE_ℓ."""
    code = sum(1 << i for i in subset)
    return sum(TABLE[block, code, i].item() for i in subset)


def exact_by_k(block):
    """Σ_k (1/n) E_{|S|=k} (n/k) Σ CE."""
    n = count(block)
    return sum(loss(block, s) / (len(s) * math.comb(n, len(s))) for s in subsets(block))


def exact_by_t(block):
    """∫ (1/t) Σ_S t^|S| (1 − t)^(n − |S|) Σ CE dt, a polynomial: 8 Gauss nodes are exact."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    t = (nodes + 1) / 2
    n = count(block)
    integrand = sum(
        (t ** len(s) * (1 - t) ** (n - len(s)) / t * loss(block, s) for s in subsets(block)),
        np.zeros_like(t),
    )
    return float(integrand @ weights / 2)


BOUND = torch.tensor([exact_by_k(block) for block in range(4)], dtype=torch.float64)


def losses(draw):
    """Σ_ℓ weight_ℓ · CE_ℓ by block, float64 [R·B, N]; checks what any draw must satisfy."""
    x_0 = X_0.expand_as(draw.x_t)
    assert not (draw.masked & ~MASKABLE).any(), "never masks what cannot be masked"
    assert torch.equal(draw.x_t, torch.where(draw.x_t == MASK, MASK, x_0))
    assert (draw.x_t[draw.masked] == MASK).all()
    hidden = (draw.x_t == MASK).unflatten(-1, (4, 4))
    code = (hidden * torch.tensor([1, 2, 4, 8])).sum(-1)  # [R·B, N]
    cross_entropy = TABLE[torch.arange(4), code]  # [R·B, N, K]
    return (draw.weight.double().unflatten(-1, (4, 4)) * cross_entropy).sum(-1)


def uniform_noise(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    block, token = (torch.rand(rows, n, dtype=torch.float64, generator=generator) for n in (4, 16))
    return Noise(block, token)


def make(name, noise, **settings):
    rows = noise.token.shape[0]
    estimator = make_estimator(name, **settings)
    return estimator(X_0.expand(rows, -1), LAYOUT, noise, MASKABLE.expand(rows, -1), MASK)


def z_scores(estimates):
    """Distance of each block's mean from the bound, in standard errors; 0/0 counts as 0."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    return ((estimates.mean(0) - BOUND) / error.clamp(min=1e-12)).abs()


def test_both_forms_of_the_bound_and_enumerate_agree():
    by_t = torch.tensor([exact_by_t(block) for block in range(4)], dtype=torch.float64)
    torch.testing.assert_close(by_t, BOUND, rtol=1e-12, atol=0)
    assert BOUND[2] == 0 and (BOUND[[0, 1, 3]] > 1).all()
    draw = enumerate_masks(X_0, LAYOUT, None, MASKABLE, MASK)
    assert draw.exact and draw.unbiased and len(draw.x_t) == 15
    torch.testing.assert_close(losses(draw).sum(0), BOUND, rtol=1e-6, atol=0)


def test_enumerate_refuses_what_would_take_too_long():
    long = torch.zeros(1, 32, dtype=torch.int64)
    with pytest.raises(InputError, match="exact_k"):
        enumerate_masks(long, BlockLayout(32, 16), None, torch.ones_like(long).bool(), MASK)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_bernoulli_is_unbiased_under_every_schedule(schedule):
    noise = uniform_noise(100_000)
    importance = 4 * noise.block**3
    draw = make("bernoulli", Noise(noise.block**4, noise.token), schedule=schedule)
    assert draw.unbiased and not draw.exact
    estimates = losses(draw) * importance
    assert (z_scores(estimates) < 4).all()
    assert (estimates.std(0) < 5 * BOUND.clamp(min=1)).all(), "1.5 % errors at most: it can fail"
    alpha = get_schedule(schedule).alpha(noise.block**4).clamp(min=1e-3)  # log-linear noise's end
    torch.testing.assert_close(draw.sigma[:, 1], -alpha.log().float()[:, 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["exact_k", "paired"])
def test_draws_without_a_schedule_are_unbiased(name):
    draw = make(name, uniform_noise(50_000))
    assert draw.unbiased and not draw.exact
    estimates = losses(draw).view(-1, 50_000, 4).sum(0)
    assert (z_scores(estimates) < 4).all()
    assert (estimates.std(0) < 5 * BOUND.clamp(min=1)).all()


def test_each_member_of_a_pair_alone_is_unbiased():
    for member in losses(make("paired", uniform_noise(50_000))).chunk(2):
        assert (z_scores(2 * member) < 4).all(), "a pair's weights are halved"


def test_a_pair_masks_every_token_exactly_once():
    first, second = (make("paired", uniform_noise(1000)).x_t == MASK).chunk(2)
    assert torch.equal(first ^ second, MASKABLE.expand(1000, -1))
    assert not (first & second).any()


@pytest.mark.parametrize("name", ["bernoulli", "exact_k", "paired"])
@pytest.mark.parametrize("source", ["stratified", "addressed"])
def test_draws_of_the_same_row_add_up_to_one_estimate(name, source):
    """R = 4 draws of each row under the noise that training and evaluation use."""
    rows = 12_500
    if source == "stratified":
        noise = stratified_noise(rows, LAYOUT, torch.Generator().manual_seed(1), draws=4)
    else:
        noise = addressed_noise(torch.arange(rows), LAYOUT, seed=1, draws=4)
    estimator = make_estimator(name, schedule="square")
    draw = estimator(X_0.expand(rows, -1), LAYOUT, noise, MASKABLE.expand(rows, -1), MASK)
    estimates = losses(draw).view(-1, rows, 4).sum(0)
    # Stratification across rows only lowers the variance, so the bar is at least 4 errors wide.
    assert (z_scores(estimates) < 4).all()


def test_clipped_is_marked_biased_and_is():
    noise = uniform_noise(50_000)
    draw = make("clipped", noise, clip=(0.3, 0.8))
    assert not draw.unbiased
    assert (z_scores(losses(draw))[[0, 1]] > 8).all()
    rate = -torch.expm1(-draw.sigma.double())
    torch.testing.assert_close(rate, 0.3 + 0.5 * noise.block, rtol=1e-5, atol=0)


def test_clipped_to_everything_is_bernoulli():
    noise = uniform_noise(1000)
    whole, linear = make("clipped", noise, clip=(0.0, 1.0)), make("bernoulli", noise)
    assert whole.unbiased
    assert torch.equal(whole.x_t, linear.x_t)
    torch.testing.assert_close(whole.weight, linear.weight)


@pytest.mark.parametrize("clip", [None, (0.0, 0.0), (-0.1, 0.5), (0.2, 1.1), (0.8, 0.2)])
def test_clips_that_make_no_sense(clip):
    with pytest.raises(InputError):
        make("clipped", uniform_noise(1), clip=clip)


def test_tuned_schedule_of_blocks_of_one_is_exact_k():
    noise, layout = uniform_noise(50), BlockLayout(16, 1)
    noise = Noise(noise.token, noise.token)
    tuned, by_k = (
        make_estimator(name, clip=(1.0, 1.0))(
            X_0.expand(50, -1), layout, noise, MASKABLE.expand(50, -1), MASK
        )
        for name in ("clipped", "exact_k")
    )
    assert torch.equal(tuned.x_t, by_k.x_t) and torch.equal(tuned.weight, by_k.weight)


@pytest.mark.parametrize("clip", [(0.25, 0.75), (0.3, 0.8), (0.55, 1.0)])
def test_redrawn_masks_are_what_rejection_leaves(clip):
    """Against the obvious loop: Bernoulli masks at the same rate, kept if their share fits."""
    rows = 40_000
    draw = make("clipped_redraw", uniform_noise(rows), clip=clip)
    assert not draw.unbiased
    generator = torch.Generator().manual_seed(9)
    rate = clip[0] + (clip[1] - clip[0]) * torch.rand(rows, 1, generator=generator)
    masked = torch.zeros(rows, 4, dtype=torch.bool)
    pending = torch.ones(rows, dtype=torch.bool)
    while pending.any():
        fresh = torch.rand(rows, 4, generator=generator) < rate
        fits = (fresh.sum(-1) >= clip[0] * 4) & (fresh.sum(-1) <= clip[1] * 4)
        masked[pending & fits] = fresh[pending & fits]
        pending &= ~fits
    bits = torch.tensor([1, 2, 4, 8])
    ours = ((draw.x_t[:, 4:8] == MASK) * bits).sum(-1)
    table = [torch.bincount(x, minlength=16).numpy() for x in (ours, (masked * bits).sum(-1))]
    seen = np.stack(table)[:, np.stack(table).sum(0) > 0]
    fitting = {c for c in range(16) if clip[0] * 4 <= c.bit_count() <= clip[1] * 4}
    assert set(np.flatnonzero(table[0])) == fitting
    assert stats.chi2_contingency(seen).pvalue > REJECT
    own = draw.masked[:, 4:8]
    rates = -torch.expm1(-draw.sigma[:, 1:2])
    expected = (torch.ones_like(rates) if clip[0] > 0.5 else 1 / rates).expand(-1, 4)[own]
    torch.testing.assert_close(draw.weight[:, 4:8][own], expected, rtol=1e-4, atol=0)


def test_bell_shaped_rates():
    noise = uniform_noise(20_000)
    draw = make("bell", noise)
    rate = -torch.expm1(-draw.sigma[:, 1].double())
    assert stats.kstest(rate.numpy(), stats.beta(2, 2).cdf).pvalue > REJECT
    assert not draw.unbiased and (z_scores(losses(draw)) > 5).any()
    expected = (1 / rate[:, None]).expand(-1, 4)[draw.masked[:, 4:8]]
    torch.testing.assert_close(
        draw.weight[:, 4:8][draw.masked[:, 4:8]].double(), expected, rtol=1e-3, atol=0
    )


def test_redrawing_needs_a_mask_that_fits():
    with pytest.raises(InputError, match="widen"):
        make("clipped_redraw", uniform_noise(1), clip=(0.55, 0.7))


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_redrawing_takes_every_clip_of_the_search(size):
    """Blocks whole, with one maskable token, with none: the share counts all L' positions.

    A draw is that of the whole blocks with what is never masked put back, and the whole blocks'
    share lies in the clip wherever a block has one: not at L' = 1, where masks are `clipped`'s.
    """
    rows, layout = 4000, BlockLayout(64, size)
    maskable = torch.ones(1, 64, dtype=torch.bool)
    maskable[0, 0] = False  # a kept first token
    maskable[0, 33:] = False  # padding: at L' = 2 a block with one maskable token
    x_0 = torch.zeros(rows, 64, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    noise = Noise(*(torch.rand(rows, n, generator=generator) for n in (64 // size, 64)))
    for clip in [*clip_grid(16), (1.0, 1.0)]:
        estimator = make_estimator("clipped_redraw", clip=clip)
        whole = estimator(x_0, layout, noise, torch.ones_like(maskable).expand(rows, -1), MASK)
        part = estimator(x_0, layout, noise, maskable.expand(rows, -1), MASK)
        assert torch.equal(part.x_t == MASK, (whole.x_t == MASK) & maskable)
        assert torch.equal(part.sigma, whole.sigma) and not part.unbiased
        share = (whole.x_t == MASK).unflatten(-1, (-1, size)).float().mean(-1)
        assert size == 1 or clip[0] - 1e-6 <= share.min() <= share.max() <= clip[1] + 1e-6
        assert part.masked[:, 32].any(), "a block with one maskable token is trained on too"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_d3pm_is_the_bound_of_its_steps(schedule):
    """Against the sum over times and masks; and T = 1000 is the continuous bound to 1 %."""

    def bound_of(block, timesteps):
        law = get_schedule(schedule)
        t = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        rate, before = law.mask_rate(t), law.mask_rate(t - 1 / timesteps)
        n = count(block)
        return sum(
            ((rate - before) / rate * rate ** len(s) * (1 - rate) ** (n - len(s))).sum().item()
            * loss(block, s)
            for s in subsets(block)
        )

    for timesteps in (1, 3):
        draw = make("d3pm", uniform_noise(60_000), schedule=schedule, timesteps=timesteps)
        expected = torch.tensor([bound_of(b, timesteps) for b in range(4)], dtype=torch.float64)
        estimates = losses(draw)
        error = (estimates.std(0) / math.sqrt(60_000)).clamp(min=1e-9)
        assert ((estimates.mean(0) - expected).abs() <= 4 * error + 1e-5 * expected).all()
    limit = torch.tensor([bound_of(block, 1000) for block in range(4)], dtype=torch.float64)
    torch.testing.assert_close(limit, BOUND, rtol=0.01, atol=0)


def test_unknown_estimators_and_schedules():
    with pytest.raises(InputError, match="exact_k"):
        make_estimator("exact-k")
    with pytest.raises(InputError):
        make_estimator("bernoulli", schedule="log")
    for name in ESTIMATORS:
        make_estimator(name, clip=(0.3, 0.8))


def test_variance_of_exact_k_is_below_bernoullis():
    """Decided without sampling: both means are the bound, so second moments decide.

    That of exact_k is a finite sum, which the draws must reproduce (relative standard error about
    1 %, 5 % allowed). Bernoulli's is an integral of positive terms over t in (0, 1); the part over
    (0.01, 1) is already more.
    """
    variance = losses(make("exact_k", uniform_noise(100_000))).var(0)
    for block in (0, 1, 3):
        n = count(block)
        by_k = sum(
            n * (loss(block, s) / len(s)) ** 2 / math.comb(n, len(s)) for s in subsets(block)
        )
        t = np.linspace(0.01, 1, 100_001)
        integrand = sum(
            t ** len(s) * (1 - t) ** (n - len(s)) * (loss(block, s) / t) ** 2
            for s in subsets(block)
        )
        assert by_k < np.trapezoid(integrand, t)
        assert variance[block].item() == pytest.approx(by_k - BOUND[block].item() ** 2, rel=0.05)


@pytest.mark.parametrize("subset", [(0,), (2,), (1, 3), (0, 1, 2), (0, 1, 2, 3)])
def test_mask_rate_given_a_mask_is_beta(subset):
    """σ of exact_k and of both members of a pair in block 1, n = 4: 1 − α ~ Beta(k, n − k + 1)."""
    k, n = len(subset), 4
    noise = uniform_noise(40_000)
    first, second = make("paired", noise).split(40_000)
    chosen = torch.tensor([i in subset for i in range(4)])
    for draw in (make("exact_k", noise), first, second):
        own = ((draw.x_t[:, 4:8] == MASK) == chosen).all(-1)
        rate = -torch.expm1(-draw.sigma[own, 1].double())
        assert own.sum() > 400
        assert stats.kstest(rate.numpy(), stats.beta(k, n - k + 1).cdf).pvalue > REJECT


def test_blocks_without_masks_have_no_noise():
    assert (make("exact_k", uniform_noise(10)).sigma[:, 2] == 0).all()


def test_split_keeps_everything():
    draw = paired(X_0, LAYOUT, addressed_noise(torch.arange(1), LAYOUT, 0, 3), MASKABLE, MASK)
    parts = draw.split(1)
    assert len(parts) == 6 and all(part.unbiased for part in parts)
    for name in ("x_t", "weight", "sigma"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(draw, name))
    assert all(part.exact for part in enumerate_masks(X_0, LAYOUT, None, MASKABLE, MASK).split(5))


def test_stratified_noise_has_one_number_in_each_cell():
    noise = stratified_noise(3, LAYOUT, torch.Generator().manual_seed(0), draws=2)
    assert noise.block.shape == (6, 4) and noise.token.shape == (6, 16)
    assert sorted((noise.block * 24).long().flatten().tolist()) == list(range(24))


def test_stratified_noise_is_uniform_for_each_block():
    generator = torch.Generator().manual_seed(0)
    noise = [stratified_noise(2, BlockLayout(4, 2), generator).block for _ in range(4000)]
    for place in torch.stack(noise).flatten(1).T:
        assert stats.kstest(place.numpy(), "uniform").pvalue > REJECT


def test_addressed_noise_of_a_row_is_its_own():
    batch = addressed_noise(torch.tensor([7, 3, 5]), LAYOUT, seed=2, draws=3)
    alone = addressed_noise(torch.tensor([3]), LAYOUT, seed=2, draws=3)
    assert torch.equal(batch.block.view(3, 3, 4)[:, 1], alone.block)
    assert torch.equal(batch.token.view(3, 3, 16)[:, 1], alone.token)
    assert len(batch.token.unique()) == 3 * 3 * 16, "rows and draws have numbers of their own"
    other = addressed_noise(torch.tensor([3]), LAYOUT, seed=3, draws=3)
    assert not torch.equal(other.block, alone.block) and not torch.equal(other.token, alone.token)


@pytest.mark.parametrize(("draws", "groups"), [(1, 1), (2, 2), (3, 3), (4, 2), (8, 2), (9, 3)])
def test_addressed_noise_is_stratified_in_a_group_of_draws_and_uniform_over_rows(draws, groups):
    noise = addressed_noise(torch.arange(4000), LAYOUT, seed=0, draws=draws)
    by_row = noise.block.view(draws, 4000, 4).transpose(0, 1)  # [B, R, N]
    assert independent_groups(draws) == groups
    by_group = by_row.reshape(4000, groups, -1)
    cells = by_group.shape[-1]
    assert ((by_group * cells).long().sort(-1).values == torch.arange(cells)).all()
    by_place = by_row.flatten(1).T
    for place in [*by_place, *noise.token.view(draws, 4000, 16)[:, :, 3]]:
        assert stats.kstest(place.numpy(), "uniform").pvalue > REJECT
    # Of different groups: no correlation of 4,000 pairs passes 4 standard errors.
    first, last = by_group[:, 0].mean(-1), by_group[:, -1].mean(-1)
    if groups > 1:
        assert abs(torch.corrcoef(torch.stack([first, last]))[0, 1]) < 4 / math.sqrt(4000)


def test_one_maskable_token_a_block_has_one_estimate():
    """L' = 1: exact_k has no choice left, and its weight is 1: the autoregressive likelihood."""
    layout = BlockLayout(16, 1)
    noise = addressed_noise(torch.arange(1), layout, seed=0)
    draw = exact_k(X_0, layout, noise, MASKABLE, MASK)
    assert torch.equal(draw.weight, MASKABLE.float())
