"""The sliced loss against the obvious one."""

import pytest
import torch

from blockdiff.models import loss
from blockdiff.models.loss import (
    score_entropy_from_logits,
    subs_nll,
    subs_nll_from_logits,
)
from helpers import Shapes

POSITIONS, VOCABULARY, WIDTH = 37, 1000, 16


def example(seed=0, mask=400):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(POSITIONS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=generator, requires_grad=True)
    targets = torch.randint(VOCABULARY - 1, (POSITIONS,), generator=generator)
    targets += targets >= mask
    return (h, weight, bias), targets


def both(leaves, targets, mask, outer, score=False):
    """(nll, gradients) the obvious way and ours."""
    h, weight, bias = leaves
    obvious = score_entropy_from_logits if score else subs_nll_from_logits
    results = []
    for law in (
        lambda: obvious(torch.nn.functional.linear(h, weight, bias), targets, mask),
        lambda: subs_nll(h, weight, bias, targets, mask, score),
    ):
        nll = law()
        wanted = [x for x in leaves if x is not None]
        results.append([nll, *torch.autograd.grad((nll * outer).sum(), wanted)])
    return results


@pytest.mark.parametrize("mask", [0, 255, 256, 400, 999])
def test_every_slice_gives_the_same_loss_and_gradients(monkeypatch, mask):
    """Slices of 256 words: four of them, the mask token first, last or inside."""
    monkeypatch.setattr(loss, "LOGITS", 1)
    leaves, targets = example(mask=mask)
    slow, fast = both(leaves, targets, mask, torch.linspace(-1, 2, POSITIONS))
    for expected, found in zip(slow, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [0, 400, 999])
def test_score_entropy_and_its_gradients(monkeypatch, mask):
    monkeypatch.setattr(loss, "LOGITS", 1)
    (h, weight, bias), targets = example(mask=mask)
    leaves = [(x / 4).detach().requires_grad_() for x in (h, weight, bias)]
    slow, fast = both(leaves, targets, mask, torch.linspace(-1, 2, POSITIONS), score=True)
    for expected, found in zip(slow, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_score_entropy_is_cross_entropy_where_scores_are_probabilities():
    """S − 1 − log S more than it otherwise, hence never less."""
    (h, weight, bias), targets = example()
    logits = torch.nn.functional.linear(h, weight, bias).detach().double() / 4
    nll = subs_nll_from_logits(logits, targets, 400)
    assert (score_entropy_from_logits(logits, targets, 400) > nll).all()
    others = torch.arange(VOCABULARY) != 400
    log_sum = logits[:, others].logsumexp(-1, keepdim=True)
    scores = logits - log_sum + torch.tensor(VOCABULARY - 1.0).log()
    torch.testing.assert_close(
        score_entropy_from_logits(scores, targets, 400), nll, rtol=1e-4, atol=1e-4
    )


def test_without_a_bias():
    (h, weight, _), targets = example()
    slow, fast = both((h, weight, None), targets, 400, torch.ones(POSITIONS))
    for expected, found in zip(slow, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 1)
    (h, weight, bias), targets = example()
    slow, fast = both((h, (weight * 300).detach().requires_grad_(), bias), targets, 400, 1.0)
    assert fast[0].isfinite().all() and fast[0].max() > 1000
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=1e-3)


def test_the_mask_token_has_probability_zero():
    h, weight, bias = example()[0]
    assert subs_nll(h[:1], weight, bias, torch.tensor([400]), 400).item() == torch.inf
    shares = [
        subs_nll(h[:1], weight, bias, torch.tensor([v]), 400).neg().exp().item()
        for v in range(VOCABULARY)
    ]
    assert shares[400] == 0 and sum(shares) == pytest.approx(1, abs=1e-5)


def test_no_tensor_holds_all_logits(monkeypatch):
    """Neither forward nor backward: at most a slice of the vocabulary for all positions."""
    monkeypatch.setattr(loss, "LOGITS", 1)
    leaves, targets = example()
    with Shapes() as seen:
        subs_nll(*leaves, targets, 400).sum().backward()
    of_positions = [shape for shape in seen.shapes if len(shape) == 2 and shape[0] == POSITIONS]
    assert max(shape[1] for shape in of_positions) == 256


def test_autocast_computes_in_bf16():
    leaves, targets = example()
    exact = subs_nll(*leaves, targets, 400)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = subs_nll(*leaves, targets, 400)
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.01
    (gradient,) = torch.autograd.grad(rounded.sum(), leaves[1])
    (expected,) = torch.autograd.grad(exact.sum(), leaves[1])
    assert gradient.dtype == torch.float32
    assert ((gradient - expected).norm() / expected.norm()).item() < 0.02
