"""Drafted and verified text is what L' = 1 writes: in distribution, and greedily token for token.

Distributions are compared by chi-square, rejecting under p = 1e-4; a verifier that accepts whatever
is drafted is refused by the same test.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

import blockdiff
from blockdiff import Engine, SamplingOptions, cli
from blockdiff.categorical import warp
from blockdiff.errors import InputError
from blockdiff.models.chain import Chain
from blockdiff.models.ngrams import KAPPA, Table
from blockdiff.sampling import verifying
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from helpers import tiny_model

REJECT = 1e-4
ROWS = 20_000
NEW = 4  # tokens of each text


def dit(**settings):
    return tiny_model(vocab_size=4, length=8, seed=5, **settings)


def adapted(prediction):
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=4, num_attention_heads=2, initializer_range=0.5, max_position_embeddings=8,
        bos_token_id=0, eos_token_id=None, **sizes,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval()
    lm.lm_head.weight.data *= 0.4  # flatter: many texts are likely
    return blockdiff.adapt(
        lm, block_size=4, mask_token_id=3, prediction=prediction, clean="causal", length=8,
        **({"block_sizes": (1, 4)} if prediction == "same" else {}),
    ).eval()  # fmt: skip


def chained(model):
    """With a chain whose weights are drawn: it counts."""
    chain = Chain(4, 2)
    torch.manual_seed(1)
    torch.nn.init.normal_(chain.out)
    model.chain = chain
    return model


MODELS = {
    "dit, same": lambda: dit(block_size=4, clean_stream="causal", block_sizes=(1, 4)),
    "dit, same, chain": lambda: chained(
        dit(block_size=4, clean_stream="causal", block_sizes=(1, 4))
    ),
    "ar": lambda: dit(causal=True),
    "adapted, shift": lambda: adapted("shift"),
    "adapted, shift, chain": lambda: chained(adapted("shift")),
}
CASES = [
    ("dit, same", {"temperature": 0.7}),
    ("dit, same", {"top_p": 0.8}),
    ("dit, same, chain", {}),
    ("ar", {"top_k": 2}),
    ("adapted, shift", {"temperature": 0.7}),
    ("adapted, shift", {}),
    ("adapted, shift, chain", {"temperature": 0.7, "top_p": 0.9}),
]


def law(model, prompt, **cut):
    """{text of NEW tokens: probability} at L' = 1, from one dense pass a prefix."""
    table = {}
    for length in range(NEW):
        texts = list(itertools.product(range(3), repeat=length))
        rows = torch.tensor([prompt + list(text) + [0] for text in texts])
        with torch.no_grad():
            if model.config.causal:
                logits = model(rows, backend="dense").logits[:, -2]
            else:
                x_t = rows.clone()
                x_t[:, -1] = 3
                layout = model.config.layout_of(rows.shape[1], 1)
                logits = model(x_t, x_0=rows, layout=layout, backend="dense").logits[:, -1]
        logits[:, 3] = -math.inf
        chance = warp(logits, **cut).double().softmax(-1)
        table |= dict(zip(texts, chance, strict=True))
    return {
        text: math.prod(float(table[text[:i]][text[i]]) for i in range(NEW))
        for text in itertools.product(range(3), repeat=NEW)
    }


def p_value(tokens, expected):
    counts = dict.fromkeys(expected, 0)
    for text in tokens:
        counts[tuple(text)] += 1
    common = [text for text in expected if ROWS * expected[text] >= 5]
    observed, theory = ([f[text] for text in common] for f in (counts, expected))
    theory = [ROWS * share for share in theory]
    observed.append(ROWS - sum(observed))
    theory.append(max(ROWS - sum(theory), 1e-9))
    if theory[-1] < 1e-3:  # everything is common
        assert observed.pop() == 0 and theory.pop() is not None
    return stats.chisquare(observed, theory, sum_check=False).pvalue


def drawn(model, prompt, drafts=3, **options):
    wish = SamplingOptions(
        max_new_tokens=NEW, stop="none", sampler="verified", drafts=drafts, **options
    )
    return generate_tokens(model, [prompt] * ROWS, wish)


@pytest.mark.parametrize("name, cut", CASES, ids=str)
def test_texts_are_distributed_as_at_block_size_1(name, cut):
    model, prompt = MODELS[name](), [1, 2]
    done = drawn(model, prompt, **cut)
    assert p_value(done.tokens, law(model, prompt, **cut)) > REJECT
    # The prompt's evaluation and those of four tokens at one each are five.
    assert np.mean(done.nfe) < 5, "some drafts are accepted"


@pytest.mark.parametrize("name", ["dit, same", "ar", "adapted, shift"])
def test_a_verifier_that_accepts_everything_is_refused(name, monkeypatch):
    monkeypatch.setattr(
        verifying.Verifier,
        "_chances",
        lambda self, p, q, d: (torch.ones(d.shape[:2]), torch.zeros(d.shape[:2])),
    )
    model, prompt = MODELS[name](), [1, 2]
    assert p_value(drawn(model, prompt).tokens, law(model, prompt)) < 1e-12


@pytest.mark.parametrize("name", ["dit, same", "ar"])
def test_a_refused_draft_that_is_drawn_from_p_again_is_refused(name, monkeypatch):
    """The commonest mistake: the token in the place of a refused draft drawn from p itself."""
    monkeypatch.setattr(verifying.Verifier, "_rest", lambda self, p, q: p)
    model, prompt = MODELS[name](), [1, 2]
    assert p_value(drawn(model, prompt).tokens, law(model, prompt)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("drafter", ["auto", "table"])
def test_greedy_text_is_that_of_block_size_1(name, drafter):
    """100 prompts, three contexts long."""
    model = MODELS[name]()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, (1 + i % 11,), generator=draw).tolist() for i in range(100)]
    new = 24 if model.config.slides else 8 - 11
    if new < 0:  # an adapted model ends with its context
        prompts, new = [prompt[:3] for prompt in prompts], 5
    plain = SamplingOptions(max_new_tokens=new, stop="none", temperature=0.0, block_size=1)
    wish = SamplingOptions(
        max_new_tokens=new, stop="none", temperature=0.0, sampler="verified", drafter=drafter,
        drafts=2,
    )  # fmt: skip
    expected, done = (generate_tokens(model, prompts, options) for options in (plain, wish))
    assert done.tokens == expected.tokens
    assert sum(done.nfe) < sum(expected.nfe)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_same_alone_streamed_and_beside_others(name):
    model = MODELS[name]()
    prompts = [[1, 2], [0], [2, 2, 1], [1, 0, 0]]
    varied = [
        SamplingOptions(max_new_tokens=5, stop="none", sampler="verified", seed=3),
        SamplingOptions(max_new_tokens=4, stop="none", sampler="verified", drafts=1, top_p=0.7),
        SamplingOptions(max_new_tokens=5, stop="none", sampler="verified", drafter="table"),
        SamplingOptions(max_new_tokens=4, stop="none"),
    ]
    engine = Engine(model)
    names = []
    for number, (prompt, options) in enumerate(zip(prompts, varied, strict=True)):
        names.append(engine.admit(prompt, options, number))
        if number % 2:
            engine.step()
    while engine.active:
        step = engine.step()
    for number, (prompt, options) in enumerate(zip(prompts, varied, strict=True)):
        alone = generate_tokens(model, [prompt], options, [number])
        *_, last = stream_tokens(model, [prompt], options, [number])
        place = step.rows.tolist().index(names[number])
        text = step.tokens[place, len(prompt) : step.lengths[place]].tolist()
        assert text == alone.tokens[0] == last.tokens[0, len(prompt) : last.lengths[0]].tolist()
        assert alone.nfe[0] == step.nfe[place]
    engine.drop(names[0])
    again = engine.admit(prompts[1], varied[1], 1)
    while engine.active:
        step = engine.step()
    place = step.rows.tolist().index(again)
    assert (
        step.tokens[place, 1:5].tolist()
        == generate_tokens(model, [prompts[1]], varied[1], [1]).tokens[0]
    )


def test_it_stops_inside_what_was_accepted():
    model = dit(block_size=4, clean_stream="causal", block_sizes=(1, 4), eos_token_id=0)
    wish = SamplingOptions(max_new_tokens=20, sampler="verified", drafts=3)
    done = generate_tokens(model, [[1, 2]] * 200, wish)
    assert {len(row) for row in done.tokens} > {1, 2, 3}
    for row, finish in zip(done.tokens, done.finish, strict=True):
        assert 0 not in row[:-1] and (finish == "eos") == (row[-1] == 0)


def test_log_probabilities_are_those_at_block_size_1():
    model, prompt = MODELS["adapted, shift"](), [1, 2]
    wish = SamplingOptions(max_new_tokens=5, stop="none", sampler="verified", logprobs=True)
    done = generate_tokens(model, [prompt] * 8, wish)
    from blockdiff.evaluation.likelihood import likelihood

    x_0 = torch.tensor([prompt + tokens for tokens in done.tokens])
    maskable = torch.zeros_like(x_0, dtype=torch.bool)
    maskable[:, 2:] = True
    exact = likelihood(model, x_0, block_size=1, maskable=maskable).nats
    assert [-sum(row) for row in done.path_logprobs] == pytest.approx(exact.tolist(), abs=1e-4)


def test_the_table_is_interpolated_counts():
    text = np.array([1, 2, 0, 1, 2, 3, 1, 2, 0, 0])
    table = Table.of(text, 5)
    single = np.array([sum(text[2:] == v) for v in range(5)]) + 1 / 5
    q = single / single.sum()
    after = {b: [int(c) for x, c in itertools.pairwise(text[1:]) if x == b] for b in range(5)}
    for a, b in itertools.product(range(5), repeat=2):
        both = [int(text[i + 2]) for i in range(8) if (text[i], text[i + 1]) == (a, b)]
        expected = q
        for found in (after[b], both):
            counts = np.bincount(found, minlength=5) if found else np.zeros(5)
            expected = (counts + KAPPA * expected) / (len(found) + KAPPA)
        assert table.distribution(a, b) == pytest.approx(expected)
        assert table.distribution(a, b).sum() == pytest.approx(1)
    assert Table.of(text[:2], 5).distribution(1, 2) == pytest.approx(np.full(5, 0.2))


REFUSED = {
    "block-causal": (dit, {"block_size": 4}, {}, "--clean causal"),
    "no L' = 1": (dit, {"block_size": 4, "clean_stream": "causal"}, {}, "--block-size 1,4"),
    "mdlm": (dit, {"block_size": 8}, {}, "causal clean stream"),
    "ar with masks": (dit, {"causal": True}, {"drafter": "masks"}, "table"),
    "another size": (
        dit, {"block_size": 4, "clean_stream": "causal", "block_sizes": (1, 4)},
        {"block_size": 4}, "leave `block_size` out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_verified_is_refused(case):
    make, settings, options, says = REFUSED[case]
    wish = SamplingOptions(sampler="verified", **options)
    with pytest.raises(InputError, match=says):
        generate_tokens(make(**settings), [[1]], wish)


@pytest.mark.parametrize(
    "words", [["--drafts", "0"], ["--drafts", "65"], ["--drafter", "oracle"],
              ["--drafts", "2", "--threshold", "0.5"], ["--sampler", "verified"]]
)  # fmt: skip
def test_bad_input(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "starter", "The", *words])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1
