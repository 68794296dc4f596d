"""The loop: cached decoding is recomputation, rows are their own, counts are right.

That it samples from the right distribution is in test_distribution.py.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from blockdiff.categorical import sample, uniform, warp
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.rows import sample_tokens
from helpers import random_tokens, sampling_steps, tiny_model

KINDS = {
    "bd3lm": {"block_size": 4},
    "block1": {"block_size": 1},
    "mdlm": {"block_size": 12},
    "ar": {"causal": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))


def model_of(kind, **settings):
    return tiny_model(**({"vocab_size": 9} | KINDS[kind] | settings))


def prompts_of(*lengths, seed=1):
    model = model_of("bd3lm")
    return [random_tokens(model, n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


def tokens_of(model, prompts, rows=None, **options):
    """The new tokens of every row."""
    last = sampling_steps(model, prompts, rows, **options)[-1]
    return [last.tokens[i, len(p) : last.lengths[i]].tolist() for i, p in enumerate(prompts)]


def decoded(model, monkeypatch):
    """What every call of `decode` was asked and gave: (rows, positions, at bool, logits)."""
    calls, decode = [], model.decode

    def spy(x, positions, cache, at, **options):
        logits = decode(x, positions, cache, at, **options)
        chosen = torch.zeros(x.shape, dtype=torch.bool).flatten().index_fill(0, at, True)
        rows = torch.from_numpy(cache.rows.copy())
        calls.append((rows, positions.clone(), chosen.view(x.shape), logits.clone()))
        return logits

    monkeypatch.setattr(model, "decode", spy)
    return calls


def padded(prompts, size, mask=8):
    return torch.stack([pad(torch.tensor(p), (0, size - len(p)), value=mask) for p in prompts])


@pytest.mark.parametrize("kind", ["bd3lm", "block1"])
@pytest.mark.parametrize("sampler", [{}, {"sampler": "ancestral", "steps": 3}], ids=["fh", "anc"])
def test_cached_decoding_is_recomputation(kind, sampler, monkeypatch):
    """Every step's logits, to three times the context, against one dense pass over all the text.

    The text's blocks before the current one are final, so the finished canvas serves as x_0.
    """
    model = model_of(kind)
    size, window = model.config.block_size, model.config.length
    calls = decoded(model, monkeypatch)
    prompts = prompts_of(3, 9, 18)
    steps = sampling_steps(model, prompts, max_new_tokens=28, stop="none", **sampler)
    steps = steps[1:]  # the first evaluates the prompts
    final = steps[-1].tokens
    layout = BlockLayout(final.shape[1], size, window)
    before, seen = padded(prompts, final.shape[1]), 0
    for step, (rows, positions, at, logits) in zip(steps, calls, strict=True):
        with torch.no_grad():
            dense = model(before, x_0=final, backend="dense", layout=layout).logits
        expected = dense[rows[:, None], positions][at]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        before, seen = step.tokens, seen + len(logits)
    assert seen >= 3 * 28


@pytest.mark.parametrize(("length", "new"), [(12, 31), (5, 31), (13, 38)])
def test_mdlm_past_its_context_moves_a_window(length, new, monkeypatch):
    """Every step's logits are the model's on a window of its length, with no cache."""
    model = tiny_model(9, length, length)
    calls = decoded(model, monkeypatch)
    prompts = prompts_of(2, 14)
    steps = sampling_steps(model, prompts, max_new_tokens=new)
    before, places = padded(prompts, steps[0].tokens.shape[1]), ([], [])
    ends = torch.tensor([2 + new, 14 + new])
    for step, (rows, positions, at, logits) in zip(steps, calls, strict=True):
        start = positions[:, :1]
        for row, place in zip(rows.tolist(), start.flatten().tolist(), strict=True):
            places[row].append(place)
        assert torch.equal(positions, start + torch.arange(length)), "whole windows"
        window = pad(before, (0, length), value=8)[rows[:, None], positions]
        with torch.no_grad():
            torch.testing.assert_close(logits, model(window).logits[at], rtol=1e-4, atol=1e-4)
        behind = (positions - start)[at]
        assert ((behind >= length // 2) | (start.expand_as(at)[at] == 0)).all(), "half looks back"
        missing = (window == 8) & (positions < ends[rows, None])
        u = uniform(0, rows[:, None], positions, 0)
        first = u.masked_fill(~missing, -1).argmax(-1)
        assert torch.equal(at.nonzero()[:, 1], first), "one a row, in descending order of u"
        before = step.tokens
    assert torch.equal(steps[-1].lengths, ends)
    for own in places:
        moves = {b - a for a, b in pairwise(dict.fromkeys(own))}
        assert moves == {length // 2}, "by half of itself, and no less"


@EVERY_KIND
def test_a_row_alone_is_the_row_in_a_batch(kind):
    model = model_of(kind, eos_token_id=6)
    prompts = prompts_of(1, 7, 13, 4)
    batch = tokens_of(model, prompts, max_new_tokens=30, seed=5)
    assert len({len(row) for row in batch}) > 1, "some rows stop early in this example"
    for row in (0, 1, 2, 3):
        alone = tokens_of(model, [prompts[row]], rows=[row], max_new_tokens=30, seed=5)
        assert alone == [batch[row]]
    reordered = tokens_of(model, prompts[::-1], rows=[3, 2, 1, 0], max_new_tokens=30, seed=5)
    assert reordered == batch[::-1]


@EVERY_KIND
def test_the_seed_decides(kind):
    model = model_of(kind)
    first, again, other = (
        tokens_of(model, prompts_of(4), max_new_tokens=20, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    same_prompt = tokens_of(model, prompts_of(4) * 2, max_new_tokens=20)
    assert same_prompt[0] != same_prompt[1], "rows have their own numbers"


def test_row_and_seed_are_not_interchangeable():
    """Row 0 of seed 0 is not row 1 of seed 1, row 1 of seed 2 not row 2 of seed 1."""
    model = model_of("bd3lm")
    texts = {
        tuple(tokens_of(model, [[1]], rows=[row], seed=seed, max_new_tokens=24)[0])
        for row in range(3)
        for seed in range(3)
    }
    assert len(texts) == 9


@EVERY_KIND
def test_temperature_zero_is_greedy(kind):
    """One step a block, since the order of the positions still depends on the seed."""
    model = model_of(kind)
    one = {} if kind in ("block1", "ar") else {"sampler": "ancestral", "steps": 1}
    first, second, warm = (
        tokens_of(model, prompts_of(5), max_new_tokens=16, temperature=t, seed=seed, **one)
        for t, seed in ((0, 1), (0, 2), (1, 1))
    )
    assert first == second != warm


@EVERY_KIND
@pytest.mark.parametrize("new", [1, 6, 40])
def test_any_prompt_and_any_number_of_new_tokens(kind, new):
    """Shorter and longer than a block and than the context, whole blocks or not."""
    model = model_of(kind)
    prompts = prompts_of(1, 3, 4, 5, 12, 25)
    last = sampling_steps(model, prompts, max_new_tokens=new)[-1]
    assert last.done.all() and last.lengths.tolist() == [len(p) + new for p in prompts]
    for row, prompt in enumerate(prompts):
        text = last.tokens[row, : last.lengths[row]].tolist()
        assert text[: len(prompt)] == prompt
        assert model.config.mask_token_id not in text


@EVERY_KIND
def test_steps_are_consistent(kind):
    model = model_of(kind, eos_token_id=6)
    prompts = prompts_of(3, 10, 6)
    starts = torch.tensor([3, 10, 6])
    steps = sampling_steps(model, prompts, max_new_tokens=25, seed=2)
    fixed = torch.zeros_like(steps[0].fixed)
    tokens, nfe = padded(prompts, fixed.shape[1]), torch.zeros(3, dtype=torch.int64)
    done = torch.zeros(3, dtype=torch.bool)
    for step in steps:
        assert not (step.fixed & fixed).any(), "a position is fixed once"
        assert not step.fixed[done].any() and (step.nfe == nfe)[done].all(), "finished rows rest"
        assert torch.equal(step.tokens[~step.fixed], tokens[~step.fixed])
        assert ((step.nfe - nfe) >= 0).all() and (step.nfe - nfe).max() == 1
        fixed, tokens, nfe, done = fixed | step.fixed, step.tokens, step.nfe, step.done
    position = torch.arange(fixed.shape[1])
    kept = (position >= starts[:, None]) & (position < steps[-1].lengths[:, None])
    assert fixed[kept].all() and not fixed[position < starts[:, None]].any()


def test_evaluations_of_first_hitting():
    """One a token and one for the prompt's whole blocks: caching a block costs none of its own."""
    model = model_of("bd3lm")
    counts = {
        (1, 3): 3,
        (3, 1): 1,
        (4, 4): 1 + 4,
        (5, 3): 1 + 3,
        (4, 8): 1 + 8,
        (8, 40): 1 + 40,
    }
    for (start, new), nfe in counts.items():
        assert sampling_steps(model, prompts_of(start), max_new_tokens=new)[-1].nfe.item() == nfe
    at_most = sampling_steps(model, prompts_of(3), max_new_tokens=2)[-1].nfe.item()
    # 3 + 2 tokens end one into the second block, whose positions come in a random order.
    assert 1 + 1 <= at_most <= 1 + 4


def test_evaluations_of_the_others():
    assert (
        sampling_steps(model_of("block1"), prompts_of(5), max_new_tokens=6)[-1].nfe.item() == 1 + 6
    )
    assert sampling_steps(model_of("ar"), prompts_of(5), max_new_tokens=6)[-1].nfe.item() == 1 + 6
    assert sampling_steps(model_of("ar"), prompts_of(1), max_new_tokens=6)[-1].nfe.item() == 6
    assert sampling_steps(model_of("mdlm"), prompts_of(4), max_new_tokens=8)[-1].nfe.item() == 8
    for steps in (1, 2, 3, 100):
        options = {"sampler": "ancestral", "steps": steps, "max_new_tokens": 40}
        last = sampling_steps(model_of("bd3lm"), prompts_of(4, 4, 4, 4, 4), **options)[-1]
        assert (last.nfe <= 1 + 10 * min(steps, 4)).all()
        if steps == 1:
            assert (last.nfe == 1 + 10).all()


@EVERY_KIND
def test_eos_stops_its_row_and_no_other(kind):
    free = tokens_of(model_of(kind, eos_token_id=None), prompts_of(3, 6), max_new_tokens=24)
    first = [[row.index(t) if t in row else 24 for row in free] for t in range(8)]
    eos = max(range(8), key=lambda t: abs(first[t][0] - first[t][1]))
    model = model_of(kind, eos_token_id=eos)
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert abs(len(cut[0]) - len(cut[1])) > 4, "one goes on well after the other has stopped"
    done = generate_tokens(model, prompts_of(3, 6), SamplingOptions(max_new_tokens=24))
    assert done.tokens == cut
    assert done.finish == ["eos" if eos in row else "length" for row in free]
    on = tokens_of(model, prompts_of(3, 6), max_new_tokens=24, stop="none")
    assert on == free


def test_ar_is_a_loop_without_a_cache():
    """Within the context and past it, one full pass over the window a token."""
    model = model_of("ar")
    prompts = prompts_of(1, 6)
    ours = tokens_of(model, prompts, max_new_tokens=12 + 8, seed=3, temperature=0.7)
    window = model.config.length
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(20):
            layout = BlockLayout(len(text), 1, window)
            with torch.no_grad():
                logits = model(torch.tensor([text]), backend="dense", layout=layout).logits
            logits = logits[0, -1] / 0.7
            logits[8] = -torch.inf
            text.append(sample(logits[None], uniform(3, row, len(text), 1)[None]).item())
        assert ours[row] == text[len(prompt) :]


@EVERY_KIND
def test_bad_input(kind):
    model = model_of(kind)
    bad = [[], [[]], [[1], []], [[1, 9]], [[-1]]]
    if kind != "ar":
        bad.append([[1, 8]])  # the mask token
    for prompts in bad:
        with pytest.raises(InputError):
            sampling_steps(model, prompts)
    for options in ({"max_new_tokens": 0}, {"temperature": -1}, {"steps": 0}, {"top_k": 0}):
        with pytest.raises(InputError):
            sampling_steps(model, [[1]], **options)
    with pytest.raises(InputError, match="`stop`"):
        sampling_steps(model, [[1]], stop="first")


def test_ar_takes_any_token_of_its_vocabulary_in_a_prompt():
    """AR needs no mask token, so none of its ids is special."""
    model = model_of("ar")
    try:
        last = sampling_steps(model, [[1, 8, 2]], max_new_tokens=5)[-1]
    except InputError:
        return
    assert last.lengths.tolist() == [8]


def test_training_mode_is_put_back():
    model = model_of("bd3lm").train()
    steps = stream_tokens(model, [[1]], SamplingOptions(max_new_tokens=8))
    assert next(steps) is not None and not torch.is_inference_mode_enabled()
    steps.close()
    assert model.training


def test_a_block_size_of_its_own():
    """A model trained at L' = 4 sampled at L' = 2: the window stays the context."""
    model = model_of("bd3lm")
    last = sampling_steps(model, prompts_of(2), max_new_tokens=20, block_size=2)[-1]
    assert last.nfe.item() == 1 + 20
    with pytest.raises(InputError):
        sampling_steps(model, prompts_of(2), block_size=5)


def test_the_papers_stopping_rules():
    """Prompts begin with EOS: the first new one ends a row. A dull row is given up and counted."""
    model = tiny_model(vocab_size=9, eos_token_id=7)
    prompts = [[7, 1], [1, 2]]
    once = generate_tokens(model, prompts, SamplingOptions(300, stop="second_eos", seed=3))
    assert once.finish == ["eos", "eos"] and once.rejection_rate == 0
    assert once.tokens[0].count(7) == 1 and once.tokens[0][-1] == 7
    assert once.tokens[1].count(7) == 2 and once.tokens[1][-1] == 7
    dull = generate_tokens(model, prompts, SamplingOptions(400, stop="low_entropy"))
    assert dull.finish == ["low_entropy"] * 2 and dull.rejection_rate == 1
    assert [256 <= len(p) + len(t) < 272 for p, t in zip(prompts, dull.tokens, strict=True)]


@pytest.mark.parametrize("held", [0, 1, 2, 3])
def test_however_many_ends_a_prompt_holds_one_more_ends_the_row(held):
    """Two in all, and at least one new one."""
    model = tiny_model(vocab_size=9, eos_token_id=7)
    with torch.no_grad():
        model.output.linear.bias[7] += 4
    done = generate_tokens(
        model, [[7] * held + [1]], SamplingOptions(200, stop="second_eos", seed=1)
    )
    assert done.finish == ["eos"] and done.tokens[0][-1] == 7
    assert done.tokens[0].count(7) == max(2 - held, 1)


@pytest.mark.parametrize("rule", ["nucleus", "paper"])
@pytest.mark.parametrize("top_p", [0.3, 0.6])
def test_tokens_of_a_cut_have_their_probabilities(top_p, rule):
    """A token drawn outside of the cut is drawn anew with numbers of its own."""
    count = 20_000
    logits = torch.tensor([0.5, 1.0, 0.0, 0.7, 0.2, 0.9, 0.4, 0.1, 3.0])
    logits[8] = -torch.inf
    options = SamplingOptions(max_new_tokens=1, top_p=top_p, top_p_rule=rule)
    rows = np.arange(count)
    drawn = sample_tokens(
        options, logits.expand(count, -1).clone(), np.zeros_like(rows), rows, np.zeros_like(rows)
    )
    cut = warp(logits[:8], top_p=top_p, top_p_rule=rule).softmax(-1)
    share = torch.bincount(drawn, minlength=9)[:8] / count
    assert (share - cut).abs().max() < 5 * math.sqrt(0.25 / count)
    assert share[cut == 0].sum() == 0


def test_sedd_keeps_within_its_context():
    model = tiny_model(vocab_size=9, block_size=12, time_conditioning=True, score=True)
    options = SamplingOptions(8, sampler="analytic", steps=4, stop="none")
    done = generate_tokens(model, [[1, 2], [3]], options)
    assert [len(row) for row in done.tokens] == [8, 8] and max(done.nfe) <= 4
    assert generate_tokens(model, [[3]], options, rows=[1]).tokens[0] == done.tokens[1]
    with pytest.raises(InputError, match="context"):
        generate_tokens(model, [[1, 2]], SamplingOptions(11))
    with pytest.raises(InputError, match="SEDD"):
        generate_tokens(model_of("mdlm"), [[1]], options)
