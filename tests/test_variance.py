"""The variance tool against sums over all masks, and against estimators whose noise is known."""

import itertools
import math

import pytest
import torch

from blockdiff import objectives
from blockdiff.errors import InputError
from blockdiff.evaluation import variance as module
from blockdiff.evaluation.variance import DEFAULT_ESTIMATORS, parse_estimator, variance
from blockdiff.noising import Draw
from blockdiff.registry import ESTIMATORS
from helpers import random_tokens, tiny_model


@pytest.fixture
def model():
    return tiny_model(vocab_size=7, length=4, block_size=4)


def moments(model, row):
    """Exact mean and variance over exact_k's masks of the loss [1] and gradient [n] of one row."""
    parameters = list(model.parameters())
    maskable = objectives.maskable_positions(row)
    values, chances = [], []
    for k in range(1, 4):
        for subset in itertools.combinations((1, 2, 3), k):
            masked = torch.zeros(1, 4, dtype=torch.bool)
            masked[0, list(subset)] = True
            weight = masked * (3 / k)
            draw = Draw(torch.where(masked, 6, row), weight, torch.zeros(1, 1), True)
            loss = objectives.bd3lm(model, row, draw).sum() / maskable.sum()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [
                torch.zeros(p.numel()) if g is None else g.flatten()
                for p, g in zip(parameters, grads, strict=True)
            ]
            values.append(torch.cat([loss.detach()[None], *flat]).double())
            chances.append(1 / 3 / math.comb(3, k))
    y, p = torch.stack(values), torch.tensor(chances, dtype=torch.float64)[:, None]
    assert p.sum() == pytest.approx(1)
    mean = (p * y).sum(0)
    return mean, (p * (y - mean) ** 2).sum(0)


def test_both_noises_are_those_of_all_masks(model):
    """400 draws of 6 batches of one row: a variance's error is about 3 %, 15 % is allowed."""
    x_0 = random_tokens(model, 6, 4)
    exact = [moments(model, row[None]) for row in x_0]
    mask = torch.stack([spread for _, spread in exact]).mean(0)
    data = torch.stack([mean for mean, _ in exact]).var(0)
    found = variance(model, x_0, "exact_k", batch_size=1, draws=400)
    assert found.batches == 6 and found.unbiased and found.passes == 1
    assert found.loss.mask == pytest.approx(mask[0].item(), rel=0.15)
    assert found.gradient.mask == pytest.approx(mask[1:].sum().item(), rel=0.15)
    # The batches are the same six, so the data's own variance is exact but for the masks' noise.
    assert found.loss.data == pytest.approx(data[0].item(), rel=0.15)
    assert found.gradient.data == pytest.approx(data[1:].sum().item(), rel=0.15)
    assert found.loss_mean == pytest.approx(
        torch.stack([mean for mean, _ in exact])[:, 0].mean().item(), rel=0.02
    )


def test_blocks_of_one_have_no_noise_of_masks(model):
    x_0 = random_tokens(model, 8, 4)
    silent = variance(model, x_0, "exact_k", block_size=1, batch_size=2, draws=3)
    assert silent.loss.mask == pytest.approx(0, abs=1e-9)
    assert silent.gradient.mask == pytest.approx(0, abs=1e-6 * silent.gradient.data)
    loud = variance(model, x_0, "bernoulli", block_size=1, batch_size=2, draws=20)
    assert loud.loss.mask > 0.01 and loud.gradient.mask > 10 * abs(silent.gradient.mask)


def test_integrating_time_out_lowers_the_variance():
    model = tiny_model(vocab_size=7, length=16, block_size=4)
    x_0 = random_tokens(model, 32, 16)
    spread = {
        name: variance(model, x_0, name, batch_size=4, draws=60)
        for name in ("bernoulli", "exact_k")
    }
    assert spread["exact_k"].loss.mask < 0.5 * spread["bernoulli"].loss.mask
    assert spread["exact_k"].gradient.mask < spread["bernoulli"].gradient.mask


def test_stratified_times_lower_the_variance():
    """By the variance of E[loss | t], which matters for long blocks and the square schedule: there
    it is 2t times a sum that hardly varies."""
    model = tiny_model(vocab_size=7, length=16, block_size=16)
    x_0 = random_tokens(model, 32, 16)
    plain, even = (
        variance(model, x_0, f"bernoulli:square{how}", batch_size=4, draws=60, gradient=False)
        for how in ("", "+stratified")
    )
    assert even.loss.mask < 0.8 * plain.loss.mask


def test_the_jackknife_knows_its_error(model):
    """Over 40 sets of text the spread of the result is what its standard error says, to a third."""
    found = [
        variance(
            model, random_tokens(model, 20, 4, seed=s), "exact_k", batch_size=1, draws=4, seed=s,
            gradient=False,
        ).loss
        for s in range(40)
    ]  # fmt: skip
    actual = torch.tensor([x.mask for x in found]).std()
    claimed = torch.tensor([x.mask_stderr for x in found]).mean()
    assert 0.66 < actual / claimed < 1.5


def test_names():
    for name in DEFAULT_ESTIMATORS:
        parse_estimator(name)
    assert parse_estimator("exact_k")[0].args[0] is ESTIMATORS["exact_k"]
    assert parse_estimator("paired+stratified")[1] and not parse_estimator("paired")[1]
    for wrong in ("exact_k:1", "clipped:0.3", "clipped:a:b", "exact_k+sorted", "enumerate", "x"):
        with pytest.raises(InputError):
            parse_estimator(wrong)


def test_bad_input(model):
    x_0 = random_tokens(model, 4, 4)
    for options in ({"batch_size": 4}, {"draws": 1}, {"batch_size": 0}, {"block_size": 3}):
        with pytest.raises(InputError):
            variance(model, x_0, "exact_k", **({"batch_size": 2} | options))
    with pytest.raises(InputError, match="AR"):
        variance(tiny_model(causal=True), random_tokens(model, 4, 4), "exact_k", batch_size=2)


def test_the_datas_part_is_without_the_masks_share():
    """Means of batches vary by masks / draws beside the text; by hand, few draws, known sums."""
    y = torch.tensor([[1.0, 3.0], [4.0, 8.0], [2.0, 2.0]], dtype=torch.float64)  # [D, R]
    found = module._analysis(y.mean(1)[:, None], y.square().sum(1), 2)
    mask = (2 + 8 + 0) / 3
    between = torch.tensor([2.0, 6.0, 2.0]).var().item()
    assert found.mask == pytest.approx(mask)
    assert found.data == pytest.approx(between - mask / 2)
