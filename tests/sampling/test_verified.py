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
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import blockdiff
from blockdiff import Engine, SamplingOptions, cli
from blockdiff.categorical import warp
from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.adapting import as_autoregressive
from blockdiff.models.chain import Chain
from blockdiff.models.ngrams import KAPPA, OWN, Grams, Table
from blockdiff.sampling import drafters, verifying
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from helpers import tiny_model

REJECT = 1e-4
ROWS, FEW = 20_000, 4_000
NEW = 3  # tokens of each text


def dit(**settings):
    return tiny_model(vocab_size=4, length=8, seed=5, **settings)


def llama(**settings):
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config, kind = LlamaConfig, LlamaForCausalLM
    if "sliding_window" in settings:
        config, kind, settings["num_key_value_heads"] = MistralConfig, MistralForCausalLM, 2
    lm = kind(
        config(
            vocab_size=4, num_attention_heads=2, initializer_range=0.5, max_position_embeddings=8,
            bos_token_id=0, eos_token_id=None, **sizes, **settings,
        )
    ).eval()  # fmt: skip
    lm.lm_head.weight.data *= 0.4  # flatter: many texts are likely
    return lm


def adapted(prediction, **settings):
    model = blockdiff.adapt(
        llama(**settings), block_size=4, mask_token_id=3, prediction=prediction, clean="causal",
        length=8,
    ).eval()  # fmt: skip
    model.config.block_sizes = (1, 4)
    return model


def autoregressive():
    model = as_autoregressive(llama()).eval()
    model.drawable = torch.arange(4) < 3
    return model


def chained(model):
    """With a chain whose weights are drawn: it counts."""
    chain = Chain(4, 2)
    torch.manual_seed(1)
    torch.nn.init.normal_(chain.out)
    model.chain = chain
    return model


def tabled(model):
    """With a table whose counts say something else than the model."""
    model.draft_table = Table.of(np.array([0, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0, 2, 1, 1]), 4)
    return model


SAME = {"block_size": 4, "clean_stream": "causal", "block_sizes": (1, 4)}
SHIFT = {"block_size": 4, "clean_stream": "causal", "prediction": "shift"}
MODELS = {
    "dit, same": lambda: dit(**SAME),
    "dit, same, chain": lambda: chained(dit(**SAME)),
    "dit, shift": lambda: tabled(dit(**SHIFT)),
    "ar": lambda: dit(causal=True),
    "adapted, same": lambda: adapted("same"),
    "adapted, shift": lambda: adapted("shift"),
    "adapted, shift, chain": lambda: chained(adapted("shift")),
    "adapted, sliding": lambda: tabled(adapted("shift", sliding_window=2)),
    "adapted, ar": lambda: tabled(autoregressive()),
}
CASES = [
    ("dit, same", {"temperature": 0.7}),
    ("dit, same, chain", {"top_p": 0.8}),
    ("dit, shift", {}),
    ("ar", {"top_k": 2}),
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
    rows, counts = len(tokens), dict.fromkeys(expected, 0)
    for text in tokens:
        counts[tuple(text)] += 1
    common = [text for text in expected if rows * expected[text] >= 5]
    observed, theory = ([f[text] for text in common] for f in (counts, expected))
    theory = [rows * share for share in theory]
    observed.append(rows - sum(observed))
    theory.append(max(rows - sum(theory), 1e-9))
    if theory[-1] < 1e-3:  # everything is common
        assert observed.pop() == 0 and theory.pop() is not None
    return stats.chisquare(observed, theory, sum_check=False).pvalue


def drawn(model, prompt, rows=ROWS, **options):
    wish = SamplingOptions(max_new_tokens=NEW, stop="none", sampler="verified", drafts=2, **options)
    return generate_tokens(model, [prompt] * rows, wish)


@pytest.mark.parametrize("name, cut", CASES, ids=str)
def test_texts_are_distributed_as_at_block_size_1(name, cut):
    model, prompt = MODELS[name](), [1, 2]
    drafter = "table" if model.config.causal else "masks"
    done = drawn(model, prompt, drafter=drafter, **cut)
    assert p_value(done.tokens, law(model, prompt, **cut)) > REJECT
    assert np.mean(done.nfe) < 1 + NEW, "some drafts are accepted"


@pytest.mark.parametrize("name", ["dit, same", "ar", "adapted, shift"])
def test_a_verifier_that_accepts_everything_is_refused(name, monkeypatch):
    monkeypatch.setattr(
        verifying.Verifier,
        "_chances",
        lambda self, p, q, d: (torch.ones(d.shape[:2]), torch.zeros(d.shape[:2])),
    )
    model, prompt = MODELS[name](), [1, 2]
    assert p_value(drawn(model, prompt, FEW).tokens, law(model, prompt)) < 1e-12


@pytest.mark.parametrize("name", ["dit, same", "ar"])
def test_a_refused_draft_that_is_drawn_from_p_again_is_refused(name, monkeypatch):
    """The commonest mistake: the token in the place of a refused draft drawn from p itself."""
    monkeypatch.setattr(verifying.Verifier, "_rest", lambda self, p, q: p)
    model, prompt = MODELS[name](), [1, 2]
    assert p_value(drawn(model, prompt, FEW).tokens, law(model, prompt)) < 1e-12


def one_by_one(name):
    """A model, and how L' = 1 is asked for."""
    return MODELS[name](), ({} if name.endswith("ar") else {"block_size": 1})


@pytest.mark.filterwarnings("ignore:the model was trained with")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("drafter", ["masks", "table"])
def test_greedy_text_is_that_of_block_size_1(name, drafter):
    """100 prompts, three contexts long where the text may be longer than one."""
    model, single = one_by_one(name)
    drafter = "auto" if model.config.causal else drafter
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, (1 + i % 11,), generator=draw).tolist() for i in range(100)]
    new = 24
    if not model.config.slides:
        prompts, new = [prompt[:3] for prompt in prompts], 5
    shared = {"max_new_tokens": new, "stop": "none", "temperature": 0.0}
    wish = SamplingOptions(**shared, sampler="verified", drafter=drafter, drafts=2)
    expected = generate_tokens(model, prompts, SamplingOptions(**shared, **single))
    done = generate_tokens(model, prompts, wish)
    assert done.tokens == expected.tokens
    accepts = name != "adapted, sliding" or drafter == "table"  # its blocks guess wrongly
    assert sum(done.nfe) <= sum(expected.nfe) - accepts


@pytest.mark.filterwarnings("ignore:the model was trained with")
@pytest.mark.parametrize("name", ["dit, same", "dit, shift", "ar"])
def test_more_drafts_than_the_context(name):
    """Accepted together, the last of them no longer see the first."""
    model, single = one_by_one(name)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, (1 + i % 11,), generator=draw).tolist() for i in range(100)]
    shared = {"max_new_tokens": 40, "stop": "none", "temperature": 0.0}
    expected = generate_tokens(model, prompts, SamplingOptions(**shared, **single)).tokens
    wish = SamplingOptions(**shared, sampler="verified", drafter="table", drafts=12)
    runs = [int(step.fixed.sum(1).max()) for step in stream_tokens(model, prompts, wish)]
    assert generate_tokens(model, prompts, wish).tokens == expected
    assert max(runs) > 8


@pytest.mark.filterwarnings("ignore:the model was trained with")
@pytest.mark.parametrize("name", ["dit, same", "dit, shift", "ar"])
def test_past_the_context_the_cache_is_that_of_block_size_1(name):
    """The same keys and values in the same slots, as far as one token may be cached later."""
    model, single = one_by_one(name)
    shared = {"max_new_tokens": 24, "stop": "none", "temperature": 0.0}
    found = []
    for options in (single, {"sampler": "verified", "drafts": 2}):
        engine = Engine(model)
        engine.admit([1, 2, 0], SamplingOptions(**shared, **options))
        cache = engine._caches[-1]
        dropped, cache.drop = cache.drop, lambda which: None  # what it held stays
        while engine.active:
            step = engine.step()
        kept = cache.lengths[0]
        ring, store = cache.capacities[0], cache._of_layer[1]
        slots = cache._front + np.arange(kept - ring, kept) % ring
        positions = np.arange(kept - ring, kept).tolist()
        parts = zip(positions, *(x[0, :, slots].transpose(0, 1) for x in store), strict=True)
        found.append({at: (k, v) for at, k, v in parts} | {"text": step.tokens})
        assert ring == 7 and kept > 24 and dropped is not None
    one, other = found
    assert torch.equal(one.pop("text"), other.pop("text"))
    both = one.keys() & other.keys()
    assert len(both) >= 4
    for at in both:
        torch.testing.assert_close(one[at], other[at], atol=1e-5, rtol=1e-5)


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
    model = dit(**SAME, eos_token_id=0)
    wish = SamplingOptions(max_new_tokens=20, sampler="verified", drafts=3)
    done = generate_tokens(model, [[1, 2]] * 200, wish)
    assert {len(row) for row in done.tokens} > {1, 2, 3}
    for row, finish in zip(done.tokens, done.finish, strict=True):
        assert 0 not in row[:-1] and (finish == "eos") == (row[-1] == 0)


@pytest.mark.filterwarnings("ignore:the model was trained with")
@pytest.mark.parametrize("name", [name for name in MODELS if "chain" not in name])
def test_log_probabilities_are_those_at_block_size_1(name):
    model, prompt = MODELS[name](), [1, 2]
    wish = SamplingOptions(max_new_tokens=5, stop="none", sampler="verified", logprobs=True)
    done = generate_tokens(model, [prompt] * 8, wish)
    x_0 = torch.tensor([prompt + tokens for tokens in done.tokens])
    maskable = torch.zeros_like(x_0, dtype=torch.bool)
    maskable[:, 2:] = True
    if name == "adapted, ar":  # its own logits know of no ids that stand for nothing
        logits = model(x_0).logits[:, 1:-1, :3].log_softmax(-1)
        exact = -logits.gather(-1, x_0[:, 2:, None]).sum((1, 2))
    else:
        exact = likelihood(model, x_0, block_size=1, maskable=maskable).nats
    assert [-sum(row) for row in done.path_logprobs] == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.parametrize("split", [0, 5, 10])
def test_ngrams_are_interpolated_counts(split):
    """Of a text, of a table, and of both together."""
    text = np.array([1, 2, 0, 1, 2, 3, 1, 2, 0, 0])
    own, other = text[:split], text[split:]
    own_weight = OWN if len(other) else 1
    triples = [(row[i : i + 3].tolist(), own_weight) for row in (own,) for i in range(split - 2)]
    triples += [(other[i : i + 3].tolist(), 1) for i in range(len(other) - 2)]
    single = np.array([sum(c == v for (*_, c), _ in triples) for v in range(5)]) + 1 / 5
    grams = Grams(own, 5, Table.of(other, 5) if len(other) else None)
    for a, b in itertools.product(range(5), repeat=2):
        expected = single / single.sum()
        for seen, kappa in (([b], KAPPA[0]), ([a, b], KAPPA[1])):
            counts = np.zeros(5)
            for row, weight in triples:
                counts[row[2]] += weight * (row[2 - len(seen) : 2] == seen)
            lower = kappa * (counts > 0).sum()
            if lower:
                expected = (counts + lower * expected) / (counts.sum() + lower)
        logits = np.log(grams.single)
        np.add.at(logits, *grams.seen(a, b))
        assert np.exp(logits) / np.exp(logits).sum() == pytest.approx(expected)


def test_what_drafts():
    """Masks are joined by the chain where there is one, else by n-grams; a table needs none."""
    grams = [Grams(np.array([0, 1, 2, 0, 1]), 4)]
    before = np.array([0]), np.array([1])
    masked = torch.tensor([[0.3, 0.1, -0.2, -torch.inf]])
    index, gain = grams[0].seen(0, 1, drafters.JOINED)
    joined = masked.clone()
    joined[0, 2] += float(gain.sum())  # 2 is what followed 1, and 0 1
    plain, with_chain = MODELS["adapted, shift"](), MODELS["adapted, shift, chain"]()
    assert set(index.tolist()) == {2} and (gain > 0.05).all()
    torch.testing.assert_close(drafters.drafted(plain, masked, grams, before), joined)
    chain = masked + with_chain.chain(torch.tensor([1]))
    torch.testing.assert_close(drafters.drafted(with_chain, masked, [], before), chain)
    alone = drafters.drafted(plain, None, grams, before).softmax(-1)
    whole = np.log(grams[0].single)
    np.add.at(whole, *grams[0].seen(0, 1))
    torch.testing.assert_close(alone, torch.from_numpy(whole)[None].float().softmax(-1))
    kinds = {
        name: drafters.drafter_of(SamplingOptions(sampler="verified"), make())
        for name, make in MODELS.items()
    }
    with_a_table = {"dit, shift", "adapted, sliding", "ar", "adapted, ar"}
    assert {name for name, kind in kinds.items() if kind == "table"} == with_a_table
    single = dit(block_size=1, clean_stream="causal")
    wish = SamplingOptions(sampler="verified", max_new_tokens=3, stop="none", temperature=0.0)
    plainly = SamplingOptions(max_new_tokens=3, stop="none", temperature=0.0)
    expected = generate_tokens(single, [[1]], plainly).tokens
    assert generate_tokens(single, [[1]], wish).tokens == expected


REFUSED = {
    "block-causal": (dit, {"block_size": 4}, {}, "--clean causal"),
    "no L' = 1": (dit, {"block_size": 4, "clean_stream": "causal"}, {}, "--block-size 1,4"),
    "mdlm": (dit, {"block_size": 8}, {}, "causal clean stream"),
    "ar with masks": (dit, {"causal": True}, {"drafter": "masks"}, "table"),
    "another size": (dit, SAME, {"block_size": 4}, "leave `block_size` out"),
    "no masks": (
        dit, {"block_size": 1, "clean_stream": "causal"}, {"drafter": "masks"}, "block size 1",
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
              ["--drafts", "2", "--threshold", "0.5"],
              ["--sampler", "verified", "--block-size", "4"]]
)  # fmt: skip
def test_bad_input(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "starter", "The", *words])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1
