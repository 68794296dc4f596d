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
        model, [prompt] * rows, limit=100, max_new_tokens=new, stop="none", **options
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


@pytest.mark.parametrize("clean", ["block", "causal"])
def test_blocks_follow_one_another(clean):
    """Two blocks of 2: p(b_1) · p(b_2 | b_1), 81 outcomes, the second read through the cache."""
    prompt, laws, blind = [1, 2], {}, {}
    for stream in ("block", "causal"):
        model = tiny_model(vocab_size=4, length=6, block_size=2, seed=11, clean_stream=stream)
        first = joint(conditionals(model, prompt), [], one_at_a_time([0, 1]))
        laws[stream] = truth = {}
        for head, chance in first.items():
            second = joint(conditionals(model, [*prompt, *head]), [], one_at_a_time([0, 1]))
            for tail, rest in second.items():
                truth[head + tail] = chance * rest
                if stream == clean:
                    blind[head + tail] = chance * first[tail]
    truth = laws.pop(clean)
    for other in (blind, *laws.values()):
        assert noncentrality(truth, other) > 200
    model = tiny_model(vocab_size=4, length=6, block_size=2, seed=11, clean_stream=clean)
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


def chain(model, prompt, steps, schedule="linear", scores=False):
    """{outcome: probability} of the rest of the prompt's block by T Markov steps, all states.

    In the step from t to s each masked position is unmasked with probability (α_s − α_t)/(1 − α_t),
    times the network's own sum of scores with `scores` (all that is left, in the last step).
    """
    size = model.config.block_size
    start = len(prompt) // size * size
    given = tuple(prompt[start:])
    rate = get_schedule(schedule).mask_rate(1 - torch.arange(steps + 1).double() / steps)
    chances = {given + (MASK,) * (size - len(given)): 1.0}
    for step in range(steps):
        share = float((rate[step] - rate[step + 1]) / rate[step])
        sigma = -torch.log1p(-rate[step].clamp(max=1 - 1e-3)).float()
        after = {}
        for state, chance in chances.items():
            x_t = torch.tensor([[*prompt[:start], *state]])
            x_0 = x_t.where(x_t != MASK, 0) if start else None
            with torch.no_grad():
                logits = model(x_t, x_0=x_0, sigma=sigma[None], backend="dense").logits
            odds = logits[0, start:, :MASK].double().exp()
            table = []
            for i, token in enumerate(state):
                if token != MASK:
                    table.append({token: 1.0})
                    continue
                unmask = min(1.0, share * float(odds[i].sum()) / 3) if scores else share
                unmask = 1.0 if step == steps - 1 else unmask
                own = (odds[i] / odds[i].sum()).tolist()
                table.append({v: unmask * own[v] for v in range(3)} | {MASK: 1 - unmask})
            for new in itertools.product(*table):
                weight = math.prod(row[v] for row, v in zip(table, new, strict=True))
                after[new] = after.get(new, 0.0) + chance * weight
        chances = after
    found = {key[len(given) :]: chance for key, chance in chances.items() if chance > 0}
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    return found


def timed_model(score=False, **settings):
    """A network to which the time matters, as the tests below assert."""
    model = tiny_model(vocab_size=4, seed=11, time_conditioning=True, score=score, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("sigma.") or name.endswith("modulation.weight"):
                parameter.mul_(3)
    return model


def test_the_chain_of_a_network_without_time_is_in_steps():
    model, prompt = model_and_prompt("block of 3 after a block")
    slow = joint(conditionals(model, prompt), [], in_steps([0, 1, 2], 2, "linear"))
    fast = chain(model, prompt, 2)
    assert fast.keys() == slow.keys()
    assert all(fast[key] == pytest.approx(slow[key], abs=1e-6) for key in slow)


@pytest.mark.parametrize(
    "settings", [{"length": 4, "block_size": 4}, {"length": 9, "block_size": 3}]
)
def test_ancestral_steps_of_a_time_conditioned_network(settings):
    """One block of MDLM's kind; or a block of BD3-LM's after a clean one, which has σ = 0."""
    model, prompt = timed_model(**settings), [2, 0, 1] if settings["length"] == 9 else [2]
    truth = chain(model, prompt, 3)
    model.config.time_conditioning = False
    assert noncentrality(truth, chain(model, prompt, 3)) > 100, "σ = 0 throughout would be seen"
    model.config.time_conditioning = True
    outcomes = drawn(model, prompt, 3, sampler="ancestral", steps=3)
    assert p_value(outcomes, truth) > REJECT


def test_a_finished_block_beside_a_timed_one_has_no_noise():
    """Two blocks of 2: the first enters the cache in the evaluation that begins the second."""
    model = timed_model(length=6, block_size=2)
    prompt, truth = [1, 2], {}
    for head, chance in chain(model, prompt, 2).items():
        for tail, rest in chain(model, [*prompt, *head], 2).items():
            truth[head + tail] = chance * rest
    assert p_value(drawn(model, prompt, 4, sampler="ancestral", steps=2), truth) > REJECT


def test_first_hitting_of_a_time_conditioned_network_is_its_fine_chain():
    """Many steps come near: 60 of them differ less than 12,000 rows can tell."""
    model, prompt = timed_model(length=3, block_size=3), [2]
    truth = chain(model, prompt, 60)
    assert noncentrality(truth, chain(model, prompt, 1)) > 100
    assert p_value(drawn(model, prompt, 2), truth) > REJECT


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_analytic(steps):
    """SEDD's sampler: the network's own sums decide how many positions a step unmasks."""
    model, prompt = timed_model(score=True, length=4, block_size=4), [2]
    with torch.no_grad():
        model.output.linear.bias[:3] -= 0.7  # sums below 1 as well as above
    truth = chain(model, prompt, steps, scores=True)
    if steps > 1:
        assert noncentrality(truth, chain(model, prompt, steps)) > 40, "ancestral is another"
    assert p_value(drawn(model, prompt, 3, sampler="analytic", steps=steps), truth) > REJECT
