"""A continuation given its beginning, against the obvious loops, for every objective."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import blockdiff
from blockdiff import cli
from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.evaluation.score import Score, address, score_tokens
from blockdiff.layout import BlockLayout
from blockdiff.noising import total_noise
from helpers import tiny_model

MASK = 8
# Lengths of beginnings and continuations: inside a block, across several, at its edges, uneven.
PAIRS = [(1, 2), (3, 4), (5, 3), (4, 4), (2, 7), (9, 1)]


def pairs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(MASK, (before + after,), generator=draw) for before, after in PAIRS]
    befores = [row[:before].tolist() for row, (before, _) in zip(rows, PAIRS, strict=True)]
    afters = [row[before:].tolist() for row, (before, _) in zip(rows, PAIRS, strict=True)]
    return befores, afters


def nll(logits, token):
    logits = logits.double().clone()
    logits[MASK] = -math.inf
    return -logits.log_softmax(-1)[token].item()


@torch.no_grad()
def by_hand(model, before, after, size):
    """Block by block, Σ_S Σ_ℓ CE / (k · C(n, k)) over the masks of the continuation's tokens."""
    row = before + after
    length = -(-len(row) // size) * size
    x_0 = torch.tensor(row + [MASK] * (length - len(row)))
    total = 0.0
    for start in range(0, length, size):
        own = [i for i in range(start, start + size) if len(before) <= i < len(row)]
        for k in range(1, len(own) + 1):
            for masked in itertools.combinations(own, k):
                x_t = x_0.clone()
                x_t[list(masked)] = MASK
                layout = BlockLayout(length, size)
                logits = model(x_t[None], x_0=x_0[None], layout=layout, backend="dense").logits
                loss = sum(nll(logits[0, i], x_0[i]) for i in masked)
                total += loss / (k * math.comb(len(own), k))
    return total


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bd3lm_is_the_loop_over_masks(size):
    model = tiny_model(vocab_size=9, length=12, block_size=size)
    befores, afters = pairs()
    found = score_tokens(model, befores, afters, estimator="enumerate", greedy=False)
    expected = [by_hand(model, *pair, size) for pair in zip(befores, afters, strict=True)]
    assert [one.nats for one in found] == pytest.approx(expected, rel=1e-5)
    assert all(one.error == 0 and one.greedy is None for one in found)
    assert [one.tokens for one in found] == [after for _, after in PAIRS]


def test_mdlm_is_the_loop_over_masks():
    """One block of L = 8: what is behind the continuation stays masked, as in sampling."""
    model = tiny_model(vocab_size=9, length=8, block_size=8)
    befores, afters = ([[1, 2, 3], [4]], [[5, 6], [7, 0, 1, 2]])
    found = score_tokens(model, befores, afters, estimator="enumerate", greedy=False)
    expected = [by_hand(model, *pair, 8) for pair in zip(befores, afters, strict=True)]
    assert [one.nats for one in found] == pytest.approx(expected, rel=1e-5)


def test_ar_is_a_shifted_log_softmax():
    model = tiny_model(vocab_size=9, length=12, causal=True)
    befores, afters = pairs()
    found = score_tokens(model, befores, afters, greedy=False)
    for one, before, after in zip(found, befores, afters, strict=True):
        row = torch.tensor([before + after])
        with torch.no_grad():
            logits = model(row).logits[0]
        expected = sum(nll(logits[len(before) + i - 1], token) for i, token in enumerate(after))
        assert one.nats == pytest.approx(expected, rel=1e-5) and one.error == 0


@torch.no_grad()
def sedd_by_hand(model, before, after, nodes=60):
    """∫ dt Σ_S t^(k − 1) (1 − t)^(n − k) · the score entropy of the masks S at σ(t)."""
    length = model.config.length
    row = before + after
    x_0 = torch.tensor([row + [MASK] * (length - len(row))])
    own = range(len(before), len(row))
    times, widths = np.polynomial.legendre.leggauss(nodes)
    total = 0.0
    for t, width in zip((times + 1) / 2, widths / 2, strict=True):
        sigma = total_noise(torch.tensor([[t]], dtype=torch.float32))
        for k in range(1, len(own) + 1):
            for masked in itertools.combinations(own, k):
                at = torch.zeros_like(x_0, dtype=torch.bool)
                at[0, list(masked)] = True
                x_t = x_0.masked_fill(at, MASK)
                loss = model(x_t, sigma=sigma, at=at, targets=x_0[at]).nll.sum().item()
                total += width * t ** (k - 1) * (1 - t) ** (len(own) - k) * loss
    return total


def test_sedd_is_the_integral_over_time():
    model = tiny_model(vocab_size=9, length=6, block_size=6, score=True, time_conditioning=True)
    befores, afters = [[1, 2], [3]], [[4, 5], [6, 7, 0]]
    found = score_tokens(model, befores, afters, draws=1500, estimator="exact_k", greedy=False)
    for one, before, after in zip(found, befores, afters, strict=True):
        expected = sedd_by_hand(model, before, after)
        # Four standard errors, known to a seventh of themselves from two groups of draws: wide.
        assert abs(one.nats - expected) < 0.02 * expected and one.error < 0.05 * expected


@pytest.mark.parametrize("estimator", ["exact_k", "bernoulli", "paired"])
def test_drawn_masks_converge_to_all_masks(estimator):
    model = tiny_model(vocab_size=9, length=12, block_size=4)
    befores, afters = pairs()
    exact = score_tokens(model, befores, afters, estimator="enumerate", greedy=False)
    drawn = score_tokens(model, befores, afters, estimator=estimator, draws=700, greedy=False)
    for one, other in zip(drawn, exact, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=0.15 if estimator == "bernoulli" else 0.05)


def test_a_score_does_not_depend_on_the_other_rows():
    model = tiny_model(vocab_size=9, length=12, block_size=4)
    befores, afters = pairs()
    together = score_tokens(model, befores, afters, estimator="exact_k", draws=3)
    alone = [score_tokens(model, [before], [after], estimator="exact_k", draws=3)[0]
             for before, after in zip(befores, afters, strict=True)]  # fmt: skip
    for one, other in zip(together, alone, strict=True):
        assert (one.nats, one.error) == pytest.approx((other.nats, other.error), rel=1e-5)
        assert (one.greedy, one.tokens) == (other.greedy, other.tokens)


@pytest.mark.parametrize("kind", ["ar", "bd3lm", "mdlm", "sedd"])
def test_greedy_is_what_the_sampler_writes_at_temperature_0(kind):
    settings = {"ar": {"causal": True}, "bd3lm": {"block_size": 4}, "mdlm": {"block_size": 12},
                "sedd": {"block_size": 12, "score": True, "time_conditioning": True}}  # fmt: skip
    model = tiny_model(vocab_size=9, length=12, **settings[kind])
    before = [1, 2, 3]
    options = {"max_new_tokens": 3, "temperature": 0.0, "stop": "none"}
    told = []
    for number in range(12):
        after = blockdiff.generate(model, [before], rows=[number], **options).tokens[0]
        written = blockdiff.generate(model, [before], rows=[address([*before, *after])], **options)
        told.append(score_tokens(model, [before], [after])[0].greedy)
        assert told[-1] == (list(written.tokens[0]) == list(after))
    assert any(told) or kind == "sedd"
    if kind == "ar":  # its order is no chance
        assert all(told) and not score_tokens(model, [before], [[8 - x for x in after]])[0].greedy


def test_of_a_row_past_the_context_the_end_is_taken():
    model = tiny_model(vocab_size=9, length=8, block_size=4)
    long, short = [3, 1, 4, 1, 5, 2, 6, 5, 3], [6, 5, 3]
    found, kept = score_tokens(model, [long, [1, 5, 2, *short]], [[0, 7], [0, 7]], greedy=False)
    assert found == kept
    with pytest.raises(InputError, match=r"pair 2 has 8 tokens.*context of 8"):
        score_tokens(model, [[1], [1]], [[2], [1] * 8])
    assert score_tokens(model, [long], [[1] * 7], greedy=False)[0].tokens == 7


def test_what_has_nothing_to_measure_is_refused():
    model = tiny_model(vocab_size=9, length=8, block_size=4)
    for before, after, what in (([], [1], "beginning"), ([1], [], "continuation")):
        with pytest.raises(InputError, match=f"the {what} of pair 1 is empty"):
            score_tokens(model, [before], [after])


@pytest.mark.parametrize("kind", ["ar", "bd3lm", "mdlm"])
def test_likelihood_counts_what_may_be_masked(kind):
    """Two halves of a sequence: the second given the first, as `score` has it."""
    settings = {"ar": {"causal": True}, "bd3lm": {"block_size": 4}, "mdlm": {"block_size": 8}}
    model = tiny_model(vocab_size=9, length=8, **settings[kind])
    x_0 = torch.randint(MASK, (3, 8), generator=torch.Generator().manual_seed(1))
    maskable = torch.zeros(3, 8, dtype=torch.bool)
    maskable[:, 5:] = True
    estimator = "auto" if kind == "ar" else "enumerate"
    found = likelihood(model, x_0, estimator, maskable=maskable)
    assert found.tokens.tolist() == [3] * 3
    rows = x_0.tolist()
    scores = score_tokens(model, [row[:5] for row in rows], [row[5:] for row in rows],
                          estimator=estimator, greedy=False)  # fmt: skip
    assert found.nats.tolist() == pytest.approx([one.nats for one in scores], rel=1e-5)
    both = likelihood(model, x_0, estimator, maskable=torch.ones_like(maskable))
    assert torch.equal(both.nats, likelihood(model, x_0, estimator).nats)
    for wrong in (maskable[:, :4], maskable.long()):
        with pytest.raises(InputError, match="maskable must be bool"):
            likelihood(model, x_0, estimator, maskable=wrong)


# texts


@pytest.fixture(scope="module")
def starter():
    return blockdiff.load("starter")


def test_texts_are_scored_as_they_are_written(starter):
    model, tokenizer = starter
    good = blockdiff.score(model, "The function returns", " a list.", tokenizer=tokenizer)
    assert isinstance(good, Score) and good.nats_per_token == good.nats / good.tokens
    moved = blockdiff.score(model, "The function returns ", "a list.", tokenizer=tokenizer)
    assert moved == good, "blanks at the end of the context belong to what follows"
    several = blockdiff.score(model, "The", [" function", " zq"], tokenizer=tokenizer)
    assert several[0].nats < several[1].nats
    assert blockdiff.score(model, "", "The", tokenizer=tokenizer).tokens >= 1
    with pytest.raises(InputError, match="2 contexts and 3 continuations"):
        blockdiff.score(model, ["a", "b"], ["c", "d", "e"], tokenizer=tokenizer)
    with pytest.raises(InputError, match="must be texts"):
        blockdiff.score(model, "a", [3], tokenizer=tokenizer)
    with pytest.raises(InputError, match="mask token"):
        blockdiff.score(model, "a", "<|mask|>", tokenizer=tokenizer)


def test_a_file_of_pairs(tmp_path, capsys, starter):
    model, tokenizer = starter
    lines = [{"id": 7, "context": "The function returns", "continuation": " a list."},
             {"context": "Raises", "continuation": " ValueError"}]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    cli.main(["score", "starter", "--file", str(path), "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: one[k] for k in line} for one, line in zip(found, lines, strict=True)] == lines
    direct = blockdiff.score(model, [x["context"] for x in lines],
                             [x["continuation"] for x in lines], tokenizer=tokenizer)  # fmt: skip
    for one, expected in zip(found, direct, strict=True):
        assert one["nats"] == pytest.approx(expected.nats, rel=1e-5)
        assert (one["tokens"], one["greedy"], one["error"]) == (
            expected.tokens, expected.greedy, 0.0)  # fmt: skip
    cli.main(["score", "starter", "The", " end", "--no-greedy"])
    assert "≤" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"context": "a"}', "line 1 holds no text 'continuation'"),
        ('{"context": "a", "continuation": "b"}\n[1]', "line 2: a JSON object is needed"),
        ("{", "line 1: not JSON"),
        ("", "holds no pairs"),
        ('{"context": "a", "continuation": ""}', "continuation of pair 1 is empty"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(text, said, tmp_path, capsys):
    path = Path(tmp_path / "pairs.jsonl")
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", "starter", "--file", str(path)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and said in line and line.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["a"], ["--file", "x", "a", "b"], ["--file", "gone.jsonl"]])
def test_a_pair_or_a_file(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", "starter", *words])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "`" not in line
