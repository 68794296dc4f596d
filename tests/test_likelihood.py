import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from blockdiff import objectives
from blockdiff.errors import InputError
from blockdiff.estimators import make_estimator
from blockdiff.evaluation import likelihood as module
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.layout import BlockLayout
from blockdiff.outputs import to_json
from helpers import random_tokens, tiny_model


@pytest.fixture
def model():
    return tiny_model(vocab_size=9, length=12, block_size=4)


def nll(logits, token, mask=8):
    """−log p of one token, the mask token having probability 0."""
    logits = logits.double().clone()
    logits[mask] = -math.inf
    return -logits.log_softmax(-1)[token].item()


@torch.no_grad()
def bound_by_hand(model, x_0, size, maskable):
    """Σ_b Σ_S Σ_ℓ CE / (k · C(n, k)), one dense pass for every block and set of masks."""
    total = 0.0
    for start in range(0, len(x_0), size):
        own = [i for i in range(start, start + size) if maskable[i]]
        for k in range(1, len(own) + 1):
            for masked in itertools.combinations(own, k):
                x_t = x_0.clone()
                x_t[list(masked)] = 8
                layout = model.config.layout_of(len(x_0), size)
                logits = model(x_t[None], x_0=x_0[None], layout=layout, backend="dense").logits
                loss = sum(nll(logits[0, i], x_0[i]) for i in masked)
                total += loss / (k * math.comb(len(own), k))
    return total


@pytest.mark.parametrize("clean", ["block", "causal"])
@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_enumerate_is_the_bound(size, keep_first, clean):
    model = tiny_model(vocab_size=9, length=12, block_size=4, clean_stream=clean)
    x_0 = random_tokens(model, 2, 12)
    maskable = [not (keep_first and i == 0) for i in range(12)]
    measured = likelihood(model, x_0, "enumerate", block_size=size, keep_first=keep_first)
    expected = [bound_by_hand(model, row, size, maskable) for row in x_0]
    assert measured.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert measured.tokens.tolist() == [12 - keep_first] * 2
    assert measured.nats_per_token == pytest.approx(sum(expected) / (24 - 2 * keep_first), rel=1e-5)
    assert measured.exact and measured.mask_stderr == 0


@pytest.mark.parametrize("estimator", ["exact_k", "enumerate", "paired"])
def test_blocks_of_one_are_an_autoregressive_factorisation(estimator):
    """Each token from the clean tokens before it and one mask, without choice or noise."""
    model = tiny_model(vocab_size=9, length=12, block_size=1)
    x_0 = random_tokens(model, 3, 12)
    expected = []
    for row in x_0:
        total = 0.0
        for i in range(12):
            x_t = torch.cat([row[:i], torch.tensor([8])])[None]
            with torch.no_grad():
                logits = model(x_t, x_0=x_t, backend="dense").logits[0, i]
            total += nll(logits, row[i])
        expected.append(total)
    measured = likelihood(model, x_0, estimator, draws=1, keep_first=False)
    assert measured.nats.tolist() == pytest.approx(expected, rel=1e-5)


def test_one_block_is_mdlm():
    """Nothing clean to look back on: the same as model(x_t) alone, draw by draw."""
    model = tiny_model(vocab_size=9, length=12, block_size=12)
    x_0 = random_tokens(model, 2, 12)
    measured = likelihood(model, x_0, "bernoulli", draws=3, schedule="cosine", seed=4)
    noise = module.addressed_noise(torch.arange(2), model.config.layout, 4, 3)
    maskable = torch.ones(2, 12, dtype=torch.bool)
    maskable[:, 0] = False
    draw = make_estimator("bernoulli", "cosine")(x_0, model.config.layout, noise, maskable, 8)
    with torch.no_grad():
        logits = model(draw.x_t).logits
    expected = [0.0, 0.0]
    for r, i in (draw.x_t == 8).nonzero().tolist():
        expected[r % 2] += draw.weight[r, i].item() * nll(logits[r, i], x_0[r % 2, i])
    assert measured.nats.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_ar_is_a_shifted_log_softmax(backend):
    model = tiny_model(vocab_size=9, length=12, causal=True)
    model.attention_backend = backend
    x_0 = random_tokens(model, 3, 12)
    with torch.no_grad():
        logits = model(x_0).logits
    expected = [sum(nll(logits[r, i - 1], x_0[r, i]) for i in range(1, 12)) for r in range(3)]
    measured = likelihood(model, x_0)
    assert measured.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert measured.tokens.tolist() == [11] * 3 and measured.exact and measured.estimator == "ar"
    assert measured.perplexity == pytest.approx(math.exp(sum(expected) / 33), rel=1e-5)
    assert measured.bits_per_token == pytest.approx(sum(expected) / 33 / math.log(2), rel=1e-5)


@pytest.mark.parametrize("estimator", ["bernoulli", "exact_k", "paired"])
def test_draws_converge_to_the_bound(model, estimator):
    """Within 4 standard errors of the masks: wrong by chance once in 16,000."""
    x_0 = random_tokens(model, 40, 12)
    exact = likelihood(model, x_0, "enumerate")
    drawn = likelihood(model, x_0, estimator, draws=30, schedule="square")
    error = drawn.mask_stderr
    assert abs(drawn.nats_per_token - exact.nats_per_token) < 4 * error < 0.1 * exact.nats_per_token


def test_the_draws_of_a_sequence_add_up(model):
    """Three draws of two sequences in one pass: token by token the sum of three passes."""
    x_0 = random_tokens(model, 2, 12)
    noise = module.addressed_noise(torch.arange(2), model.config.layout, 0, 3)
    maskable = torch.ones_like(x_0, dtype=torch.bool)
    draw = make_estimator("exact_k")(x_0, model.config.layout, noise, maskable, 8)
    with torch.no_grad():
        together = objectives.bd3lm(model, x_0, draw)
        apart = sum(objectives.bd3lm(model, x_0, part) for part in draw.split(2))
    assert together.shape == x_0.shape
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_biased_draws_are_refused(model, monkeypatch):
    x_0 = random_tokens(model, 2, 12)
    with pytest.raises(InputError):
        likelihood(model, x_0, "clipped")
    biased = lambda *_, **__: make_estimator("clipped", clip=(0.3, 0.8))  # noqa: E731
    monkeypatch.setattr(module, "make_estimator", biased)
    with pytest.raises(InputError, match="biased"):
        likelihood(model, x_0, "bernoulli")


@pytest.mark.parametrize(("estimator", "draws"), [("exact_k", 2), ("paired", 3), ("paired", 4)])
def test_mask_error_is_the_spread_over_seeds(model, estimator, draws):
    """Stratified draws depend on one another: the error is that of independent groups of them.

    100 seeds: their spread has a relative standard error of 7 %, what is claimed one of 3 % or
    less, so that 32 % is past 4 of both: wrong by chance once in 16,000 (the seeds are fixed). The
    spread of single draws would claim half as much again of 4 pairs.
    """
    x_0 = random_tokens(model, 12, 12)
    runs = [likelihood(model, x_0, estimator, draws=draws, seed=seed) for seed in range(100)]
    spread = torch.tensor([run.nats_per_token for run in runs]).double().std().item()
    claimed = torch.tensor([run.mask_stderr for run in runs]).double().square().mean().sqrt()
    assert claimed.item() == pytest.approx(spread, rel=0.32)


def test_the_true_bound_lies_in_most_intervals(model):
    """± 1.96 errors hold the bound in 95 of 100 runs; fewer than 85 once in 16,000."""
    x_0 = random_tokens(model, 40, 12)
    bound = likelihood(model, x_0, "enumerate").nats_per_token
    runs = [likelihood(model, x_0, "exact_k", draws=2, seed=seed) for seed in range(100)]
    held = sum(abs(run.nats_per_token - bound) <= 1.96 * run.mask_stderr for run in runs)
    assert 85 <= held < 100


@pytest.mark.parametrize("draws", [2, 6])
def test_errors_divide_by_one_less_than_what_they_were_taken_from(draws):
    """Few sequences and few groups, so that n and n − 1 differ, from per-draw figures by hand."""
    per_draw = torch.rand(draws, 3, generator=torch.Generator().manual_seed(0)).double() + 2
    tokens = torch.tensor([4, 5, 7])
    measured = module._summary(per_draw, tokens, "exact_k", False)
    rate = per_draw.mean(0).sum() / 16
    residual = per_draw.mean(0) - rate * tokens
    assert measured.stderr == pytest.approx(math.sqrt(3 / 2 * residual.square().sum()) / 16)
    first, second = per_draw[: draws // 2].mean(0), per_draw[draws // 2 :].mean(0)
    # Of two numbers the variance is half their difference's square, of their mean a quarter.
    expected = math.sqrt(((first - second).square() / 4).sum()) / 16
    assert measured.mask_stderr == pytest.approx(expected)
    assert math.isnan(module._summary(per_draw[:, :1], tokens[:1], "exact_k", False).stderr)


def test_error_over_sequences_is_the_bootstraps(model):
    """Rows of different lengths; a bootstrap of 4,000 has 1 % noise, the delta method some bias."""
    x_0 = random_tokens(model, 60, 12)
    documents = torch.zeros_like(x_0)
    for row in range(60):
        documents[row, 4 + row % 9 :] = -1
    measured = likelihood(model, x_0, "enumerate", documents=documents)
    pick = torch.randint(60, (4000, 60), generator=torch.Generator().manual_seed(0))
    rates = measured.nats[pick].sum(-1) / measured.tokens[pick].sum(-1)
    assert measured.stderr == pytest.approx(rates.std().item(), rel=0.1)
    assert measured.perplexity_stderr == pytest.approx(measured.perplexity * measured.stderr)


def test_errors_that_cannot_be_known(model):
    x_0 = random_tokens(model, 1, 12)
    one = likelihood(model, x_0, "exact_k", draws=1)
    assert math.isnan(one.stderr) and math.isnan(one.mask_stderr)


@pytest.mark.parametrize("estimator", ["bernoulli", "exact_k", "paired", "enumerate"])
def test_batches_do_not_matter(model, estimator):
    x_0 = random_tokens(model, 7, 12)
    seen = []
    whole = likelihood(model, x_0, estimator, draws=2, seed=3)
    parts = likelihood(model, x_0, estimator, draws=2, seed=3, batch_size=2, progress=seen.append)
    torch.testing.assert_close(whole.nats, parts.nats, rtol=1e-5, atol=0)
    assert seen == [2, 2, 2, 1]


def test_the_seed_decides(model):
    x_0 = random_tokens(model, 4, 12)
    a, b, c = (likelihood(model, x_0, "exact_k", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.nats, b.nats) and not torch.equal(a.nats, c.nats)


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"block_size": 1}])
def test_documents_and_padding(settings):
    """Padding counts nothing and changes nothing; each document is measured by itself."""
    model = tiny_model(**{"vocab_size": 9} | settings)
    size = model.config.block_size
    x_0 = random_tokens(model, 1, 12)
    documents = torch.tensor([[0] * 8 + [-1] * 4])
    measured = likelihood(model, x_0, "auto", documents=documents)
    other = x_0.clone()
    other[:, 8:] = 0
    assert torch.equal(likelihood(model, other, "auto", documents=documents).nats, measured.nats)
    assert measured.tokens.item() == 7
    short = likelihood(model, x_0[:, :8], block_size=size)
    torch.testing.assert_close(measured.nats, short.nats, rtol=1e-5, atol=1e-6)
    if not model.config.causal:
        two = torch.tensor([[0] * 4 + [1] * 8])
        last = bound_by_hand(model, x_0[0, 4:], size, [True] * 8)
        first = bound_by_hand(model, x_0[0, :4], size, [i > 0 for i in range(4)])
        assert likelihood(model, x_0, documents=two).nats.item() == pytest.approx(
            first + last, rel=1e-4
        )


def test_ar_does_not_read_other_documents():
    """Past the first token of a document, which only the end of the one before can predict."""
    model = tiny_model(vocab_size=9, causal=True)
    x_0 = random_tokens(model, 1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    other = x_0.clone()
    other[:, :5] = (x_0[:, :5] + 1) % 8
    counted = torch.ones_like(x_0, dtype=torch.bool)
    with torch.no_grad():
        layout = BlockLayout(x_0.shape[1], 1, documents=documents)
        before, after = (objectives.ar(model, x, counted, layout)[0] for x in (x_0, other))
    assert torch.equal(before[6:], after[6:]) and (before[1:5] != after[1:5]).all()
    assert before[0] == 0, "nothing predicts it"


def test_keep_first_defaults_to_the_models_own():
    x_0 = random_tokens(tiny_model(vocab_size=9), 2, 12)
    for keep in (True, False):
        model = tiny_model(vocab_size=9, keep_first=keep)
        measured = likelihood(model, x_0)
        assert torch.equal(measured.nats, likelihood(model, x_0, keep_first=keep).nats)
        assert measured.tokens.tolist() == [12 - keep] * 2


def test_auto_enumerates_what_is_small():
    for size, name in ((1, "enumerate"), (4, "enumerate"), (6, "exact_k"), (12, "exact_k")):
        model = tiny_model(vocab_size=9, block_size=size)
        assert likelihood(model, random_tokens(model, 1, 12), draws=1).estimator == name


def test_bad_input(model):
    x_0 = random_tokens(model, 2, 12)
    for bad in (x_0 + 9, x_0 - 9, x_0[0], x_0[:0], x_0[:, :7]):
        with pytest.raises(InputError):
            likelihood(model, bad)
    for options in ({"draws": 0}, {"batch_size": 0}, {"block_size": 5}, {"estimator": "k"}):
        with pytest.raises(InputError):
            likelihood(model, x_0, **{"estimator": "exact_k"} | options)
    with pytest.raises(InputError):
        likelihood(model, x_0, documents=torch.full_like(x_0, -1))
    with pytest.raises(InputError, match="exact_k"):
        likelihood(tiny_model(vocab_size=9, time_conditioning=True), x_0, "enumerate")


def test_training_mode_is_put_back(model):
    model.train()
    likelihood(model, random_tokens(model, 1, 12))
    assert model.training


def test_batches_are_sized_to_memory(model, monkeypatch):
    """Little memory means small passes and the same figures."""
    x_0 = random_tokens(model, 5, 12)
    whole = likelihood(model, x_0, "exact_k", draws=3)
    assert module.tokens_per_pass(model) == module.TOKENS_PER_PASS
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=160_000))
    assert 0 < module.tokens_per_pass(model) < 24
    sizes, forward = [], type(model).forward

    def spy(self, x_t, **options):
        sizes.append(len(x_t))
        return forward(self, x_t, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    small = likelihood(model, x_0, "exact_k", draws=3)
    assert set(sizes) == {1} and len(sizes) == 15
    torch.testing.assert_close(small.nats, whole.nats)


def test_a_perplexity_past_every_float_is_infinite():
    """A diverged model is measured too: the record is whole, and JSON says null."""
    model = tiny_model(vocab_size=9, length=12, block_size=4)
    with torch.no_grad():
        model.output.linear.weight.mul_(1e5)
    measured = likelihood(model, random_tokens(model, 4, 12))
    assert measured.nats_per_token > 710
    assert measured.perplexity == math.inf and math.isnan(measured.perplexity_stderr)
    assert json.loads(to_json(measured.record()))["perplexity"] is None


def test_an_ar_model_has_blocks_of_one_token_whatever_is_asked_for():
    model = tiny_model(vocab_size=9, length=12, causal=True)
    x_0 = random_tokens(model, 2, 12)
    with pytest.warns(UserWarning, match="block size 1, not 4"):
        measured = likelihood(model, x_0, block_size=4)
    assert torch.equal(measured.nats, likelihood(model, x_0).nats)
