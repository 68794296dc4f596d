"""Orders that read the logits, against their definitions, computed a row and position at a time."""

import math

import numpy as np
import pytest
import torch

from blockdiff.api import merge_options
from blockdiff.cli import main
from blockdiff.errors import InputError
from blockdiff.registry import ORDERS
from blockdiff.sampling.options import SETTINGS, SamplingOptions
from blockdiff.sampling.orders.base import Order, RowState


def schedule(total, steps):
    """LLaDA's split of a block's tokens over the steps, written out."""
    return [total // steps + (step < total % steps) for step in range(steps)]


def by_hand(options, probability, tokens, masked, u, evaluations, planned):
    """Which of one row's positions are fixed: lists of K, with the probability [K][V] of each."""
    k = options.tokens_per_step or 1
    if options.steps is not None:
        plan = schedule(planned, options.steps)
        k = max(plan[evaluations] if evaluations < len(plan) else plan[-1], 1)
    sureness = {}
    for i in [i for i in range(len(masked)) if masked[i]]:
        p = probability[i]
        first, second = sorted(p, reverse=True)[:2]
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        sureness[i] = {
            "confidence": u[i] if options.remasking == "random" else p[tokens[i]],
            "threshold": p[tokens[i]],
            "editing": p[tokens[i]],
            "margin": first - second,
        }.get(options.sampler, -entropy)
    ordered = sorted(sureness, key=lambda i: (-sureness[i], i))
    fixed = set(ordered[:k])
    if options.sampler in ("threshold", "editing"):
        limit = 0.9 if options.threshold is None else options.threshold
        fixed |= {i for i in ordered if sureness[i] >= limit and limit < 1}
    if options.sampler == "margin" and options.margin is not None:
        fixed |= {i for i in ordered if sureness[i] >= options.margin and options.margin < 1}
    if options.sampler == "entropy_bound":
        bound = 0.1 if options.entropy_bound is None else options.entropy_bound
        for count in range(1, len(ordered) + 1):
            entropies = [-sureness[i] for i in ordered[:count]]
            if sum(entropies) - max(entropies) <= bound:
                fixed |= set(ordered[:count])
    return [i in fixed for i in range(len(masked))]


CASES = [
    {"sampler": "confidence"},
    {"tokens_per_step": 3},
    {"steps": 2},
    {"steps": 3},
    {"steps": 7},
    {"remasking": "random", "tokens_per_step": 2},
    {"remasking": "random", "steps": 3},
    {"sampler": "threshold"},
    {"threshold": 0.4},
    {"threshold": 0.0},
    {"threshold": 1.0},
    {"threshold": 0.6, "steps": 3},
    {"threshold": 0.6, "tokens_per_step": 2},
    {"sampler": "margin"},
    {"sampler": "margin", "tokens_per_step": 2},
    {"margin": 0.3},
    {"margin": 1.0},
    {"margin": 0.3, "steps": 2},
    {"sampler": "entropy", "tokens_per_step": 2},
    {"sampler": "entropy", "steps": 4},
    {"sampler": "entropy_bound"},
    {"entropy_bound": 1.5},
    {"entropy_bound": 0.0},
    {"entropy_bound": 0.5, "steps": 3},
]


@pytest.mark.parametrize("given", CASES, ids=str)
def test_an_order_is_its_definition(given):
    """200 rows of 5 positions and 4 tokens, some with positions fixed already and of ties."""
    options = SamplingOptions(**given)
    generator = torch.Generator().manual_seed(3)
    count, size = 200, 5
    spread = torch.rand(count, size, 1, generator=generator) * 6
    logits = torch.randn(count, size, 4, generator=generator) * spread
    logits[:20] = logits[:20, :1]  # equally sure positions
    masked = torch.rand(count, size, generator=generator) < 0.7
    masked[:, 2] = True
    masked, u = masked.numpy(), torch.rand(count, size, generator=generator).double().numpy()
    evaluations, planned = np.arange(count) % 4, np.full(count, size) - np.arange(count) % 2
    drawn = torch.randint(4, (count, size), generator=generator)
    rows = RowState(
        masked, planned, u, evaluations, np.tile(np.arange(size), (count, 1)), np.arange(count),
        np.zeros(count, np.int64), options, lambda own, seeds, number, at: drawn[number, at],
    )  # fmt: skip
    order = ORDERS[options.sampler]
    wanted = order.wanted(rows)
    chosen, tokens = order.choose(logits[torch.from_numpy(wanted)], wanted, rows)
    assert (tokens == drawn[torch.from_numpy(wanted)]).all()
    found = np.zeros(masked.shape, bool)
    found[wanted] = True if chosen is None else chosen.numpy()
    probability = logits.softmax(-1).tolist()
    for row in range(count):
        expected = by_hand(
            options, probability[row], drawn[row].tolist(), masked[row].tolist(), u[row].tolist(),
            int(evaluations[row]), int(planned[row]),
        )  # fmt: skip
        assert found[row].tolist() == expected, row
    assert found.any(1).all() and (options.remasking == "random" or (wanted == masked).all())


def test_a_setting_chooses_its_order():
    for given, sampler in (
        ({}, "first_hitting"),
        ({"schedule": "cosine"}, "first_hitting"),
        ({"steps": 2}, "confidence"),
        ({"steps": 2, "schedule": "linear"}, "ancestral"),
        ({"tokens_per_step": 2}, "confidence"),
        ({"remasking": "low_confidence"}, "confidence"),
        ({"threshold": 0.9}, "threshold"),
        ({"threshold": 0.9, "steps": 2}, "threshold"),
        ({"margin": 0.2}, "margin"),
        ({"entropy_bound": 0.2}, "entropy_bound"),
    ):
        options = SamplingOptions(**given)
        assert options.sampler == sampler
        assert options == SamplingOptions(sampler=sampler, **given)
        assert merge_options(options, seed=1) == SamplingOptions(**given, seed=1)
    assert merge_options(SamplingOptions(), threshold=0.5).sampler == "threshold"
    assert merge_options({"threshold": 0.5}, threshold=None).sampler == "first_hitting"


class Mine(Order):
    name, reads = "mine", ("threshold", "margin")


def test_an_order_of_ones_own_says_what_it_reads():
    options = SamplingOptions(sampler=Mine(), threshold=0.4, margin=0.1)
    assert merge_options(options, margin=0.2).margin == 0.2
    with pytest.raises(InputError, match="the mine sampler does not read `steps`"):
        SamplingOptions(sampler=Mine(), steps=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "first_hitting", "steps": 4}, "not read `steps`: .* confidence"),
        ({"sampler": "first_hitting", "threshold": 0.5}, "`threshold`: .* use threshold"),
        ({"sampler": "confidence", "schedule": "cosine"}, "`schedule`.* or ancestral"),
        ({"sampler": "ancestral"}, "cannot do without `steps`"),
        ({"threshold": 0.5, "margin": 0.5}, "no sampler reads `margin` and `threshold` together"),
        ({"steps": 2, "tokens_per_step": 2}, "`steps` and `tokens_per_step`"),
        ({"threshold": -0.1}, "`threshold` is -0.1; it must be at least 0"),
        ({"threshold": 1.5}, "`threshold` is 1.5; it must be at most 1"),
        ({"threshold": math.nan}, "`threshold` is nan; it must be a finite number"),
        ({"threshold": "high"}, "`threshold` is 'high'; it must be a number"),
        ({"margin": 2}, "`margin` is 2; it must be at most 1"),
        ({"entropy_bound": -1}, "`entropy_bound` is -1; it must be at least 0"),
        ({"entropy_bound": math.inf}, "`entropy_bound` is inf"),
        ({"tokens_per_step": 0}, "`tokens_per_step` is 0; it must be at least 1"),
        ({"tokens_per_step": 1.5}, "`tokens_per_step` is 1.5; it must be a whole number"),
        ({"steps": 0}, "`steps` is 0; it must be at least 1"),
        ({"remasking": "high"}, "`remasking` 'high' is unknown; choose one of low_confidence, ran"),
        ({"edit_threshold": 7}, "`edit_threshold` is 7"),
    ],
)
def test_settings_that_make_no_sense(given, message):
    with pytest.raises(InputError, match=message):
        SamplingOptions(**given)


def test_every_setting_is_an_option_that_is_left_out_by_default():
    plain = SamplingOptions()
    assert all(getattr(plain, name) is None for name in SETTINGS)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"block_length": 4}, {"block_size": 4}),
        ({"canvas_length": 4}, {"block_size": 4}),
        ({"gen_length": 9}, {"max_new_tokens": 9}),
        ({"denoising_steps": 2}, {"steps": 2}),
        ({"steps_per_block": 2}, {"steps": 2}),
        ({"max_denoising_steps": 2}, {"steps": 2}),
        ({"confidence_threshold": 0.5}, {"threshold": 0.5}),
        ({"alg": "maskgit_plus"}, {"sampler": "confidence"}),
        ({"alg": "topk_margin"}, {"sampler": "margin"}),
        ({"alg": "entropy"}, {"sampler": "entropy"}),
        ({"alg": "origin", "steps": 4}, {"sampler": "ancestral", "steps": 4}),
        ({"remasking_strategy": "low_confidence_dynamic"}, {"sampler": "threshold"}),
        ({"remasking_strategy": "random"}, {"remasking": "random"}),
        ({"remasking": "low_confidence"}, {"sampler": "confidence", "remasking": "low_confidence"}),
    ],
)
def test_other_programs_words(theirs, ours):
    assert merge_options(**theirs) == merge_options(theirs) == SamplingOptions(**ours)
    assert merge_options({"steps": 4}, seed=2).steps == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nfe": 4}, "`nfe` may mean the steps of a block or of the whole text: give `steps`"),
        ({"num_steps": 4}, "`num_steps` may mean"),
        ({"alg": "best"}, "`alg` 'best' is unknown; choose one of maskgit_plus, topk_margin"),
        ({"block_length": 4, "block_size": 4}, "`block_size` is given twice"),
        ({"alg": "entropy", "sampler": "margin"}, "`sampler` is given twice"),
        ({"word": 4}, "no sampling option 'word'"),
    ],
)
def test_words_that_say_too_little_or_too_much(given, message):
    with pytest.raises(InputError, match=message):
        merge_options(given)


def test_the_command_line_knows_them(capsys):
    for words, message in (
        (["--denoising-steps", "4"], "did you mean --steps?"),
        (["--canvas_length", "4"], "did you mean --block-size?"),
        (["--confidence-threshold", "0.9"], "did you mean --threshold?"),
        (["--alg", "entropy"], "did you mean --sampler?"),
        (["--threshold", "2"], "--threshold is 2.0; it must be at most 1"),
        (["--threshold", "high"], "--threshold cannot be 'high'; expected a number"),
        (["--entropy-bound", "-1"], "--entropy-bound is -1.0; it must be at least 0"),
        (["--tokens-per-step", "0"], "--tokens-per-step is 0"),
        (["--remasking", "high"], "--remasking cannot be 'high'; choose one of low_confidence, ra"),
        (["--threshold", "0.9", "--margin", "0.1"], "no sampler reads --margin and --threshold"),
        (["--sampler", "first_hitting", "--steps", "4"], "does not read --steps: leave it out or"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["generate", "starter", *words])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
