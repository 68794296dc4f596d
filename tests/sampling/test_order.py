import math

import pytest
import torch

from blockdiff.categorical import uniform
from blockdiff.errors import InputError
from blockdiff.sampling.options import stopping_rules
from blockdiff.sampling.order import events, next_positions
from blockdiff.sampling.stopping import finished_length, is_dull, token_entropy
from blockdiff.schedules import SCHEDULES, get_schedule

PAST = torch.iinfo(torch.int64).max
ALL = torch.ones(1, 4, dtype=torch.bool)


def numbers(rows, size):
    return uniform(0, torch.arange(rows)[:, None], torch.arange(size))


def test_first_hitting_goes_down_in_u():
    u = torch.tensor([[0.3, 0.9, 0.1, 0.6]])
    assert events(u, ALL, "first_hitting", None, "linear").tolist() == [[2, 0, 3, 1]]


def test_unmasked_positions_have_no_event():
    u = torch.tensor([[0.3, 0.9, 0.1, 0.6]])
    masked = torch.tensor([[True, False, True, True]])
    for sampler, steps in (("first_hitting", None), ("ancestral", 2)):
        event = events(u, masked, sampler, steps, "linear")
        assert event[0, 1] == PAST
        assert next_positions(event, masked).tolist() == [[False, False, False, True]]


def test_every_order_is_equally_likely():
    """24 orders, 48,000 rows: each count within 5 standard errors (wrong once in 70,000 runs)."""
    event = events(numbers(48_000, 4), ALL.expand(48_000, -1), "first_hitting", None, "linear")
    code = (event * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_events_follow_the_schedule(schedule, steps):
    """P(event i) is the mask rate lost in step i; within 5 standard errors of 40,000 draws."""
    u = numbers(10_000, 4)
    event = events(u, ALL.expand(10_000, -1), "ancestral", steps, schedule)
    time = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    rate = get_schedule(schedule).mask_rate(time)
    share = event.flatten().bincount(minlength=steps) / u.numel()
    assert len(share) == steps
    expected = rate[:-1] - rate[1:]
    error = (expected * (1 - expected) / u.numel()).sqrt()
    assert ((share - expected).abs() <= 5 * error).all()
    # The event is when u crosses the mask rate: masked before it, clean after.
    assert ((u < rate[event]) & (u >= rate[event + 1])).all()


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_many_ancestral_steps_are_first_hitting(schedule):
    u = numbers(500, 4)
    masked = ALL.expand(500, -1)
    fine = events(u, masked, "ancestral", 10**9, schedule).argsort(-1)
    assert torch.equal(fine, events(u, masked, "first_hitting", None, schedule).argsort(-1))


def test_next_positions_take_one_event_at_a_time():
    event = torch.tensor([[1, 0, 1, 3], [2, 2, 0, 0]])
    masked = ALL.expand(2, -1).clone()
    taken = []
    while masked.any():
        fix = next_positions(event, masked)
        assert not (fix & ~masked).any()
        taken.append(fix.tolist())
        masked &= ~fix
    assert [[row[0], row[1]] for row in taken] == [
        [[False, True, False, False], [False, False, True, True]],
        [[True, False, True, False], [True, True, False, False]],
        [[False, False, False, True], [False] * 4],
    ]
    assert not next_positions(event, masked).any(), "a complete block fixes nothing"


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("ancestral", None), ("ancestral", 0), ("first_hitting", 4), ("greedy", None)],
)
def test_samplers_that_make_no_sense(sampler, steps):
    with pytest.raises(InputError):
        events(torch.full((1, 4), 0.5), ALL, sampler, steps, "linear")


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
    start, end = torch.tensor([2]), torch.tensor([6])
    assert finished_length(torch.tensor([tokens]), start, end, 9, 7).tolist() == [length]
    if 7 not in tokens:
        assert finished_length(torch.tensor([tokens]), start, end, 9, None).tolist() == [length]


def test_without_an_eos_only_the_end_counts():
    tokens = torch.tensor([[1, 1, 7, 9, 9, 9]])
    assert finished_length(tokens, torch.tensor([2]), torch.tensor([5]), 9, None).item() == -1


def test_the_second_eos():
    start, end = torch.tensor([2]), torch.tensor([6])
    for tokens, length in (
        ([1, 1, 7, 1, 7, 1, 9, 9], 5),
        ([1, 1, 7, 1, 1, 9, 9, 9], -1),
        ([1, 1, 7, 7, 9, 9, 9, 9], 4),
    ):
        found = finished_length(torch.tensor([tokens]), start, end, 9, 7, torch.tensor([2]))
        assert found.tolist() == [length]


def test_entropy_and_dull_rows():
    assert token_entropy(torch.arange(256)) == pytest.approx(math.log(256))
    assert token_entropy(torch.tensor([3, 3, 3, 3])) == 0
    lively, dull = torch.arange(300), torch.arange(300) % 50  # log 50 = 3.9 nats
    short = torch.where(torch.arange(300) < 200, dull, 999)
    late = torch.where(torch.arange(300) < 270, dull, 999)
    tokens = torch.stack([lively, dull, short, late])
    found, known = is_dull(tokens, torch.full((4,), 2), torch.full((4,), 290), 999)
    assert found.tolist() == [False, True, False, True]
    assert known.tolist() == [290, 290, 200, 270]


@pytest.mark.parametrize(("different", "dull"), [(53, True), (54, True), (56, False), (57, False)])
def test_four_nats_are_the_limit(different, dull):
    tokens = torch.arange(256) % different
    assert abs(token_entropy(tokens) - 4) < 0.05
    found, _ = is_dull(tokens[None], torch.tensor([0]), torch.tensor([256]), 999)
    assert found.tolist() == [dull]


@pytest.mark.parametrize("dull", [True, False])
def test_the_last_256_tokens_decide(dull):
    """Whatever came before them, and whatever the prompt was."""
    halves = (torch.arange(256), torch.arange(256) % 4)
    tokens = torch.cat(halves if dull else halves[::-1])[None]
    found, _ = is_dull(tokens, torch.tensor([300]), torch.tensor([512]), 999)
    assert found.tolist() == [dull]


def test_names_of_stopping_rules():
    assert stopping_rules("paper") == {"second_eos", "low_entropy"}
    assert stopping_rules("none") == frozenset() and stopping_rules("eos") == {"eos"}
    for wrong in ("first_eos", "eos,second_eos"):
        with pytest.raises(InputError):
            stopping_rules(wrong)
