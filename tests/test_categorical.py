import math

import pytest
import torch
from scipy import stats

from blockdiff.categorical import _survives, draw, fold_seed, host_uniform, sample, uniform, warp
from blockdiff.errors import InputError

# Tests of a distribution reject under p = 1e-4; seeds are fixed, so each verdict is final.
REJECT = 1e-4


def test_uniform_depends_on_its_address_alone():
    rows, positions = torch.tensor([3, 9])[:, None], torch.arange(5)
    batch = uniform(7, rows, positions, 1)
    assert batch.shape == (2, 5) and batch.dtype == torch.float64
    assert torch.equal(batch, uniform(7, rows, positions, 1))
    assert torch.equal(batch[1:], uniform(7, rows[1:], positions, 1)), "alone as in a batch"
    assert batch[1, 2] == uniform(7, 9, 2, 1)


def test_every_part_of_the_address_counts():
    addresses = [
        (s, r, p, t) for s in (0, 1, -1) for r in range(3) for p in range(3) for t in (0, 1)
    ]
    numbers = {uniform(*address).item() for address in addresses}
    assert len(numbers) == len(addresses), "swapped or dropped parts would collide"


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**70)])
def test_any_integer_is_a_seed(seed):
    assert 0 < uniform(seed, 0).item() < 1
    assert 0 <= fold_seed(seed, 1) < 2**52
    assert fold_seed(seed, 1) != fold_seed(seed, 2)


@pytest.mark.parametrize("part", range(3))
def test_uniform_is_uniform_along_each_part(part):
    address = [torch.tensor(4), torch.tensor(4), torch.tensor(4)]
    address[part] = torch.arange(20_000)
    u = uniform(0, *address)
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > REJECT


def test_numbers_lie_in_the_middle_of_their_cell():
    """One of 2^52 cells each: so none is ever 0 or 1, which no sample could show."""
    u = uniform(0, torch.arange(1000))
    assert ((u * 2.0**53) % 2 == 1).all()


def test_neighbouring_streams_are_uncorrelated():
    n = 20_000
    index = torch.arange(n)
    base = uniform(0, index, 0)
    others = [uniform(0, index, 1), uniform(1, index, 0), uniform(0, index + 1, 0)]
    for other in others:
        r = torch.corrcoef(torch.stack([base, other]))[0, 1].item()
        assert abs(r) < 4 / math.sqrt(n), "4 standard errors: wrong once in 16,000"
    pairs = torch.histogramdd(torch.stack([base, others[0]], -1), bins=[10, 10], range=[0, 1] * 2)
    assert stats.chisquare(pairs.hist.flatten().numpy()).pvalue > REJECT


def naive_kept(logits, top_k, top_p, rule):
    """The set of kept tokens of one row, token by token."""
    probability = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[: top_k or len(order)]
    total = sum(probability[i] for i in order)
    kept, reached = set(), 0.0
    for i in order:
        share = probability[i] / total
        crosses = reached >= top_p if rule == "nucleus" else reached + share > top_p
        if kept and crosses:
            break
        kept.add(i)
        reached += share
    return kept


@pytest.mark.parametrize("rule", ["nucleus", "paper"])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
def test_cuts_agree_with_a_loop(rule, top_p, top_k):
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)) * 2
    warped = warp(logits, top_k=top_k, top_p=top_p, top_p_rule=rule)
    for row, cut in zip(logits.tolist(), warped, strict=True):
        kept = {i for i, x in enumerate(cut.tolist()) if x > -math.inf}
        assert kept == naive_kept(row, top_k, top_p, rule)
    inside = warped > -torch.inf
    assert torch.equal(warped[inside], logits[inside]), "what is kept keeps its logit"


def test_nucleus_reaches_p_and_the_papers_rule_stays_under_it():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    kept = {
        (rule, p): int((warp(logits, top_p=p, top_p_rule=rule) > -torch.inf).sum())
        for rule in ("nucleus", "paper")
        for p in (0.3, 0.6, 0.8)
    }
    nucleus = {0.3: 1, 0.6: 2, 0.8: 3}
    paper = {0.3: 1, 0.6: 1, 0.8: 2}
    assert kept == {("nucleus", p): n for p, n in nucleus.items()} | {
        ("paper", p): n for p, n in paper.items()
    }


@pytest.mark.parametrize("rule", ["nucleus", "paper"])
def test_a_set_that_reaches_p_exactly_is_enough(rule):
    kept = warp(torch.zeros(4), top_p=0.5, top_p_rule=rule) > -torch.inf
    assert kept.sum() == 2


def test_temperature_divides_before_the_cuts():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert torch.equal(warp(logits, temperature=2.0), logits / 2)
    assert torch.equal(warp(logits), logits)
    cold = warp(logits, temperature=0.1, top_p=0.9)
    assert (cold > -torch.inf).sum() == 1 < (warp(logits, top_p=0.9) > -torch.inf).sum()


def test_temperature_zero_keeps_the_best_alone():
    logits = torch.randn(6, 7)
    for u in (1e-12, 0.5, 1 - 1e-12):
        drawn = sample(warp(logits, temperature=0), torch.full((6,), u, dtype=torch.float64))
        assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"top_p_rule": "min"}],
)
def test_values_out_of_range(bad):
    with pytest.raises(InputError):
        warp(torch.zeros(3), **bad)


def test_sample_follows_softmax():
    n = 50_000
    logits = torch.tensor([0.5, -torch.inf, 2.0, -1.0, 0.0, -torch.inf])
    tokens = sample(logits.expand(n, -1), uniform(3, torch.arange(n)))
    counts = tokens.bincount(minlength=6)
    assert counts[[1, 5]].sum() == 0, "never a token at −inf"
    possible = [0, 2, 3, 4]
    expected = logits.softmax(-1)[possible].double()
    result = stats.chisquare(counts[possible].numpy(), (n * expected / expected.sum()).numpy())
    assert result.pvalue > REJECT


@pytest.mark.parametrize("u", [2.0**-53, 0.5, 1 - 2.0**-53])
def test_extreme_numbers_draw_possible_tokens(u):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 50, generator=generator) * 10
    logits[:, [0, 1, 25, 48, 49]] = -torch.inf
    tokens = sample(logits, torch.full((200,), u, dtype=torch.float64))
    assert logits.gather(-1, tokens[:, None]).isfinite().all()


def test_sample_walks_the_distribution_in_order():
    logits = torch.tensor([0.2, 0.3, 0.5]).log()
    u = torch.tensor([0.19, 0.21, 0.49, 0.51], dtype=torch.float64)
    assert sample(logits.expand(4, -1), u).tolist() == [0, 1, 1, 2]


def test_rare_tokens_of_a_large_vocabulary_keep_their_probability():
    """In float32 the last tokens of a cumulative sum over 50,000 would merge."""
    logits = torch.zeros(50_000)
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    assert torch.equal(sample(logits.expand(500, -1), u[-500:]), torch.arange(49_500, 50_000))


# drawing without sorting


def uniforms_of(seed):
    return lambda rows, attempt: uniform(seed, rows, attempt)


@pytest.mark.parametrize("rule", ["nucleus", "paper"])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.7, 0.95])
def test_inside_is_the_cut(rule, top_p):
    """Token by token, and with ties: the same set as `naive_kept`, whose sort is stable."""
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).mul(2).round(decimals=0)
    for row in logits:
        every = torch.arange(9)
        inside = _survives(row.softmax(0).expand(9, -1), every, top_p, rule)
        assert set(every[inside].tolist()) == naive_kept(row.tolist(), None, top_p, rule)


@pytest.mark.parametrize("rule", ["nucleus", "paper"])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.3), (None, 0.8), (5, 0.6), (3, None)])
def test_drawing_follows_the_warped_distribution(rule, top_k, top_p):
    """0.3 leaves the proposals often outside: every attempt and the sort at the end take part."""
    n = 40_000
    logits = torch.tensor([0.5, 0.3, 1.0, -1.0, 0.0, -0.5, 0.8])
    cuts = {"temperature": 1.3, "top_k": top_k, "top_p": top_p, "top_p_rule": rule}
    tokens = draw(logits.expand(n, -1), uniforms_of(4), **cuts)
    expected = warp(logits, **cuts).double().softmax(-1)
    counts = tokens.bincount(minlength=7)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() > 1:
        result = stats.chisquare(counts[kept].numpy(), (n * expected[kept]).numpy())
        assert result.pvalue > REJECT


def test_drawing_does_not_sort(monkeypatch):
    """A flat distribution over many words, the worst case for sorting a nucleus."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "sort", lambda *a, **k: seen.append(a))
    draw(torch.randn(8, 5000), lambda rows, attempt: uniform(1, rows, attempt + 7), top_p=0.95)
    assert not seen


@pytest.mark.parametrize("rule", ["nucleus", "paper"])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.8}])
def test_a_draw_on_a_gpu_asks_it_nothing(rule, cut):
    """A tensor without data cannot be asked: what would wait for a device fails here."""
    logits = torch.empty(5, 9, device="meta")

    def uniforms(which, attempt):
        assert attempt == 0
        return torch.empty(5, device="meta", dtype=torch.float64)

    tokens = draw(logits, uniforms, temperature=0.7, top_p_rule=rule, **cut)
    assert tokens.shape == (5,) and tokens.dtype == torch.int64


def test_the_host_has_the_numbers_of_the_device():
    rows, positions = torch.arange(50)[:, None] - 3, torch.arange(7) * 10**12
    for seed in (0, 1, -(2**63), 2**64 - 1):
        ours = host_uniform(seed, rows.numpy(), positions.numpy(), 1)
        assert (ours == uniform(seed, rows, positions, 1).numpy()).all()
