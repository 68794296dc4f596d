"""The samplers draw from the distribution the network defines.

With 3 tokens and blocks of 2 to 4 that distribution is a finite sum over all unmasking orders,
done here from the logits of one dense pass per state. Thousands of rows are compared with it by
chi-square, rejecting under p = 1e-4; each test also asserts that it would see the likely mistakes
(a fixed order, independent positions): their noncentrality is far past the rejection threshold.
"""

import itertools
import math

import pytest
import torch
from scipy import stats

from blockdiff.schedules import get_schedule
from helpers import sampling_steps, tiny_model

REJECT = 1e-4
ROWS = 12_000
MASK = 3
# Name → model settings and prompt; the rest of the prompt's last block is what is sampled.
CASES = {
    "block of 3 after a block": ({"length": 9, "block_size": 3}, [0, 2, 1]),
    "block of 3 with a prompt in it": ({"length": 9, "block_size": 3}, [0, 2, 1, 2]),
    "first block": ({"length": 6, "block_size": 3}, [1]),
    "mdlm": ({"length": 4, "block_size": 4}, [2]),
}
EVERY_CASE = pytest.mark.parametrize("case", list(CASES))


def model_and_prompt(case):
    settings, prompt = CASES[case]
    return tiny_model(vocab_size=4, seed=11, **settings), prompt


def conditionals(model, prompt, temperature=1.0):
    """{state of the block: p(token) [K, 3]} for every state that keeps the prompt."""
    size = model.config.block_size
    start = len(prompt) // size * size
    given = prompt[start:]
    states = list(itertools.product(range(4), repeat=size - len(given)))
    x_t = torch.tensor([prompt + list(state) for state in states])
    x_0 = torch.tensor(prompt + [0] * (size - len(given))).expand_as(x_t)
    with torch.no_grad():
        logits = model(x_t, x_0=x_0, backend="dense").logits[:, start:].double()
    logits[..., MASK] = -math.inf
    p = (logits / temperature).softmax(-1)
    return {(*given, *state): table for state, table in zip(states, p, strict=True)}


def joint(p, given, ways):
    """{outcome: probability} when positions are fixed in groups; `ways`: (weight, groups)."""
    size = len(next(iter(p)))
    free = range(len(given), size)
    total = {}
    for tokens in itertools.product(range(3), repeat=len(free)):
        final = (*given, *tokens)
        total[tokens] = 0.0
        for weight, groups in ways:
            state, chance = [*given, *[MASK] * len(free)], weight
            for group in groups:
                table = p[tuple(state)]
                chance *= math.prod(table[i, final[i]].item() for i in group)
                for i in group:
                    state[i] = final[i]
            total[tokens] += chance
    assert sum(total.values()) == pytest.approx(1, abs=1e-9)
    return total


def one_at_a_time(free):
    orders = list(itertools.permutations(free))
    return [(1 / len(orders), [(i,) for i in order]) for order in orders]


def in_steps(free, steps, schedule):
    """Each position's step is drawn on its own: step i loses 1 − α from t = 1 − i/T on."""
    time = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    chance = -get_schedule(schedule).mask_rate(time).diff()
    ways = []
    for events in itertools.product(range(steps), repeat=len(free)):
        weight = math.prod(chance[event].item() for event in events)
        groups = [[i for i, e in zip(free, events, strict=True) if e == s] for s in range(steps)]
        ways.append((weight, [group for group in groups if group]))
    return ways


def drawn(model, prompt, new, rows=ROWS, **options):
    """Tokens of `rows` rows with numbers of their own, [rows, new]."""
    last = sampling_steps(
        model, [prompt] * rows, limit=100, max_new_tokens=new, stop_at_eos=False, **options
    )[-1]
    return last.tokens[:, len(prompt) : len(prompt) + new].tolist()


def p_value(outcomes, expected):
    """Chi-square of what was drawn; rare outcomes (fewer than 5 expected) count as one."""
    counts = dict.fromkeys(expected, 0)
    for outcome in outcomes:
        counts[tuple(outcome)] += 1
    n = len(outcomes)
    common = [key for key in expected if n * expected[key] >= 5]
    observed = [counts[key] for key in common]
    theory = [n * expected[key] for key in common]
    if len(common) < len(expected):
        observed.append(n - sum(observed))
        theory.append(n - sum(theory))
    return stats.chisquare(observed, theory, sum_check=False).pvalue


def noncentrality(truth, other, rows=ROWS):
    return rows * sum((truth[key] - other[key]) ** 2 / truth[key] for key in truth)


def block_parts(model, prompt):
    size = model.config.block_size
    given = prompt[len(prompt) // size * size :]
    return given, list(range(len(given), size))


@EVERY_CASE
def test_first_hitting(case):
    model, prompt = model_and_prompt(case)
    given, free = block_parts(model, prompt)
    p = conditionals(model, prompt)
    truth = joint(p, given, one_at_a_time(free))
    for mistake in ([(1.0, [(i,) for i in free])], [(1.0, [free])]):
        assert noncentrality(truth, joint(p, given, mistake)) > 100, "the test would see it"
    assert p_value(drawn(model, prompt, len(free)), truth) > REJECT


@EVERY_CASE
def test_fine_ancestral_steps_are_first_hitting(case):
    """The same tokens with the same seed, so the same distribution."""
    model, prompt = model_and_prompt(case)
    new = len(block_parts(model, prompt)[1])
    fine = drawn(model, prompt, new, rows=2000, sampler="ancestral", steps=10**9)
    differ = sum(a != b for a, b in zip(fine, drawn(model, prompt, new, rows=2000), strict=True))
    assert differ == 0


STEPS = [(1, "linear"), (2, "linear"), (2, "square_root"), (3, "cosine")]


@pytest.mark.parametrize(("steps", "schedule"), STEPS)
def test_coarse_ancestral_steps(steps, schedule):
    """One step: the product of the marginals. More: every way the positions fall into steps."""
    model, prompt = model_and_prompt("block of 3 after a block")
    p = conditionals(model, prompt)
    truth = joint(p, [], in_steps([0, 1, 2], steps, schedule))
    if steps == 1:
        table = p[(MASK,) * 3]
        outcome = (0, 2, 1)
        product = math.prod(table[i, token].item() for i, token in enumerate(outcome))
        assert truth[outcome] == pytest.approx(product)
    outcomes = drawn(model, prompt, 3, sampler="ancestral", steps=steps, schedule=schedule)
    assert p_value(outcomes, truth) > REJECT


def test_coarse_steps_are_told_apart():
    """The tests above can fail: another number of steps or schedule would be seen."""
    model, prompt = model_and_prompt("block of 3 after a block")
    p = conditionals(model, prompt)
    ways = [joint(p, [], in_steps([0, 1, 2], *name)) for name in STEPS]
    ways.append(joint(p, [], one_at_a_time([0, 1, 2])))
    for a, b in itertools.combinations(ways, 2):
        assert noncentrality(a, b) > 50


def test_blocks_follow_one_another():
    """Two blocks of 2: p(b_1) · p(b_2 | b_1), 81 outcomes, the second read through the cache."""
    model = tiny_model(vocab_size=4, length=6, block_size=2, seed=11)
    prompt, truth, blind = [1, 2], {}, {}
    first = joint(conditionals(model, prompt), [], one_at_a_time([0, 1]))
    for head, chance in first.items():
        second = joint(conditionals(model, [*prompt, *head]), [], one_at_a_time([0, 1]))
        for tail, rest in second.items():
            truth[head + tail] = chance * rest
            blind[head + tail] = chance * first[tail]
    assert noncentrality(truth, blind) > 200
    assert p_value(drawn(model, prompt, 4), truth) > REJECT


def test_temperature():
    model, prompt = model_and_prompt("block of 3 after a block")
    given, free = block_parts(model, prompt)
    truth = joint(conditionals(model, prompt, 0.5), given, one_at_a_time(free))
    assert (
        noncentrality(truth, joint(conditionals(model, prompt), given, one_at_a_time(free))) > 200
    )
    assert p_value(drawn(model, prompt, 3, temperature=0.5), truth) > REJECT


def test_autoregressive():
    model = tiny_model(vocab_size=4, length=6, causal=True, seed=11)
    prompt, truth = [1, 2], {}
    for tokens in itertools.product(range(3), repeat=3):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].double()
        p = logits[1:4, :MASK].softmax(-1)
        truth[tokens] = math.prod(p[i, token].item() for i, token in enumerate(tokens))
    assert p_value(drawn(model, prompt, 3), truth) > REJECT
