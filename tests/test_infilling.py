"""Gaps in a text: both sides honoured where the model can see them, a word where it cannot."""

import itertools
import json
import math

import pytest
import torch
from scipy import stats

import blockdiff
from blockdiff import cli
from blockdiff.errors import InputError
from blockdiff.infilling import OPEN, parse_gaps, seen_behind
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.generate import generate_tokens, steps_of
from blockdiff.sampling.options import SamplingOptions
from helpers import tiny_model

MASK = 3
REJECT = 1e-4
ROWS = 12_000
# Name → model settings, what stands before a gap of two tokens, and behind it.
CASES = {
    "mdlm": ({"length": 6, "block_size": 6}, [1, 0], [2, 1]),
    "in a block": ({"length": 8, "block_size": 4}, [0, 2, 1, 1, 2], [0]),
    "causal clean stream": (
        {"length": 8, "block_size": 4, "clean_stream": "causal", "block_sizes": (1, 4)},
        [0, 2, 1, 1, 2], [2],
    ),
}  # fmt: skip


def law(model, before, after):
    """{gap of two: probability} over both orders, from dense passes with the text on both sides."""
    row = [*before, MASK, MASK, *after]
    row += [MASK] * (-len(row) % model.config.block_size)

    def table(gap, place):
        x_t = torch.tensor([[*before, *gap, *row[len(before) + 2 :]]])
        x_0 = x_t.where(x_t != MASK, 0)
        with torch.no_grad():
            logits = model(x_t, x_0=x_0, backend="dense").logits[0, len(before) + place].double()
        logits[MASK] = -math.inf
        return logits.softmax(-1)

    first = [table([MASK, MASK], place) for place in (0, 1)]
    found = {}
    for a, b in itertools.product(range(3), repeat=2):
        left = first[0][a] * table([a, MASK], 1)[b]
        right = first[1][b] * table([MASK, b], 0)[a]
        found[a, b] = float(left + right) / 2
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_gap_is_drawn_given_both_sides(case):
    settings, before, after = CASES[case]
    model = tiny_model(vocab_size=4, seed=11, **settings)
    options = SamplingOptions(max_new_tokens=2, stop="none")
    done = generate_tokens(model, [before] * ROWS, options, after=[after] * ROWS)
    expected = law(model, before, after)
    blind = law(model, before, [MASK] * len(after))
    counts = dict.fromkeys(expected, 0)
    for tokens in done.tokens:
        counts[tuple(tokens)] += 1
    theory = [ROWS * expected[key] for key in counts]
    assert stats.chisquare(list(counts.values()), theory, sum_check=False).pvalue > REJECT
    # A sampler that is blind to what stands behind would be seen.
    power = ROWS * sum((expected[key] - blind[key]) ** 2 / expected[key] for key in expected)
    assert power > 100


def test_what_stands_around_is_kept_and_a_row_is_the_same_alone():
    model = tiny_model(vocab_size=9, length=16, block_size=4)
    rows = [([1, 2, 3], 3, [4, 5]), ([7], 6, [1]), ([5, 5, 1, 2, 0], 1, [3, 3, 3])]
    engine = Engine(model)
    for number, (before, gap, after) in enumerate(rows):
        options = SamplingOptions(max_new_tokens=gap, stop="none", seed=3)
        engine.admit_all([before], options, [number], [after])
    *_, last = steps_of(engine)
    for number, (before, gap, after) in enumerate(rows):
        text = last.tokens[number].tolist()
        end = len(before) + gap
        assert text[: len(before)] == before and text[end : end + len(after)] == after
        assert last.lengths[number] == end
        options = SamplingOptions(max_new_tokens=gap, stop="none", seed=3)
        alone = generate_tokens(model, [before], options, [number], [after])
        assert alone.tokens[0] == text[len(before) : end]
        assert 8 not in text[: end + len(after)]


def test_a_gap_behind_is_left_masked():
    """Nothing past the gap is fixed, whatever of its block is unknown."""
    model = tiny_model(vocab_size=9, length=16, block_size=8)
    options = SamplingOptions(max_new_tokens=2, stop="none")
    engine = Engine(model)
    engine.admit_all([[1, 2]], options, [0], [[4, 8, 5]])
    steps = list(steps_of(engine))
    assert all(step.tokens[0, 4:8].tolist() == [4, 8, 5, 8] for step in steps)
    assert sum(int(step.fixed.sum()) for step in steps) == 2


@pytest.mark.parametrize(
    "text, between, lengths",
    [
        ("a [[gap:3]] b", ["a ", " b"], [(3, 3)]),
        ("[[gap:2-5]][[gap: 1 .. 4 ]]", ["", "", ""], [(2, 5), (1, 4)]),
        ("x[[gap]]", ["x", ""], [OPEN]),
    ],
)
def test_gaps_are_read(text, between, lengths):
    assert parse_gaps(text) == (between, lengths)


@pytest.mark.parametrize("gap", ["0", "", "x", "-3", "5-2", "0-2", "3,4", "1.5"])
def test_what_is_no_gap(gap):
    with pytest.raises(InputError, match=r"write \[\[gap:20\]\]"):
        parse_gaps(f"a [[gap:{gap}]] b")


def test_how_much_is_seen():
    mdlm = tiny_model(length=16, block_size=16).config
    blocks = tiny_model(length=16, block_size=8).config
    ar = tiny_model(length=16, causal=True).config
    for before, gap, behind in itertools.product(range(1, 9), range(1, 5), range(5)):
        end = before + gap
        assert seen_behind(mdlm, before, gap, behind) == min(behind, 16 - end)
        # Positions behind the gap that share its last block.
        shared = sum((end + i) // 8 == (end - 1) // 8 for i in range(behind))
        assert seen_behind(blocks, before, gap, behind) == shared
        assert seen_behind(ar, before, gap, behind) == 0


def test_the_likeliest_try_and_length_is_kept():
    model, tokenizer = blockdiff.load("starter")
    text = "The people of the [[gap:1-3]] States and [[gap:2]] Union."
    done = blockdiff.infill(model, text, tokenizer=tokenizer, tries=3, seed=5)[0]
    assert done.text.startswith("The people of the") and done.text.endswith(" Union.")
    assert " States and" in done.text and len(done.tokens[1]) == 2
    assert done.text == f"The people of the{done.gaps[0]} States and{done.gaps[1]} Union."
    assert all(nats > 0 for nats in done.nats)
    start = tokenizer.encode("The people of the", add_special_tokens=False)
    behind = tokenizer.encode(" States and", add_special_tokens=False)

    def nats(gap):
        before = [tokenizer.bos_token_id, *start]
        return blockdiff.evaluation.score.score_tokens(
            model, [before], [[*gap, *behind]], seed=5, greedy=False
        )[0].nats_per_token

    assert done.nats[0] == pytest.approx(nats(done.tokens[0]), rel=1e-5)
    mask = model.config.mask_token_id
    for seed in range(3):  # one length and one try: no better than what was kept
        options = SamplingOptions(max_new_tokens=1 + seed, stop="none", seed=5)
        tail = [*behind, mask, mask]
        one = generate_tokens(model, [[tokenizer.bos_token_id, *start]], options, [0], [tail])
        assert done.nats[0] <= nats(one.tokens[0]) + 1e-6
    again = blockdiff.infill(model, "The [[gap:9]].", tokenizer=tokenizer, seed=5, samples=2)
    assert len(again) == 2 and again[0].text != again[1].text


def test_the_command(capsys):
    assert cli.main(["infill", "starter", "The people [[gap:3]] of the Union.", "--json"]) in (
        0,
        None,
    )
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert len(found["tokens"][0]) == 3 and found["text"].endswith(" of the Union.")
    assert "only the text in the block in which the gap ends is seen" in printed.err
    assert "--block-size" in printed.err and "`" not in printed.err
    assert found["seen"][0] < found["behind"][0]


@pytest.mark.parametrize(
    "words, says",
    [
        (["The people of"], "there is no gap in the text"),
        (["a [[gap:0]] b"], "'[[gap:0]]' is none"),
        (["a [[gap:256]] b"], "as long as the model's context of 256"),
        (["a [[gap:2]]", "--max-new-tokens", "3"], "--max-new-tokens is said by the gaps"),
        (["a [[gap:2]]", "--stop", "eos"], "--stop is said by the gaps"),
        (["a [[gap:2]]", "--tries", "0"], "--tries"),
        (["a [[gap:2]]", "--logprobs"], "--logprobs are shown by generate"),
    ],
)
def test_bad_input(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["infill", "starter", *words])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and says in printed.err and printed.err.count("\n") == 1
    assert not printed.out
