"""What goes wrong in one row ends that row; all others have the tokens they would have had."""

import numpy as np
import pytest
import torch

import blockdiff
from adapted.families import MASK, adapted, shifted_dit
from blockdiff import Engine, SamplingOptions
from blockdiff.errors import InputError, WrongAnswer
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.stopping import StoppingRule
from helpers import tiny_model

MODELS = {
    "block diffusion": lambda: tiny_model(vocab_size=17, length=24),
    "timed": lambda: tiny_model(vocab_size=17, length=24, time_conditioning=True),
    "one window": lambda: tiny_model(vocab_size=17, length=24, block_size=24),
    "ar": lambda: tiny_model(vocab_size=17, length=24, causal=True),
    "shift": shifted_dit,
    "llama": lambda: adapted("llama", clean="causal", prediction="shift"),
}
BAD = 13  # the number of rows whose part goes wrong


class Poison(blockdiff.Order):
    """As first_hitting, but at the third evaluation of a row numbered 13 or more it goes wrong."""

    name = "poison"

    def __init__(self, wrong):
        self.wrong = wrong

    def choose(self, logits, wanted, rows):
        first = wanted & (wanted.cumsum(1) == 1)
        logits *= 0.5  # nobody else sees this, nor does it itself where it is asked again
        chosen, tokens = torch.from_numpy(first[wanted]), rows.draw(logits, wanted)
        late = (rows.positions[:, :1] + rows.evaluations[:, None] > 8) & (rows.masked.sum(1) > 0)[
            :, None
        ]
        bad = (rows.numbers >= BAD) & late[:, 0]
        if bad.any():
            return self.wrong(
                chosen, tokens, torch.from_numpy(bad[wanted.nonzero()[0]]), logits, wanted, rows
            )
        return chosen, tokens


def raises(*given):
    raise ZeroDivisionError("in the order")


def nan_logits(chosen, tokens, bad, logits, wanted, rows):
    logits = torch.where(bad[:, None], torch.nan, logits)
    return chosen, rows.draw(logits, wanted)


WRONG = {
    "raises": raises,
    "draws from NaN": nan_logits,
    "gives NaN": lambda chosen, tokens, *rest: (chosen, tokens * torch.nan),
    "gives too few": lambda chosen, tokens, *rest: (chosen[:-1], tokens[:-1]),
    "gives ids there are not": lambda chosen, tokens, bad, *rest: (chosen, tokens + 99 * bad),
    "gives the mask token": lambda chosen, tokens, bad, *rest: (
        chosen, torch.where(bad, MASK, tokens)
    ),
    "gives nothing": lambda *rest: None,
}  # fmt: skip


class Rule(StoppingRule):
    name = "mine"

    def length(self, tokens, known, start, eos_token_id):
        if BAD in tokens[:start]:
            raise KeyError("in the rule")


class Automaton:
    """Everything is allowed, until something goes wrong."""

    finished = False

    def __init__(self, wrong):
        self.wrong, self.count = wrong, 0

    def copy(self):
        copy = Automaton(self.wrong)
        copy.count = self.count
        return copy

    def allowed(self):
        if self.wrong == "allowed" and self.count >= 3:
            raise OSError("in allowed")
        return np.ones(17, bool) & (self.wrong != "nothing" or self.count < 3)

    def advance(self, token):
        self.count += 1
        if self.wrong == "advance" and self.count >= 3:
            raise OSError("in advance")


class Constraint:
    def __init__(self, wrong):
        self.wrong = wrong

    def begin(self):
        return Automaton(self.wrong)


def processor(what):
    def call(ids, scores):
        if BAD in ids[:, 0].tolist() and ids.shape[1] > 6:
            if what == "raises":
                raise RuntimeError("in the processor")
            return scores * what if isinstance(what, float) else scores[:-1]
        return scores

    return call


NEW = {"max_new_tokens": 12, "stop": "none"}
# What a bad row asks for.
PARTS = {
    **{f"order {name}": {"sampler": Poison(wrong)} for name, wrong in WRONG.items()},
    "rule raises": {"stop": [Rule()]},
    **{
        f"constraint: {name}": {"constraint": Constraint(name)}
        for name in ("allowed", "advance", "nothing")
    },
    "processor raises": {"logits_processor": processor("raises")},
    "processor gives NaN": {"logits_processor": processor(float("nan"))},
    "processor gives infinity": {"logits_processor": processor(float("inf"))},
    "processor gives too few": {"logits_processor": processor("few")},
}


@pytest.fixture(scope="module")
def expected():
    """The tokens of the good rows of each model alone, for what they ask; made once."""
    known = {}

    def find(kind, model, prompt, options, number):
        key = kind, tuple(prompt), number, str(options.sampler), str(options.stop), options.seed
        if key not in known:
            known[key] = generate_tokens(model, [prompt], options, rows=[number]).tokens[0]
        return known[key]

    return find


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("part", list(PARTS))
def test_the_others_have_the_tokens_they_would_have_had(kind, part, expected):
    """Rows with the part, of which two go wrong, among rows without it; a row that comes later."""
    model = MODELS[kind]().eval()
    options = SamplingOptions(**NEW | PARTS[part])
    plain = SamplingOptions(**NEW, sampler="threshold", threshold=0.3)
    own = "order" in part or "rule" in part or "processor" in part
    rows = [
        ([1, 2, 3], plain, 0),
        *([([4, 5], options, 1), ([6], options, 2)] if own else []),
        ([BAD, 2], options, BAD),
        ([BAD, 2, 5], options, BAD + 1),
        ([7], SamplingOptions(**NEW), 3),
    ]
    engine = Engine(model, isolate=True)
    names = {engine.admit(*row): row for row in rows}
    found, failed = {}, {}
    while engine.active:
        step = engine.step()
        for name in [name for name in engine.failed if name in names]:
            failed[name] = engine.failed[name]
            engine.drop(name)
            if len(failed) == 1:
                late = ([8, 9], plain, 9)
                names[engine.admit(*late)] = late
        for place, (name, done) in enumerate(
            zip(step.rows.tolist(), step.done.tolist(), strict=True)
        ):
            if done and name not in failed and name not in found:
                start = len(names[name][0])
                found[name] = step.tokens[place, start : step.lengths[place]].tolist()
                engine.drop(name)
    bad = {name for name, (_, _, number) in names.items() if number >= BAD}
    assert set(failed) == bad and len(names) == len(rows) + 1
    assert set(found) == set(names) - bad and not len(engine.rows.state)
    for name, row in names.items():
        if name not in bad:
            assert found[name] == expected(kind, model, *row)
    for error in failed.values():
        if "raises" in part or "allowed" in part or "advance" in part:
            assert not isinstance(error, InputError) and "in " in str(error)
        elif "nothing" not in part:
            assert isinstance(error, WrongAnswer)
        else:
            assert isinstance(error, InputError)


def test_rows_of_one_order_alone(expected):
    """All rows share the order: those that did not go wrong are asked about once more."""
    model = MODELS["block diffusion"]().eval()
    options = SamplingOptions(**NEW, sampler=Poison(raises))
    engine = Engine(model, isolate=True)
    given = [([4, 5], options, 1), ([BAD, 2], options, BAD), ([6], options, 2)]
    names = {engine.admit(*row): row for row in given}
    while engine.active:
        step = engine.step()
    assert list(engine.failed) == [list(names)[1]]
    for place, (prompt, _, number) in ((0, given[0]), (2, given[2])):
        new = step.tokens[place, len(prompt) : step.lengths[place]].tolist()
        assert new == expected("block diffusion", model, prompt, options, number)


@pytest.mark.parametrize("kind", ["ar", "llama"])
@pytest.mark.parametrize("part", [name for name in PARTS if "order" not in name])
def test_of_rows_that_are_drafted(kind, part, expected):
    model = MODELS[kind]().eval()
    if kind == "llama":
        model.config.block_sizes = (1, 4)
    options = SamplingOptions(**NEW | PARTS[part], sampler="verified")
    plain = SamplingOptions(**NEW, sampler="verified")
    engine = Engine(model, isolate=True)
    given = [([1, 2, 3], plain, 0), ([BAD, 2], options, BAD), ([7], SamplingOptions(**NEW), 3)]
    names = {engine.admit(*row): row for row in given}
    while engine.active:
        step = engine.step()
    good, bad, other = names
    assert set(engine.failed) == {bad}
    for place, name in ((0, good), (2, other)):
        prompt = names[name][0]
        new = step.tokens[place, len(prompt) : step.lengths[place]].tolist()
        assert new == expected(kind, model, *names[name])


def test_a_network_whose_logits_are_no_numbers_for_one_text(monkeypatch):
    model = MODELS["block diffusion"]().eval()
    decode = model.decode

    def spoilt(x, positions, cache, at, **options):
        logits = decode(x, positions, cache, at, **options)
        row = at // x.shape[1]
        bad = (x == BAD).any(1)[row]
        return torch.where(bad[:, None], torch.nan, logits)

    monkeypatch.setattr(model, "decode", spoilt)
    for sampler in ("first_hitting", "threshold", "confidence", "entropy", "editing"):
        engine = Engine(model, isolate=True)
        options = SamplingOptions(**NEW, sampler=sampler, logit_bias={BAD: -float("inf")})
        names = [engine.admit(prompt, options) for prompt in ([1, 2], [BAD], [3])]
        while engine.active:
            step = engine.step()
        assert list(engine.failed) == [names[1]]
        assert isinstance(engine.failed[names[1]], WrongAnswer)
        alone = [
            generate_tokens(model, [p], options, [n]).tokens[0] for p, n in (([1, 2], 0), ([3], 2))
        ]
        found = [step.tokens[row, n : step.lengths[row]].tolist() for row, n in ((0, 2), (2, 1))]
        assert found == alone


def test_a_row_with_a_twin_fails_with_it():
    model = MODELS["block diffusion"]().eval()
    model.config.bos_token_id = 1
    options = SamplingOptions(**NEW, sampler=Poison(raises), cfg_scale=1.0)
    engine = Engine(model, isolate=True)
    names = [engine.admit([4, 5], options, number) for number in (1, BAD, 2)]
    while engine.active:
        step = engine.step()
    assert list(engine.failed) == [names[1]] and step.rows.tolist() == names
    for place, number in ((0, 1), (2, 2)):
        alone = generate_tokens(model, [[4, 5]], options, rows=[number]).tokens[0]
        assert step.tokens[place, 2 : step.lengths[place]].tolist() == alone
    for name in names:
        engine.drop(name)
    assert not len(engine.rows.state) and not engine.failed


def test_without_isolation_the_first_error_ends_all():
    model = MODELS["block diffusion"]()
    options = SamplingOptions(**NEW, sampler=Poison(raises))
    with pytest.raises(ZeroDivisionError):
        generate_tokens(model, [[1], [2]], options, rows=[1, BAD])


def test_an_order_without_end_ends_its_own_row(monkeypatch):
    monkeypatch.setattr("blockdiff.sampling.rows.PATIENCE", 30)

    class Idle(blockdiff.Order):
        name = "idle"

        def choose(self, logits, wanted, rows):
            return torch.zeros(len(logits), dtype=torch.bool), rows.draw(logits, wanted)

    model = tiny_model(vocab_size=9, num_hidden_layers=1).eval()
    engine = Engine(model, isolate=True)
    name = engine.admit([1], SamplingOptions(4, sampler=Idle(), stop="none"))
    engine.admit([2], SamplingOptions(4, stop="none"))
    while engine.active:
        engine.step()
    assert list(engine.failed) == [name] and "has not fixed a block" in str(engine.failed[name])


def test_nothing_is_kept_of_rows_that_left():
    """Options, tables and automata of hundreds of rows, of which some are always there."""
    model = MODELS["block diffusion"]().eval()
    engine, sizes = Engine(model, isolate=True), []
    wide = engine.admit([1], SamplingOptions(max_new_tokens=400, stop="none", logprobs=True))
    names = [engine.admit([1], SamplingOptions(max_new_tokens=6, stop="none"))]
    engine.step()
    engine.drop(wide)
    for number in range(60):
        options = SamplingOptions(
            max_new_tokens=6, stop="none", logit_bias={1: float(number)}, constraint=Constraint("")
        )
        names.append(engine.admit([1, 2], options))
        engine.step()
        engine.drop(names.pop(0))
        rows = engine.rows
        sizes.append((len(rows.groups), len(rows.guides), len(rows.automata), rows.canvas.shape))
        assert rows.logprobs is None and rows.u.shape[1] == 4
    assert set(sizes) == {(1, 1, 1, (1, 8))}
    assert engine.cache._places <= 4


def test_rows_that_came_after_the_last_one_that_was_drafted():
    """They are dropped as any other."""
    engine = Engine(MODELS["ar"]().eval())
    drafted = engine.admit([1], SamplingOptions(3, sampler="verified", stop="none"))
    while engine.active:
        engine.step()
    engine.drop(drafted)
    names = [engine.admit([1, 2], SamplingOptions(3, stop="none")) for _ in range(3)]
    while engine.active:
        engine.step()
    for name in reversed(names):
        engine.drop(name)
    assert not len(engine.rows.state) and not len(engine.cache.rows)
