"""The sliced loss against the obvious one."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from blockdiff.models import loss, loss_by_position
from blockdiff.models.loss import (
    score_entropy_from_logits,
    subs_nll,
    subs_nll_from_logits,
)
from helpers import Operators

POSITIONS, VOCABULARY, WIDTH = 37, 1001, 16

FILLED = 1024  # the next multiple of 64


@pytest.fixture(params=["words", "positions", "all"])
def sliced(request, monkeypatch):
    """Slices of 256 words, as on a CPU; of 5 positions, as on a GPU; one slice."""
    if request.param == "words":
        monkeypatch.setattr(loss, "LOGITS", 1)
    elif request.param == "positions":
        monkeypatch.setattr(loss, "_SubsNLL", loss_by_position.ByPosition)
        monkeypatch.setattr(loss_by_position, "LOGITS", 5 * VOCABULARY)
        assert len(loss_by_position.slices(POSITIONS, VOCABULARY)) == 8
    return request.param


def example(seed=0, mask=400):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(POSITIONS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=generator, requires_grad=True)
    targets = torch.randint(VOCABULARY - 1, (POSITIONS,), generator=generator)
    targets += targets >= mask
    return (h, weight, bias), targets


def both(leaves, targets, mask, outer, score=False, softcap=None):
    """(nll, gradients) the obvious way and ours."""
    h, weight, bias = leaves
    obvious = score_entropy_from_logits if score else subs_nll_from_logits

    def logits():
        z = torch.nn.functional.linear(h, weight, bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    results = []
    for law in (
        lambda: obvious(logits(), targets, mask),
        lambda: subs_nll(h, weight, bias, targets, mask, score, softcap=softcap),
    ):
        nll = law()
        wanted = [x for x in leaves if x is not None]
        results.append([nll, *torch.autograd.grad((nll * outer).sum(), wanted)])
    return results


@pytest.mark.parametrize("score", [False, True], ids=["subs", "score"])
@pytest.mark.parametrize("mask", [0, 400, VOCABULARY])
def test_capped_logits_and_their_gradients(sliced, mask, score):
    (h, weight, bias), targets = example(mask=mask)
    leaves = [x.detach().requires_grad_() for x in (h, weight * 3, bias)]
    outer = torch.linspace(-1, 2, POSITIONS)
    slow, fast = both(leaves, targets, mask, outer, score, softcap=4.0)
    assert fast[1].isfinite().all()
    for expected, found in zip(slow, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [0, 255, 256, 400, 999, VOCABULARY])
def test_every_slice_gives_the_same_loss_and_gradients(sliced, mask):
    """The mask token first, last or inside a slice of words."""
    leaves, targets = example(mask=mask)
    slow, fast = both(leaves, targets, mask, torch.linspace(-1, 2, POSITIONS))
    for expected, found in zip(slow, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [0, 400, 999])
def test_score_entropy_and_its_gradients(sliced, mask):
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


def test_without_a_bias(sliced):
    (h, weight, _), targets = example()
    slow, fast = both((h, weight, None), targets, 400, torch.ones(POSITIONS))
    for expected, found in zip(slow, fast, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite(sliced):
    (h, weight, bias), targets = example()
    slow, fast = both((h, (weight * 300).detach().requires_grad_(), bias), targets, 400, 1.0)
    assert fast[0].isfinite().all() and fast[0].max() > 1000
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=1e-3)


def test_the_mask_token_has_probability_zero(sliced):
    h, weight, bias = example()[0]
    assert subs_nll(h[:1], weight, bias, torch.tensor([400]), 400).item() == torch.inf
    shares = [
        subs_nll(h[:1], weight, bias, torch.tensor([v]), 400).neg().exp().item()
        for v in range(VOCABULARY)
    ]
    assert shares[400] == 0 and sum(shares) == pytest.approx(1, abs=1e-5)


def test_no_tensor_holds_all_logits(sliced):
    """Forward or backward: a slice of the vocabulary for all positions, or the other way round."""
    leaves, targets = example()
    with Operators() as seen:
        subs_nll(*leaves, targets, 400).sum().backward()
    largest = max(
        rows * columns for rows, columns in seen.tables({POSITIONS, 5, VOCABULARY, FILLED, 256})
    )
    parts = {"words": POSITIONS * 256, "positions": 5 * FILLED, "all": POSITIONS * VOCABULARY}
    assert largest == parts[sliced]


def test_no_slice_waits_for_the_host(sliced):
    """`nonzero`, and indexing by a bool, need the host to know how many there are."""
    leaves, targets = example()
    with Operators() as seen:
        subs_nll(*leaves, targets, 400).sum().backward()
    assert seen.waits() == []


@pytest.mark.parametrize("slices, size", [(loss.slices, 50_258), (loss_by_position.slices, 8704)])
def test_slices_are_the_whole(slices, size):
    found = slices(8704, 50_258)
    assert len(found) > 1 and found[0].start == 0 and found[-1].stop == size
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))


def test_kernels_of_a_gpu_are_compiled_once_for_any_number_of_positions():
    """Without a break, and to the same numbers as uncompiled."""
    torch._dynamo.reset()
    z = torch.randn(9, FILLED)
    targets, outer = torch.arange(9), torch.linspace(-1, 2, 9)
    for function, more in ((loss_by_position._read, ()), (loss_by_position._slope, (outer, outer))):
        graphs = CompileCounter()
        compiled = loss_by_position.compiled(function, graphs)
        for count in (7, 8, 9):
            given = [x[:count].clone() for x in (z, targets, *more)] + [VOCABULARY, 400, 4.0]
            expected, found = function(*given), compiled(*given)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
        assert graphs.frame_count == 1
    torch._dynamo.reset()


def test_a_frozen_weight_gets_no_gradient(sliced):
    """As under LoRA: its product is not computed."""
    (h, weight, bias), targets = example()
    subs_nll(h, weight.detach(), bias.detach(), targets, 400).sum().backward()
    alone = h.grad
    h.grad = None
    subs_nll(h, weight, bias, targets, 400).sum().backward()
    assert torch.equal(alone, h.grad) and weight.grad is not None


def test_autocast_computes_in_bf16(sliced):
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
