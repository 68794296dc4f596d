"""Orders against their definitions, and when a row ends."""

import math

import numpy as np
import pytest
import torch

import blockdiff
from blockdiff.categorical import uniform
from blockdiff.errors import InputError
from blockdiff.registry import ORDERS, STOPPING_RULES
from blockdiff.sampling.options import SamplingOptions, stopping_rules
from blockdiff.sampling.orders.base import RowState
from blockdiff.sampling.stopping import StopAtText, StopAtTokens, token_entropy
from blockdiff.schedules import SCHEDULES, get_schedule
from helpers import tiny_model

FIRST_HITTING = SamplingOptions()


def ancestral(steps, schedule="linear"):
    return SamplingOptions(sampler="ancestral", steps=steps, schedule=schedule)


def numbers(rows, size):
    return uniform(0, torch.arange(rows)[:, None], torch.arange(size)).numpy()


def rows_of(u, options, masked=None):
    """Rows with the numbers u [n, K], everything masked by default."""
    u = np.asarray(u)
    count, size = u.shape
    return RowState(
        np.ones(u.shape, bool) if masked is None else np.asarray(masked),
        np.full(count, size),
        u,
        np.zeros(count, np.int64),
        np.arange(size) + np.zeros((count, 1), np.int64),
        np.arange(count),
        np.zeros(count, np.int64),
        options,
        lambda logits, *address: logits.argmax(-1),
    )


def events(u, options, masked=None):
    """How many evaluations fix something before each position is fixed, −1 where never."""
    rows = rows_of(u, options, masked)
    order, event = ORDERS[options.sampler], np.full(rows.u.shape, -1)
    for number in range(rows.u.shape[1] + 1):
        if not rows.masked.any():
            return event
        wanted = order.wanted(rows)
        assert not (wanted & ~rows.masked).any()
        assert (wanted.any(1) == rows.masked.any(1)).all()
        event[wanted] = number
        rows.masked[wanted] = False
    raise AssertionError("does not end")


def test_first_hitting_goes_down_in_u():
    assert events([[0.3, 0.9, 0.1, 0.6]], FIRST_HITTING).tolist() == [[2, 0, 3, 1]]


def test_unmasked_positions_are_not_wanted():
    masked = [[True, False, True, True]]
    for options in (FIRST_HITTING, ancestral(2)):
        rows = rows_of([[0.3, 0.9, 0.1, 0.6]], options, masked)
        wanted = ORDERS[options.sampler].wanted(rows)
        assert wanted.tolist() == [[False, False, False, True]]


def test_every_order_is_equally_likely():
    """24 orders, 48,000 rows: each count within 5 standard errors (wrong once in 70,000 runs)."""
    event = events(numbers(48_000, 4), FIRST_HITTING)
    code = (event * np.array([64, 16, 4, 1])).sum(-1)
    counts = np.unique(code, return_counts=True)[1]
    assert len(counts) == 24
    assert (abs(counts - 2000) < 5 * 2000**0.5).all()


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_steps_follow_the_schedule(schedule, steps):
    """P(step i) is the mask rate lost in it; within 5 standard errors of 40,000 draws."""
    u = numbers(10_000, 4)
    step = ORDERS["ancestral"].step_of(rows_of(u, ancestral(steps, schedule)))
    time = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    rate = get_schedule(schedule).mask_rate(time).numpy()
    share = np.bincount(step.ravel(), minlength=steps) / u.size
    assert len(share) == steps
    expected = rate[:-1] - rate[1:]
    error = np.sqrt(expected * (1 - expected) / u.size)
    assert (abs(share - expected) <= 5 * error).all()
    # The step is that in which u crosses the mask rate: masked before it, clean after.
    assert ((u < rate[step]) & (u >= rate[step + 1])).all()


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_many_ancestral_steps_are_first_hitting(schedule):
    u = numbers(500, 4)
    assert (events(u, ancestral(10**9, schedule)) == events(u, FIRST_HITTING)).all()


def test_ancestral_takes_one_step_at_a_time():
    """Of five, 0.9 and 0.85 are unmasked in the first, 0.5 in the third, 0.3 in the fourth."""
    u = [[0.5, 0.9, 0.3, 0.85], [0.3, 0.5, 0.5, 0.3]]
    assert events(u, ancestral(5)).tolist() == [[1, 0, 2, 0], [1, 0, 0, 1]]


def test_the_rate_a_network_is_told():
    """First-hitting: u of the position itself; ancestral: the rate at its step's beginning."""
    u = [[0.5, 0.88, 0.3, 0.85]]
    for options, rate in ((FIRST_HITTING, 0.88), (ancestral(5), 1.0), (ancestral(10), 0.9)):
        rows, order = rows_of(u, options), ORDERS[options.sampler]
        assert order.mask_rate(rows, order.wanted(rows)) == pytest.approx([rate])


def test_samplers_that_make_no_sense():
    for sampler, steps in (
        ("ancestral", None), ("ancestral", 0), ("first_hitting", 4),
        ("greedy", None), (3, None),
    ):  # fmt: skip
        with pytest.raises(InputError):
            SamplingOptions(sampler=sampler, steps=steps)


def finished_length(tokens, stop, start=2, end=6, eos_token_id=7):
    """How long the row is once the engine has looked at these tokens; the mask token is 9."""
    model = tiny_model(vocab_size=10, length=8, block_size=8, eos_token_id=eos_token_id)
    engine = blockdiff.Engine(model)
    engine.admit(tokens[:start], SamplingOptions(end - start, stop=stop))
    engine.rows.canvas[0, start:end] = tokens[start:end]
    engine.rows.finish(0)
    return int(engine.rows.state["length"][0])


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ([1, 1, 1, 9, 1, 1, 1, 1], -1),  # a mask is left
        ([1, 1, 1, 1, 1, 1, 9, 9], 6),  # all up to the end, what lies behind does not matter
        ([1, 1, 1, 7, 9, 9, 9, 9], 4),  # EOS with no mask before it
        ([1, 1, 9, 7, 1, 1, 9, 9], -1),  # a mask before the EOS
        ([1, 7, 1, 1, 1, 1, 9, 9], 6),  # an EOS of the prompt
        ([1, 1, 7, 7, 9, 9, 9, 9], 3),  # the first of two
        ([1, 1, 1, 1, 1, 1, 7, 9], 6),  # an EOS past the end
        ([1, 1, 1, 1, 1, 7, 9, 9], 6),  # the last new token
    ],
)
def test_when_a_row_is_finished(tokens, length):
    assert finished_length(tokens, "eos") == length
    if 7 not in tokens:
        assert finished_length(tokens, "none") == length


def test_without_an_eos_only_the_end_counts():
    assert finished_length([1, 1, 7, 9, 9, 9, 9, 9], "eos", eos_token_id=None) == -1


def test_the_second_eos():
    for tokens, length in (
        ([1, 1, 7, 1, 7, 1, 9, 9], 5),
        ([1, 1, 7, 1, 1, 9, 9, 9], -1),
        ([1, 1, 7, 7, 9, 9, 9, 9], 4),
    ):
        assert finished_length(tokens, "second_eos") == length


def dull(tokens, end=None):
    tokens = np.asarray(tokens)
    length = STOPPING_RULES["low_entropy"].length(tokens[:end], 0, 2, None)
    assert length in (None, len(tokens[:end]))
    return length is not None


def test_entropy_and_dull_rows():
    assert token_entropy(np.arange(256)) == pytest.approx(math.log(256))
    assert token_entropy(np.array([3, 3, 3, 3])) == 0
    lively, few = np.arange(300), np.arange(300) % 50  # log 50 = 3.9 nats
    assert [dull(lively), dull(few), dull(few, 200), dull(few, 270)] == [False, True, False, True]


@pytest.mark.parametrize(("different", "expected"), [(53, 1), (54, 1), (56, 0), (57, 0)])
def test_four_nats_are_the_limit(different, expected):
    tokens = np.arange(256) % different
    assert abs(token_entropy(tokens) - 4) < 0.05
    assert dull(tokens) == expected


@pytest.mark.parametrize("expected", [True, False])
def test_the_last_256_tokens_decide(expected):
    """Whatever came before them, and whatever the prompt was."""
    halves = (np.arange(256), np.arange(256) % 4)
    assert dull(np.concatenate(halves if expected else halves[::-1])) == expected


def test_names_of_stopping_rules():
    assert stopping_rules("paper") == {"second_eos", "low_entropy"}
    assert stopping_rules("none") == frozenset() and stopping_rules("eos") == {"eos"}
    for wrong in ("first_eos", "eos,second_eos", "", ["eos", "second_eos"], [], [""], None, [3]):
        with pytest.raises(InputError, match="`stop`"):
            stopping_rules(wrong)
        with pytest.raises(InputError, match="`stop`"):
            SamplingOptions(stop=wrong)


def test_a_rule_stands_where_a_name_does():
    tokens = [1, 5, 1, 5, 3, 7, 9, 9]
    five, three = StopAtTokens(frozenset({5})), StopAtTokens(frozenset({3, 4}))
    assert finished_length(tokens, five) == 4, "the prompt's does not count"
    assert finished_length(tokens, [three, "eos"]) == 5, "of two ends the first"
    assert finished_length(tokens, ("eos",)) == finished_length(tokens, "eos") == 6
    assert finished_length([1, 1, 9, 5, 1, 1, 9, 9], five) == -1, "a mask is before it"
    options = SamplingOptions(stop=["eos", five])
    assert options == SamplingOptions(stop=("eos", StopAtTokens(frozenset({5}))))
    assert SamplingOptions(stop=five).stop == (five,)


def test_a_text_ends_a_row_with_the_token_that_completes_it():
    def decode(ids):
        return "".join("ab cdefg"[token] for token in ids)

    rule = StopAtText(("da", "bc"), decode)
    assert finished_length([1, 4, 0, 1, 3, 7, 9, 9], rule) == 5, "the prompt's d does not count"
    assert finished_length([1, 1, 4, 0, 4, 0, 9, 9], rule) == 4
    assert finished_length([1, 1, 4, 9, 9, 9, 9, 9], rule) == -1
    done = blockdiff.generate(
        tiny_model(vocab_size=9), [[1]], max_new_tokens=200, stop=[StopAtText(("a",), decode)]
    )
    assert done.finish == ["stop"] and done.tokens[0].index(0) == len(done.tokens[0]) - 1
