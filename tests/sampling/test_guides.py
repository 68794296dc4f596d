"""What changes the logits before an order sees them, against definitions computed by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

import blockdiff
from blockdiff import Engine, Order, SamplingOptions
from blockdiff.categorical import host_uniform
from blockdiff.errors import InputError
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from blockdiff.sampling.guides import RowGuides
from blockdiff.sampling.orders.base import ORDER, TOKEN
from helpers import tiny_model
from sampling.test_confidence import by_hand
from sampling.test_orders_whole import GIVEN, MASK, WINDOW, model_of

NO_EDITING = {name: given for name, given in GIVEN.items() if "editing" not in name}
AR = {"vocab_size": 9, "causal": True, "length": 24}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 0, 1], [2]]


class Spy(Order):
    """From left to right, greedily; keeps the logits it is shown."""

    name = "spy"

    def __init__(self):
        self.seen = []

    def choose(self, logits, wanted, rows):
        self.seen.append((logits.clone(), wanted, rows.positions))
        first = wanted & (wanted.cumsum(1) == 1)
        return torch.from_numpy(first[wanted]), logits.argmax(-1)


def shown(model, prompt, **options):
    """The logits of the first evaluation of a block [P, V], and the text."""
    spy = Spy()
    done = generate_tokens(model, [prompt], SamplingOptions(sampler=spy, stop="none", **options))
    return spy.seen, prompt + done.tokens[0]


@pytest.mark.parametrize("kind", ["block", "mdlm"])
def test_logit_bias_is_added_and_bans(kind):
    model, _, _ = model_of(kind)
    bias = {3: 2.5, 5: -math.inf, MASK: 100.0}
    (plain, *_), _ = shown(model, [1, 2], max_new_tokens=5)
    (biased, *_), _ = shown(model, [1, 2], max_new_tokens=5, logit_bias=bias)
    expected = plain[0].clone()
    expected[:, 3] += 2.5
    expected[:, 5] = -math.inf
    assert torch.equal(biased[0], expected), "the mask token stays where it is"
    banned = {"logit_bias": ["5=-inf", "0=-inf"], "max_new_tokens": 20, "stop": "none"}
    done = generate_tokens(model, [[1]] * 5, SamplingOptions(threshold=0.2, **banned))
    assert not {0, 5} & {token for row in done.tokens for token in row}


def test_the_repetition_penalty_counts_prompt_and_all_that_is_fixed():
    model, _, _ = model_of("block")
    plain, _ = shown(model, [1, 2, 1], max_new_tokens=6)
    found, _ = shown(model, [1, 2, 1], max_new_tokens=6, repetition_penalty=1.7)
    (before, *_), (after, *_) = plain[0], found[0]
    expected = before.clone()
    for token in (1, 2):
        z = before[:, token]
        expected[:, token] = torch.where(z > 0, z / 1.7, z * 1.7)
    assert torch.equal(after, expected)

    class Last(Spy):  # from right to left: what is fixed behind a position counts as well
        name = "last"

        def choose(self, logits, wanted, rows):
            super().choose(logits, wanted, rows)
            last = wanted & (wanted[:, ::-1].cumsum(1)[:, ::-1] == 1)
            return torch.from_numpy(last[wanted]), torch.full((len(logits),), 6)

    looks = []
    for penalty in (1.0, 1.7):
        spy = Last()
        options = {"sampler": spy, "stop": "none", "max_new_tokens": 3}
        generate_tokens(model, [[1]], SamplingOptions(repetition_penalty=penalty, **options))
        looks.append(spy.seen[1][0])  # one token, 6, stands at the block's end
    z = looks[0][:, 6]
    assert torch.equal(looks[1][:, 6], torch.where(z > 0, z / 1.7, z * 1.7))
    assert torch.equal(looks[1][:, [0, 2, 3, 4, 5, 7]], looks[0][:, [0, 2, 3, 4, 5, 7]])


def slow_ar(model, prompt, new, processor):
    """Greedy, by a pass over the whole text for each token."""
    text = list(prompt)
    for _ in range(new):
        x = torch.tensor([text])
        with torch.no_grad():
            logits = model(x).logits[:, -1].float()
        logits[:, MASK] = -math.inf
        text.append(int(processor(x, logits).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "processor",
    [
        NoRepeatNGramLogitsProcessor(2),
        RepetitionPenaltyLogitsProcessor(3.0),
        SuppressTokensLogitsProcessor([2, 4, 7]),
        LogitsProcessorList([NoRepeatNGramLogitsProcessor(2), SuppressTokensLogitsProcessor([7])]),
        lambda ids, scores: scores + torch.nn.functional.one_hot(ids[:, -1], 9) * 3.0,
    ],
    ids=["no_repeat_ngram", "repetition", "suppress", "list", "callable"],
)
def test_transformers_processors_in_an_ar_model(processor):
    model = tiny_model(**AR).eval()
    options = SamplingOptions(
        temperature=0.0, max_new_tokens=5, stop="none", logits_processor=processor
    )
    done = generate_tokens(model, PROMPTS, options)
    assert done.tokens == [slow_ar(model, prompt, 5, processor) for prompt in PROMPTS]
    plain = generate_tokens(model, PROMPTS, SamplingOptions(temperature=0.0, max_new_tokens=5,
                                                            stop="none"))  # fmt: skip
    assert done.tokens != plain.tokens, "it changes something"
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        own = SamplingOptions(temperature=0.0, max_new_tokens=5, stop="none", repetition_penalty=3)
        assert generate_tokens(model, PROMPTS, own).tokens == done.tokens


@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
@pytest.mark.parametrize("kind", ["causal shift", "mdlm"])
def test_a_processor_knows_all_tokens_before_a_position(kind, given):
    """Whatever the order, and no others; so what it asks for holds of the text."""
    model, _, _ = model_of(kind)
    told = set()

    def note(ids, scores):
        assert ids.ndim == 2 and ids.shape[0] == scores.shape[0]
        told.update(map(tuple, ids.tolist()))
        return NoRepeatNGramLogitsProcessor(2)(ids, scores)

    options = SamplingOptions(max_new_tokens=11, stop="none", logits_processor=note, **given)
    done = generate_tokens(model, PROMPTS, options)
    texts = [prompt + new for prompt, new in zip(PROMPTS, done.tokens, strict=True)]
    assert all(len(new) == 11 for new in done.tokens)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        pairs = list(pairwise(text))[len(prompt) - 1 :]
        assert len(set(pairs)) == len(pairs), text
        begun = {tuple(text[:end]) for end in range(len(prompt), len(text))}
        assert begun <= told
    assert all(any(text[: len(ids)] == list(ids) for text in texts) for ids in told if
               len(ids) < 12), "every context is a beginning of a text"  # fmt: skip


def test_a_processor_that_reads_scores_alone_leaves_the_order_as_it_is():
    model, _, _ = model_of("block")
    calls = []

    class Cold:
        reads_context = False

        def __call__(self, ids, scores):
            calls.append(len(scores))
            return scores * 1.0

    wish = {"max_new_tokens": 12, "stop": "none", "seed": 3}
    for given in ({}, {"threshold": 0.25}, {"sampler": "confidence", "tokens_per_step": 2}):
        plain = list(stream_tokens(model, PROMPTS, SamplingOptions(**wish, **given)))
        done = list(
            stream_tokens(model, PROMPTS, SamplingOptions(logits_processor=Cold(), **wish, **given))
        )
        for one, other in zip(plain, done, strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.fixed, other.fixed)
    assert max(calls) > len(PROMPTS), "several positions at once"
    assert not blockdiff.sampling.guides.Guides.of(
        SamplingOptions(logits_processor=SuppressTokensLogitsProcessor([1]))
    ).in_order


def slow_in_order(kind, prompt, new, options, number, processor):
    """New tokens where positions are decided from left to right, one at a time."""
    _, logits_of, shift = model_of(kind)
    size, end, seed = WINDOW if kind == "mdlm" else 4, len(prompt) + new, options.seed
    text, evaluations = list(prompt), 0
    while len(text) < end:
        start = len(text) // size * size
        wanted = end - start if kind == "mdlm" else size
        block = text[start:] + [MASK] * (start + size - len(text))
        fresh = list(range(len(text) - start, wanted))
        place = start + np.arange(size)
        order = host_uniform(seed, number, place, ORDER)
        ordered = [i for i in fresh if i or not shift]
        order[ordered] = np.sort(order[ordered])[::-1]
        order = order.tolist()
        u = host_uniform(seed, number, place, TOKEN).tolist()
        planned = len(fresh) if kind == "mdlm" else size - shift
        step = 0
        while MASK in [block[i] for i in fresh]:
            masked = [i for i in fresh if block[i] == MASK]
            alone = shift and masked[0] == 0
            raw = logits_of(text[:start], block)
            raw[:, MASK] = -math.inf
            p, drawn, asked = [[]] * size, [0] * size, [False] * size
            if alone:
                masked = masked[:1]
            for i in masked:
                logits = processor(torch.tensor([text[:start] + block[:i]]), raw[i : i + 1])[0]
                logits[MASK] = -math.inf
                p[i] = logits.double().softmax(-1).tolist()
                below = (logits.double() / options.temperature).softmax(-1).cumsum(-1).tolist()
                drawn[i], asked[i] = sum(x <= u[i] for x in below), True
                p_now = [row or [1.0] * 9 for row in p]
                fixed = by_hand(options, p_now, drawn, asked, order, step, planned)
                if not all(fixed[j] for j in range(size) if asked[j]):
                    break
                block[i] = drawn[i]
            evaluations, step = evaluations + 1, step + (not alone)
            if start + next((i for i in fresh if block[i] == MASK), size) >= end:
                break
        text = text[:start] + block
    return text[len(prompt) : end], evaluations


@pytest.mark.parametrize("given", NO_EDITING.values(), ids=list(NO_EDITING))
@pytest.mark.parametrize("kind", ["block", "causal shift", "mdlm"])
def test_orders_from_left_to_right_against_a_slow_sampler(kind, given):
    model, _, _ = model_of(kind)
    spread = lambda ids, scores: scores * (1.5 + (ids[:, -1:] % 3))  # noqa: E731
    options = SamplingOptions(
        max_new_tokens=7, stop="none", seed=5, temperature=0.8, logits_processor=spread, **given
    )
    done = generate_tokens(model, PROMPTS, options)
    for row, prompt in enumerate(PROMPTS):
        tokens, evaluations = slow_in_order(kind, prompt, 7, options, row, spread)
        assert done.tokens[row] == tokens
        alone = generate_tokens(model, [prompt], options, [row])
        assert alone.tokens == [tokens] and alone.nfe == done.nfe[row : row + 1]
        assert alone.nfe[0] - evaluations in (0, 1), "but for the prompt's"


@pytest.mark.parametrize("kind", ["block", "causal shift", "mdlm"])
def test_ancestral_keeps_its_shares(kind):
    """In order, as many tokens come in each step as come without."""
    model, _, _ = model_of(kind)
    wish = {"sampler": "ancestral", "steps": 2, "max_new_tokens": 8, "stop": "none", "seed": 4}
    counts = []
    for processor in (None, NoRepeatNGramLogitsProcessor(9)):
        steps = stream_tokens(
            model, [[1, 2, 3, 4]], SamplingOptions(logits_processor=processor, **wish)
        )
        counts.append([int(step.fixed.sum()) for step in steps])
    assert counts[0] == counts[1] and max(counts[0]) > 1


# rows side by side

MIXED = [
    {"logit_bias": {1: 3.0}},
    {"repetition_penalty": 1.5, "threshold": 0.3},
    {"logits_processor": NoRepeatNGramLogitsProcessor(2), "threshold": 0.2},
    {"cfg_scale": 1.5},
    {"cfg_scale": 0.7, "logits_processor": NoRepeatNGramLogitsProcessor(2), "sampler": "margin"},
    {"cfg_scale": 1.0, "edit_threshold": 0.3, "threshold": 0.2},
    {"sub_block": 2, "logits_processor": NoRepeatNGramLogitsProcessor(2), "cfg_scale": 0.5},
    {},
    {"threshold": 0.25},
]


@pytest.mark.parametrize("kind", ["block", "causal shift", "mdlm", "causal"])
def test_rows_alone_and_beside_others_are_the_same(kind, monkeypatch):
    """Rows of every guide in one engine, some of them later, one dropped on the way."""
    model, _, _ = model_of(kind)
    monkeypatch.setattr(model.config, "bos_token_id", 0)
    engine, names = Engine(model.eval()), {}
    given = [SamplingOptions(max_new_tokens=9, stop="none", logprobs=True, **m) for m in MIXED]
    gone = engine.admit([3, 3], SamplingOptions(max_new_tokens=9, stop="none", cfg_scale=2.0))
    for number, options in enumerate(given[:4]):
        names[number] = engine.admit(PROMPTS[number % 3], options, number)
    for _ in range(3):
        engine.step()
    engine.drop(gone)
    for number, options in enumerate(given[4:], 4):
        names[number] = engine.admit(PROMPTS[number % 3], options, number)
    last = {}
    while engine.active:
        step = engine.step()
        assert step.rows.tolist() == [*names.values()], "no twin is seen"
        last = step
    for place, number in enumerate(names):
        prompt, options = PROMPTS[number % 3], given[number]
        *_, alone = stream_tokens(model, [prompt], options, [number])
        start, end = len(prompt), len(prompt) + 9
        assert last.tokens[place, :end].tolist() == alone.tokens[0, :end].tolist()
        assert alone.nfe.shape == (1,)
        ours, theirs = last.logprobs[place, start:end], alone.logprobs[0, start:end]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for name in names.values():
        engine.drop(name)
    assert not len(engine.rows.state) and not len(engine.cache.rows)


def test_rows_without_guides_are_evaluated_and_chosen_as_ever(monkeypatch):
    """Beside guided ones too: nothing of what guides is called for them."""
    model, _, _ = model_of("block")
    calls = []
    real = blockdiff.sampling.orders.base.guided

    def note(guides, logits, texts, *rest):
        calls.append(len(logits))
        return real(guides, logits, texts, *rest)

    monkeypatch.setattr(blockdiff.sampling.orders.base, "guided", note)
    generate_tokens(model, PROMPTS, SamplingOptions(max_new_tokens=6, cfg_scale=0.0,
                                                    repetition_penalty=1.0))  # fmt: skip
    assert not calls and len(Engine(model).rows.automata) == 0
    engine = Engine(model.eval())
    engine.admit_all(PROMPTS, SamplingOptions(max_new_tokens=6, stop="none"))
    engine.admit([1], SamplingOptions(max_new_tokens=6, stop="none", logit_bias={1: 1.0}))
    while engine.active:
        engine.step()
    assert calls and set(calls) == {1}


# classifier-free guidance


def unconditional(kind, prompt, text):
    """(prefix, block before it is masked) of the text without its prompt, by definition."""
    if kind == "mdlm":
        return prompt[:1] + [MASK] * (len(prompt) - 1) + text  # training never masks the first
    size = 1 if kind == "ar" else 4
    return [0] * ((len(prompt) - 1) % size + 1) + text


@pytest.mark.parametrize("scale", [0.6, 2.0])
@pytest.mark.parametrize("kind", ["ar", "block", "causal", "mdlm"])
def test_guidance_by_the_text_without_its_prompt(kind, scale):
    """Greedily, from left to right, a dense pass for each token and each of the two rows."""
    settings = {
        "ar": {"causal": True},
        "block": {"block_size": 4},
        "causal": {"block_size": 4, "clean_stream": "causal"},
        "mdlm": {"block_size": 16, "length": 16},
    }[kind]
    model = tiny_model(vocab_size=9, bos_token_id=0, **({"length": 24} | settings))

    def logits_of(text, end):
        """Of the first masked position."""
        at = len(text)
        with torch.no_grad():
            if kind == "ar":
                return model(torch.tensor([text])).logits[0, -1].double()
            if kind == "mdlm":
                x = torch.tensor([text + [MASK] * (16 - len(text))])
                return model(x).logits[0, at].double()
            start = at // 4 * 4
            x = torch.tensor([text + [MASK] * (start + 4 - at)])
            return model(x, x_0=x, backend="dense").logits[0, at].double()

    prompt, new = [1, 2, 3, 4, 5, 6], []
    for _ in range(7):
        cond = logits_of(prompt + new, 13)
        un = logits_of(unconditional(kind, prompt, new), 13)
        mixed = un + (scale + 1) * (cond - un)
        for logits in (cond, mixed):
            logits[MASK] = -math.inf
        new.append(int(mixed.argmax()))
    wish = {"sampler": Spy(), "max_new_tokens": 7, "stop": "none", "temperature": 0.0}
    done = generate_tokens(model, [prompt], SamplingOptions(cfg_scale=scale, **wish))
    assert done.tokens == [new]
    off = generate_tokens(model, [prompt], SamplingOptions(**wish))
    assert done.nfe == off.nfe, "one evaluation of two rows"
    zero = generate_tokens(model, [prompt], SamplingOptions(cfg_scale=0.0, **wish))
    assert zero.tokens == off.tokens and zero.nfe == off.nfe


def test_guidance_off_has_no_twin():
    model = tiny_model(vocab_size=9, bos_token_id=0)
    engine = Engine(model)
    engine.admit([1, 2], SamplingOptions(cfg_scale=0.0, max_new_tokens=4))
    assert len(engine.rows.state) == 1
    engine.admit([1, 2], SamplingOptions(cfg_scale=1.0, max_new_tokens=4))
    assert len(engine.rows.state) == 3 and len(engine.cache.rows) == 3
    with pytest.raises(InputError, match="no row -2"):
        engine.drop(-2)


# what cannot be


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"logit_bias": {9: 1.0}}, "`logit_bias` names the token 9; the model has 9"),
        ({"logit_bias": dict.fromkeys(range(8), -math.inf)}, "bans every token"),
        ({"logit_bias": {1: math.inf}}, "must be a number below 1e30, or -inf"),
        ({"logit_bias": {1: math.nan}}, "must be a number below 1e30, or -inf"),
        ({"logit_bias": "3"}, "is no id with a number"),
        ({"logit_bias": {-1: 2.0}}, "`logit_bias` is -1"),
        ({"repetition_penalty": 0}, "`repetition_penalty` is 0"),
        ({"cfg_scale": -0.5}, "`cfg_scale` is -0.5"),
        ({"cfg_scale": 1.0}, "needs a token that begins a text"),
        ({"logits_processor": 3}, "`logits_processor` 3 cannot be called"),
        ({"logits_processor": lambda ids, scores: scores[:, :3]}, "must give scores for"),
        ({"stop_strings": []}, "`stop_strings` is empty"),
        ({"stop_strings": ["a", ""]}, "`stop_strings` holds an empty text"),
        ({"stop_strings": ["a"]}, "`stop_strings` needs a tokenizer"),
        ({"regex": "a"}, "`regex` needs a tokenizer"),
        ({"constraint": "a"}, "`constraint` has no `begin`"),
        ({"regex": "a", "choices": ["b"]}, "`regex` and `choices` exclude each other"),
    ],
)
def test_what_cannot_guide_is_refused_in_one_line(wish, words):
    model = tiny_model(vocab_size=9, eos_token_id=None, bos_token_id=None)
    with pytest.raises(InputError, match=words) as error:
        generate_tokens(model, [[1, 2]], SamplingOptions(max_new_tokens=4, **wish))
    assert "\n" not in str(error.value)


def test_sedd_has_no_logits_to_guide_by():
    model = tiny_model(vocab_size=9, block_size=12, score=True, time_conditioning=True)
    with pytest.raises(InputError, match="SEDD gives scores"):
        generate_tokens(model, [[1]], SamplingOptions(cfg_scale=1.0, max_new_tokens=4))


# drafted tokens


def test_logits_along_drafts_are_those_of_each_beginning():
    """What a verifying order asks for: position by position, whatever the drafts."""
    options = SamplingOptions(
        logit_bias={2: 1.0}, repetition_penalty=1.4,
        logits_processor=NoRepeatNGramLogitsProcessor(2),
    )  # fmt: skip
    guides = blockdiff.sampling.guides.Guides.of(options).guides
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits[:, MASK] = -math.inf
    text, drafts = np.array([1, 2, 3, 1]), [2, 5, 2]
    found = RowGuides(guides, text).along(logits, drafts)
    for i in range(4):
        own = [*text.tolist(), *drafts[:i]]
        z = logits[i : i + 1].clone()
        z[:, 2] += 1
        for token in set(own):
            z[:, token] = z[:, token] / 1.4 if z[0, token] > 0 else z[:, token] * 1.4
        z = NoRepeatNGramLogitsProcessor(2)(torch.tensor([own]), z)
        torch.testing.assert_close(found[i : i + 1], z)


# with a tokenizer


def test_stop_strings_and_words_of_transformers():
    model, tokenizer = blockdiff.load("starter", device="cpu")
    wish = {"max_new_tokens": 40, "tokenizer": tokenizer}
    done = blockdiff.generate(model, "The", stop_strings=["of ", "the"], samples=4, **wish)
    assert set(done.finish) == {"stop"}
    for text, tokens in zip(done.texts, done.tokens, strict=True):
        before = tokenizer.decode(tokens[:-1])
        assert any(stop in text for stop in ("of ", "the"))
        assert not any(stop in before for stop in ("of ", "the")), "at the first"
    ids = torch.tensor([tokenizer.encode("The people of the")])
    own = {"max_new_tokens": 12, "do_sample": False, "seed": 1}

    def written(**given):
        return model.generate(ids, **own, **given)[0, ids.shape[1] :].tolist()

    def ours(**given):
        return blockdiff.generate(
            model, [ids[0].tolist()], max_new_tokens=12, temperature=0.0, seed=1, **given
        ).tokens[0]

    plain = ours()
    assert written(repetition_penalty=1.5) == ours(repetition_penalty=1.5) != plain
    assert written(guidance_scale=2.5) == ours(cfg_scale=1.5) != plain
    assert written(guidance_scale=1.0) == plain == written(logits_processor=LogitsProcessorList())
    banned = plain[0]
    assert written(suppress_tokens=[banned])[0] != banned
    assert written(suppress_tokens=[banned]) == ours(logit_bias={banned: -math.inf})
    assert written(bad_words_ids=[[banned]]) == written(
        logits_processor=LogitsProcessorList(
            [lambda ids, z: z.index_fill(1, torch.tensor([banned]), -math.inf)]
        )
    )
    pairs = written(no_repeat_ngram_size=1)
    assert len(set(pairs)) == len(pairs)
    assert pairs == ours(logits_processor=NoRepeatNGramLogitsProcessor(1))
    biased = written(sequence_bias=[[[banned], -50.0]], repetition_penalty=1.5)
    assert biased[0] != banned
    least = MinNewTokensLengthLogitsProcessor(ids.shape[1], 12, [plain[1]])
    assert written(min_new_tokens=12, eos_token_id=plain[1]) == ours(
        logits_processor=least, stop="none"
    )
    allowed = tokenizer.encode(" the of and")
    assert set(written(prefix_allowed_tokens_fn=lambda row, ids: allowed)) <= set(allowed)
    for wish, words in (
        ({"guidance_scale": 0.5}, "`guidance_scale` is 0.5"),
        ({"guidance_scale": 2.0, "cfg_scale": 1.0}, "both given"),
        ({"stop_strings": "x"}, "needs the model's tokenizer"),
    ):
        with pytest.raises(InputError, match=words):
            written(**wish)
    with pytest.raises(InputError, match="one prompt"):
        model.generate(ids, num_return_sequences=2, prefix_allowed_tokens_fn=lambda r, i: allowed)
