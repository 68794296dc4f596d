"""Likelihood and sampling of adapted models against a slow network that knows no cache."""

import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from families import CONTEXT, FEW, MASK, Slow, SlowDiT, adapted, lm_of, shifted_dit, tiny, tokens

from blockdiff import Engine, SamplingOptions
from blockdiff.categorical import host_uniform
from blockdiff.errors import InputError
from blockdiff.estimators import make_estimator
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.adapting import adapt
from blockdiff.noising import Noise
from blockdiff.objectives import bd3lm, maskable_positions
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.orders.base import ORDER, TOKEN
from sampling.test_distribution import REJECT, in_steps, joint, noncentrality, p_value

CONVENTIONS = [(clean, how) for clean in ("causal", "block") for how in ("shift", "same")]
EVERY = pytest.mark.parametrize("clean, prediction", CONVENTIONS)
# The same of our own network, which has one way of predicting as AR does.
TOYS = pytest.mark.parametrize("clean, prediction", [*CONVENTIONS, ("causal", "dit")])
pytestmark = pytest.mark.filterwarnings("ignore:the model was trained with block size")


@lru_cache
def toy(clean, prediction):
    """Three words, blocks of three, and the same weights behind the slow network."""
    if prediction == "dit":
        dit = shifted_dit(vocab_size=4, block_size=3, eos_token_id=None, seed=14)
        return dit, SlowDiT(dit)
    own = {"vocab_size": 4, "eos_token_id": None, "bos_token_id": None, "seed": 9}
    model = adapt(
        tiny("llama", **own), mask_token_id=3, block_size=3, clean=clean, prediction=prediction
    )
    return model, Slow(tiny("llama", **own), clean, prediction)


# the likelihood


def slow_bound(slow, text, size):
    """Nats: over the orders in which a block's tokens can be fixed, the mean of their chain.

    The first token of a text is given; under "shift" that of a block comes first, once.
    """
    total = 0.0
    for start in range(0, len(text), size):
        prefix, block = text[:start], text[start : start + size]

        def nats(known, wanted, prefix=prefix, block=block):
            state = [token if i in known else 3 for i, token in enumerate(block)]
            logits = slow.logits(prefix, state)[wanted].double()
            logits[3] = -math.inf
            return -float(logits.log_softmax(-1)[block[wanted]])

        first = [0] if start == 0 or slow.shift else []
        total += nats([], 0) if start and slow.shift else 0.0
        rest = [i for i in range(size) if i not in first]
        orders = list(itertools.permutations(rest))
        for order in orders:
            chain = sum(nats([*first, *order[:i]], order[i]) for i in range(len(order)))
            total += chain / len(orders)
    return total


@TOYS
def test_the_bound_by_brute_force(clean, prediction):
    model, slow = toy(clean, prediction)
    x_0 = torch.tensor([[1, 0, 2, 2, 1, 0, 0, 1, 1], [2, 1, 1, 0, 0, 2, 1, 2, 0]])
    found = likelihood(model, x_0, "enumerate")
    assert found.tokens.tolist() == [8, 8]
    expected = [slow_bound(slow, text, 3) for text in x_0.tolist()]
    assert found.nats.tolist() == pytest.approx(expected, abs=1e-4)


@TOYS
def test_a_bound_it_is(clean, prediction):
    """e^−nats over all continuations of the first token: at most 1; exactly 1 at L' = 1, shift."""
    model, _ = toy(clean, prediction)
    tails = torch.tensor(list(itertools.product(range(3), repeat=5)))
    x_0 = torch.cat([torch.full((len(tails), 1), 1), tails], dim=1)
    mass = likelihood(model, x_0, "enumerate").nats.neg().exp().sum().item()
    assert 0.2 < mass < 0.999
    exact = likelihood(model, x_0, "enumerate", block_size=1)
    assert exact.nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@TOYS
@pytest.mark.parametrize("estimator", ["exact_k", "paired", "bernoulli"])
def test_draws_estimate_what_enumerate_gives(clean, prediction, estimator):
    """Refused beyond 4.9 standard errors: under 1e-6 of the true means, for each of 24 texts."""
    model, _ = toy(clean, prediction)
    layout, count = model.config.layout_of(9), 800
    generator = torch.Generator().manual_seed(1)
    for text in ([1, 0, 2, 2, 1, 0, 0, 1, 1], [2, 1, 1, 0, 0, 2, 1, 2, 0]):
        x_0 = torch.tensor([text])
        exact = likelihood(model, x_0, "enumerate").nats.item()
        many = x_0.repeat(count, 1)
        shape = {"generator": generator, "dtype": torch.float64}
        noise = Noise(torch.rand(count, 3, **shape), torch.rand(count, 9, **shape))
        draw = make_estimator(estimator)(many, layout, noise, maskable_positions(many), 3)
        with torch.no_grad():
            nats = bd3lm(model, many, draw, layout).double().sum(1)
        error = float(nats.std()) / math.sqrt(count)
        assert abs(float(nats.mean()) - exact) < 4.9 * error
        assert error < 0.05 * exact


@TOYS
def test_draws_share_a_clean_pass_and_batches(clean, prediction):
    """`likelihood` with several draws is the mean of the draws one at a time, whatever the batch"""
    model, _ = toy(clean, prediction)
    x_0 = tokens(5, 12) % 3
    together = likelihood(model, x_0, "exact_k", draws=6, seed=2)
    apart = [
        likelihood(model, x_0[i : i + 1], "exact_k", draws=6, seed=2, rows=torch.tensor([i]))
        for i in range(5)
    ]
    expected = torch.cat([one.nats for one in apart])
    torch.testing.assert_close(together.nats, expected, rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_text_never_counts_under_shift():
    model, _ = toy("causal", "shift")
    x_0 = tokens(2, 9) % 3
    found = likelihood(model, x_0, "enumerate", keep_first=False)
    assert found.tokens.tolist() == [8, 8]
    assert torch.equal(found.nats, likelihood(model, x_0, "enumerate").nats)


def test_only_given_tokens_of_a_block_are_conditioned_on():
    """`maskable` leaves out a block's first token and another: they are given, and cost nothing."""
    model, slow = toy("causal", "shift")
    text = [1, 0, 2, 2, 1, 0]
    counts = torch.tensor([[False, False, False, False, True, False]])
    found = likelihood(model, torch.tensor([text]), "enumerate", maskable=counts)
    logits = slow.logits(text[:3], [2, 3, 0])[1, :3].double()
    assert found.nats.item() == pytest.approx(-float(logits.log_softmax(-1)[1]), abs=1e-5)


# sampling: the law


def conditionals(slow, prompt, size, temperature=1.0):
    """{state of the block: p(token) [K, 3]} for every state that keeps the prompt."""
    start = len(prompt) // size * size
    given = prompt[start:]
    states = [
        given + list(state) for state in itertools.product(range(4), repeat=size - len(given))
    ]
    with torch.no_grad():
        logits = slow.of_states(prompt[:start], states).double()
    logits[..., 3] = -math.inf
    p = (logits / temperature).softmax(-1)
    return {tuple(state): table for state, table in zip(states, p, strict=True)}


def first_alone(slow, free, ways):
    """The same ways of the other positions, behind that of the first where it comes alone."""
    if not slow.shift or free[0] != 0:
        return ways(free)
    return [(weight, [(0,), *groups]) for weight, groups in ways(free[1:])]


def permuted(free):
    orders = list(itertools.permutations(free))
    return [(1 / len(orders), [(i,) for i in order]) for order in orders]


SAMPLERS = {
    "first_hitting": (permuted, {}),
    "ancestral": (
        lambda free: in_steps(free, 2, "linear"),
        {"sampler": "ancestral", "steps": 2},
    ),
}


@TOYS
@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("prompt", [[0, 2, 1], [0, 2, 1, 2], [1]])
def test_samplers_draw_from_the_network_s_law(clean, prediction, sampler, prompt):
    """2,000 rows by chi-square, refused under p = 1e-4, against all orders of the block."""
    model, slow = toy(clean, prediction)
    ways, options = SAMPLERS[sampler]
    given = prompt[len(prompt) // 3 * 3 :]
    free = list(range(len(given), 3))
    table = conditionals(slow, prompt, 3)
    truth = joint(table, given, first_alone(slow, free, ways))
    together = joint(table, given, [(1.0, [free])])
    assert noncentrality(truth, together, 2000) > 100, "independent positions would be seen"
    assert p_value(drawn(model, prompt, len(free), **options), truth) > REJECT


def drawn(model, prompt, new, rows=2000, **options):
    options = SamplingOptions(max_new_tokens=new, stop="none", **options)
    return generate_tokens(model, [prompt] * rows, options).tokens


@TOYS
def test_two_blocks_follow_one_another(clean, prediction):
    """p(b_1) p(b_2 | b_1): the second reads the first through the cache, by its own convention."""
    model, slow = toy(clean, prediction)
    prompt, truth, blind = [1, 2], {}, {}
    size = 2
    law = {}
    for head in ([], *map(list, itertools.product(range(3), repeat=2))):
        table = conditionals(slow, prompt + head, size)
        law[tuple(head)] = joint(table, [], first_alone(slow, [0, 1], permuted))
    for head, chance in law[()].items():
        for tail, rest in law[head].items():
            truth[head + tail], blind[head + tail] = chance * rest, chance * law[()][tail]
    assert noncentrality(truth, blind, 2000) > 100
    assert p_value(drawn(model, prompt, 4, block_size=size), truth) > REJECT


@TOYS
def test_threshold(clean, prediction):
    """Row by row the tokens of its rule, run on the slow network's table and the rows' numbers."""
    model, slow = toy(clean, prediction)
    prompt, rows = [0, 2, 1], 1000
    table = {state: p.tolist() for state, p in conditionals(slow, prompt, 3).items()}
    found = drawn(model, prompt, 3, rows, sampler="threshold", seed=4)
    u = host_uniform(4, np.arange(rows)[:, None], 3 + np.arange(3), TOKEN).tolist()
    own = [threshold_rule(table, row, slow.shift) for row in u]
    assert sum(a != b for a, b in zip(own, found, strict=True)) <= 1  # a number on an edge


def threshold_rule(table, u, shift):
    state = [3, 3, 3]
    while 3 in state:
        masked = [i for i in range(3) if state[i] == 3]
        if shift and state[0] == 3:
            masked = [0]
        p = table[tuple(state)]
        token = {i: (u[i] >= p[i][0]) + (u[i] >= p[i][0] + p[i][1]) for i in masked}
        sure = {i: p[i][token[i]] for i in masked}
        for i in masked:
            if sure[i] >= 0.9 or sure[i] == max(sure.values()):
                state[i] = token[i]
    return state


# sampling: token for token


def slow_sample(slow, prompt, new, size, temperature, seed, number):
    """(new tokens, evaluations): everything is computed again for every token."""
    text, end, evaluations = list(prompt), len(prompt) + new, 0
    while len(text) < end:
        start = len(text) // size * size
        block = text[start:] + [MASK] * (start + size - len(text))
        place = start + np.arange(size)
        order = host_uniform(seed, number, place, ORDER)
        u = host_uniform(seed, number, place, TOKEN)
        while MASK in block[: end - start]:
            masked = [i for i in range(size) if block[i] == MASK]
            one = 0 if slow.shift and 0 in masked else max(masked, key=lambda i: order[i])
            logits = slow.logits(text[:start], block)[one].double()
            logits[MASK] = -math.inf
            if temperature == 0:
                block[one] = int(logits.argmax())
            else:
                below = (logits / temperature).softmax(-1).cumsum(0)
                block[one] = int((below <= u[one]).sum())
            evaluations += 1
        text[start:] = block
    # What precedes the first block to write is cached first; under "shift" without the last block
    # before it, which is run with the first token.
    cached = len(prompt) // size * size
    if slow.shift and cached == len(prompt):
        cached -= size
    return text[len(prompt) : end], evaluations + (cached > 0)


ROWS = [  # tokens of the prompt, new tokens, block size, temperature
    (1, 11, 4, 0.0),
    (4, 9, 4, 1.0),
    (7, 10, 4, 1.0),
    (8, 4, 4, 0.0),
    (5, 8, 2, 1.0),
    (12, 6, 1, 1.0),
    (9, 8, 8, 1.0),
    (CONTEXT - 9, 9, 4, 1.0),  # to the end of the context
]


@pytest.mark.parametrize(
    "family, clean, prediction",
    [(family, *CONVENTIONS[::3][i % 2]) for i, family in enumerate(FEW)]
    + [(family, *CONVENTIONS[::3][1 - i % 2]) for i, family in enumerate(FEW)]
    + [("llama", *conventions) for conventions in CONVENTIONS[1:3]]
    + [("dit", "causal", "shift")],
)
def test_rows_side_by_side_are_those_of_the_slow_sampler(family, clean, prediction):
    """Each with its own prompt, block size, temperature and arrival; and so are evaluations."""
    if family == "dit":
        model = shifted_dit()
        slow = SlowDiT(model)
    else:
        model = adapted(family, clean=clean, prediction=prediction)
        slow = Slow(lm_of(family), clean, prediction)
    engine, names = Engine(model), {}
    waiting = list(enumerate(ROWS))
    while waiting or engine.active:
        if waiting:
            number, (start, new, size, temperature) = waiting.pop(0)
            options = SamplingOptions(
                new, block_size=size, temperature=temperature, seed=3, stop="none"
            )
            prompt = tokens(start, seed=start).tolist()
            name = engine.admit(prompt, options, number)
            names[name] = slow_sample(slow, prompt, new, size, temperature, 3, number)
        step = engine.step()
    for name, start in zip(names, [row[0] for row in ROWS], strict=True):
        found = step.tokens[name, start : step.lengths[name]].tolist(), int(step.nfe[name])
        assert found == names[name], ROWS[name]


@EVERY
def test_a_row_stops_at_the_end_of_its_text(clean, prediction):
    model = adapted("llama", clean=clean, prediction=prediction)
    slow, stopped = Slow(lm_of("llama"), clean, prediction), 0
    prompts = [tokens(start, seed=start).tolist() for start in (3, 4, 6)]
    for number, prompt in enumerate(prompts):
        whole, _ = slow_sample(slow, prompt, 40, 4, 1.0, 0, number)
        model.config.eos_token_id = whole[7]
        end = whole.index(whole[7]) + 1
        done = generate_tokens(model, [prompt], SamplingOptions(40), rows=[number])
        assert done.tokens == [whole[:end]] and done.finish == ["eos"]
        stopped += end < 40
    assert stopped == 3


@EVERY
def test_the_end_of_the_context(clean, prediction):
    model = adapted("gpt2", clean=clean, prediction=prediction)
    prompt = tokens(5).tolist()
    done = generate_tokens(model, [prompt], SamplingOptions(CONTEXT - 5, stop="none"))
    assert len(done.tokens[0]) == CONTEXT - 5
    with pytest.raises(InputError, match="context is 48 tokens; prompt and new tokens come to 49"):
        Engine(model).admit(prompt, SamplingOptions(CONTEXT - 4))


@EVERY
def test_one_block_is_the_whole_context(clean, prediction):
    """MDLM's kind: nothing is cached, and the first token of the text is always given."""
    model = adapted("llama", clean=clean, prediction=prediction, block_size=8, length=8)
    assert model.config.kind == "mdlm"
    slow = Slow(lm_of("llama"), clean, prediction)
    for start in (1, 3, 6):
        prompt = tokens(start, seed=start).tolist()
        options = SamplingOptions(8 - start, stop="none", seed=1)
        done = generate_tokens(model, [prompt], options)
        assert done.tokens[0] == slow_sample(slow, prompt, 8 - start, 8, 1.0, 1, 0)[0]
        assert done.nfe == [8 - start]


def test_the_mask_token_is_never_drawn():
    """Though the head gives it the largest logit of all."""
    for prediction in ("shift", "same"):
        model = adapted("gpt_neox", prediction=prediction)
        with torch.no_grad():
            head = model.get_output_embeddings()
            head.weight[MASK] = 0
            hidden = model.encode(tokens(1, 8)).hidden[0]
            head.weight[MASK] = 50 * hidden.mean(0) / hidden.mean(0).norm()
        done = generate_tokens(model, [[1, 2]] * 4, SamplingOptions(20, stop="none"))
        assert all(MASK not in text for text in done.tokens)
        x_0 = tokens(2, 16)
        x_t = torch.where(torch.arange(16) % 4 > 0, MASK, x_0)
        at = x_t == MASK
        with torch.no_grad():
            nll = model(x_t, x_0, at=at, targets=x_0[at]).nll
            logits = model(x_t, x_0).logits[at]
        assert (logits.argmax(-1) == MASK).any()
        logits[:, MASK] = -math.inf
        expected = -logits.log_softmax(-1).gather(1, x_0[at][:, None]).squeeze(1)
        torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)


def test_a_text_longer_than_the_context_is_not_measured():
    model = adapted("gpt2")
    assert likelihood(model, tokens(1, CONTEXT), draws=1).nats.isfinite().all()
    with pytest.raises(InputError, match="context is 48 tokens, and the text has 52"):
        likelihood(model, tokens(1, CONTEXT + 4))
