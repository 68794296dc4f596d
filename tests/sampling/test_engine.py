"""Rows that come, go and differ: each is what it is alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import blockdiff
from blockdiff import Engine, SamplingOptions, registry
from blockdiff.errors import InputError
from blockdiff.sampling import recorded, stopping
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.orders import base, scheduled
from helpers import Operators, random_tokens, tiny_model

KINDS = {
    "bd3lm": {"block_size": 4},
    "timed": {"block_size": 4, "time_conditioning": True},
    "causal clean stream": {"block_size": 4, "clean_stream": "causal"},
    "mdlm": {"block_size": 12},
    "ar": {"causal": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))


def model_of(kind):
    return tiny_model(vocab_size=9, **KINDS[kind])


def prompts(*lengths):
    model = model_of("bd3lm")
    return [random_tokens(model, n, seed=n).tolist() for n in lengths]


def alone(model, prompt, options, number):
    done = generate_tokens(model, [prompt], options, rows=[number])
    return done.tokens[0], done.nfe[0]


def of(step, name, start):
    """(new tokens, nfe) of a row in a step."""
    (place,) = (step.rows == name).nonzero().flatten().tolist()
    return step.tokens[place, start : step.lengths[place]].tolist(), int(step.nfe[place])


VARIED = [
    SamplingOptions(max_new_tokens=9, stop="none", seed=3),
    SamplingOptions(max_new_tokens=22, stop="none", temperature=0.5, top_p=0.8, seed=4),
    SamplingOptions(max_new_tokens=5, stop="none", sampler="ancestral", steps=3, top_k=4),
    SamplingOptions(max_new_tokens=30, stop="none", sampler="threshold", seed=6),
    SamplingOptions(max_new_tokens=9, stop="none", seed=3),
]


@EVERY_KIND
@pytest.mark.parametrize("every", [0, 1, 3])
def test_rows_that_come_later_and_differ_are_what_they_are_alone(kind, every):
    """Admitted one after the other, `every` steps apart, with options, orders and lengths of their
    own; a finished row is dropped at once, an unfinished one in the middle."""
    model = model_of(kind).eval()
    given = list(zip(prompts(1, 7, 13, 4, 2), VARIED, range(10, 15), strict=True))
    engine, names, found, steps = Engine(model), {}, {}, 0
    waiting = list(given)
    leaves = engine.admit([1, 2, 3], SamplingOptions(max_new_tokens=40, stop="none"))
    while waiting or set(found) != set(names):
        while waiting and steps >= every * (len(given) - len(waiting)):
            prompt, options, number = waiting.pop(0)
            names[engine.admit(prompt, options, number)] = (prompt, options, number)
        step = engine.step()
        steps += 1
        for name in step.rows[step.done].tolist():
            found[name] = of(step, name, len(names[name][0]))
            engine.drop(name)
        if steps == 4:
            engine.drop(leaves)
        assert steps < 500
    assert not len(engine.rows.state) and not len(engine.cache.rows)
    for name, (prompt, options, number) in names.items():
        assert found[name] == alone(model, prompt, options, number)


def test_block_sizes_side_by_side():
    """Blocks of 1, 2, 4, 6 and 12 (a whole context) of one model, to three times its context."""
    model = model_of("bd3lm").eval()
    engine, names = Engine(model), []
    given = []
    for number, (size, prompt) in enumerate(
        zip((4, 1, 12, 2, 6, 3), prompts(5, 9, 3, 1, 14, 2), strict=True)
    ):
        options = SamplingOptions(max_new_tokens=31, stop="none", block_size=size, seed=number)
        given.append((prompt, options, number))
        names.append(engine.admit(*given[-1]))
    while engine.active:
        step = engine.step()
    for name, row in zip(names, given, strict=True):
        assert of(step, name, len(row[0])) == alone(model, *row)


@EVERY_KIND
def test_rows_dropped_before_the_cache_has_room_for_the_new(kind):
    """Three rows come after the first step, one of which takes the dropped row's place."""
    model, options = model_of(kind).eval(), VARIED[1]
    engine, given = Engine(model), prompts(7, 5, 6, 13)
    gone = engine.admit(given[0], options)
    engine.step()
    names = [engine.admit(prompt, options) for prompt in given[1:]]
    engine.drop(gone)
    while engine.active:
        step = engine.step()
    for number, (name, prompt) in enumerate(zip(names, given[1:], strict=True), start=1):
        assert of(step, name, len(prompt)) == alone(model, prompt, options, number)


@EVERY_KIND
def test_an_order_that_fixes_nothing_in_some_evaluations(kind):
    """It waits every other time, and fixes the same tokens with twice the evaluations."""

    class Hesitant(blockdiff.Order):
        name = "hesitant"

        def choose(self, logits, wanted, rows):
            first = (wanted.cumsum(1) == 1) & (rows.evaluations % 2 == 1)[:, None]
            return torch.from_numpy(first[wanted]), rows.draw(logits, wanted)

    class Steady(Hesitant):
        def choose(self, logits, wanted, rows):
            first = wanted.cumsum(1) == 1
            return torch.from_numpy(first[wanted]), rows.draw(logits, wanted)

    model, found = model_of(kind), []
    for order in (Hesitant(), Steady()):
        options = SamplingOptions(max_new_tokens=20, stop="none", sampler=order)
        found.append(generate_tokens(model, prompts(1, 7, 13), options))
    assert found[0].tokens == found[1].tokens
    new = [after - before for before, after in zip(found[1].nfe, found[0].nfe, strict=True)]
    assert new == [20] * 3


def test_a_seed_of_its_own_and_a_number():
    """Equal options and numbers give equal rows; another number or seed gives another."""
    engine = Engine(model_of("bd3lm").eval())
    one, other = (SamplingOptions(max_new_tokens=20, stop="none", seed=s) for s in (1, 2))
    names = [engine.admit([1, 2], o, n) for o, n in ((one, 7), (one, 7), (one, 8), (other, 7))]
    while engine.active:
        step = engine.step()
    first, same, number, seed = (of(step, name, 2)[0] for name in names)
    assert first == same and first != number and first != seed


@EVERY_KIND
@pytest.mark.parametrize("options", VARIED[:4:3], ids=["first_hitting", "threshold"])
def test_the_host_waits_once_an_evaluation(kind, options):
    """For the tokens, and for nothing else: no operator reads a value back or counts positions.

    `paper` looks at the text, which is on the host by then.
    """
    model = model_of(kind).eval()
    engine = Engine(model)
    for prompt in prompts(1, 7, 13, 4):
        engine.admit(prompt, dataclasses.replace(options, stop="paper", max_new_tokens=20))
    engine.step()
    evaluations = 0
    while engine.active:
        before = engine.waits
        with Operators() as seen:
            engine.step()
        assert seen.waits() == []
        assert engine.waits == before + 1
        evaluations += 1
    assert evaluations > 5


def test_the_analytic_order_waits_twice():
    """Once for what the network's scores unmask, once for the tokens."""
    model = tiny_model(vocab_size=9, block_size=12, time_conditioning=True, score=True).eval()
    engine = Engine(model)
    for prompt in prompts(1, 3):
        engine.admit(prompt, SamplingOptions(8, sampler="analytic", steps=5, stop="none"))
    while engine.active:
        before = engine.waits
        engine.step()
        assert engine.waits <= before + 2


@EVERY_KIND
def test_graphs_see_few_shapes_and_give_the_same(kind, monkeypatch):
    """A finished row stays as padding until half are; a cached block always has its columns."""
    model, shapes = model_of(kind).eval(), []
    given = [(p, VARIED[i % 2], i) for i, p in enumerate(prompts(1, 2, 3, 5, 6, 7, 9, 13))]
    expected = [alone(model, *row) for row in given]
    decode = model.decode

    def spy(x, *rest, **options):
        shapes.append(x.shape)
        return decode(x, *rest, **options)

    monkeypatch.setattr(recorded, "DEVICES", {"cpu"})
    monkeypatch.setattr(model, "decode", spy)
    engine = Engine(model)
    names = [engine.admit(*row) for row in given]
    while engine.active:
        step = engine.step()
    assert [of(step, name, len(row[0])) for name, row in zip(names, given, strict=True)] == expected
    assert len(set(shapes)) <= 4  # 8, 4, 2 rows, 1


def test_bad_rows():
    engine = Engine(model_of("bd3lm").eval())
    for prompt in ([], [8], [9], [-1]):
        with pytest.raises(InputError):
            engine.admit(prompt, SamplingOptions())
    for prompt in ([1.0], ["1"], "12", [[1]], 3, None, [True]):
        with pytest.raises(InputError, match="whole numbers"):
            engine.admit(prompt, SamplingOptions())
    for number in (-1, 2**80, 0.5, "a"):
        with pytest.raises(InputError, match="number"):
            engine.admit([1], SamplingOptions(), number)
    with pytest.raises(InputError, match="`options` is dict"):
        engine.admit([1], {"seed": 1})
    with pytest.raises(InputError, match="block size 5"):
        engine.admit([1], SamplingOptions(block_size=5))
    with pytest.raises(InputError, match="analytic"):
        engine.admit([1], SamplingOptions(sampler="analytic", steps=3))
    with pytest.raises(InputError, match="no row"):
        engine.step()
    with pytest.raises(InputError, match="no row 5"):
        engine.drop(5)
    assert not engine.active and not len(engine.rows.state)


def answers(**methods):
    """An order that answers as it should, but for the methods that are given."""

    class Mine(blockdiff.Order):
        name = "mine"

        def choose(self, logits, wanted, rows):
            return None, rows.draw(logits, wanted)

    for name, answer in methods.items():
        setattr(Mine, name, lambda self, *given, answer=answer: answer(*given))
    return Mine()


WRONG_ORDERS = {
    "wanted": [
        lambda rows: rows.masked & False,
        lambda rows: ~rows.masked,
        lambda rows: rows.masked[:, :0],
        lambda rows: rows.masked.astype(int),
        lambda rows: torch.from_numpy(rows.masked),
        lambda rows: None,
    ],
    "mask_rate": [
        lambda rows, wanted: rows.u[:, 0] + np.nan,
        lambda rows, wanted: rows.u,
        lambda rows, wanted: rows.u[:, 0] + 2,
    ],
    "choose": [
        lambda logits, wanted, rows: None,
        lambda logits, wanted, rows: logits.argmax(-1),
        lambda logits, wanted, rows: (None, logits.argmax(-1)[:-1]),
        lambda logits, wanted, rows: (None, logits.amax(-1)),
        lambda logits, wanted, rows: (None, logits.argmax(-1).numpy()),
        lambda logits, wanted, rows: (logits.argmax(-1), logits.argmax(-1)),
        lambda logits, wanted, rows: (torch.from_numpy(wanted), logits.argmax(-1)),
        lambda logits, wanted, rows: (None, logits.argmax(-1) + 9),
        lambda logits, wanted, rows: (None, logits.argmax(-1) - 9),
        lambda logits, wanted, rows: (None, logits.argmin(-1)),  # the mask token
        lambda logits, wanted, rows: (logits[:, 0] > 1e9, logits.argmax(-1)),
    ],
}


@pytest.mark.parametrize("kind", ["timed", "ar"])
@pytest.mark.parametrize("method", WRONG_ORDERS)
def test_an_order_that_answers_wrongly_is_one_line(kind, method):
    """Nothing hangs, and nothing is an error of numpy's or torch's."""
    for answer in WRONG_ORDERS[method]:
        options = SamplingOptions(8, sampler=answers(**{method: answer}), stop="none")
        with pytest.raises(InputError, match="order mine"):
            generate_tokens(model_of(kind), [[1, 2]], options)


@pytest.mark.parametrize("length", [99, 1, -1, 2.5, True, "3"])
def test_a_stopping_rule_that_answers_wrongly_is_one_line(monkeypatch, length):
    rule = stopping.StoppingRule()
    rule.name, rule.length = "mine", lambda *given: length
    monkeypatch.setitem(registry.STOPPING_RULES._objects, "mine", rule)
    with pytest.raises(InputError, match="stopping rule mine"):
        generate_tokens(model_of("bd3lm"), [[1, 2, 3]], SamplingOptions(8, stop="mine"))


def test_rows_that_differ_in_seed_and_length_are_asked_about_together():
    """One call of the order for all, and one wait for rows of several orders."""
    asked = []

    def choose(logits, wanted, rows):
        asked.append(len(wanted))
        return None, rows.draw(logits, wanted)

    model, order = model_of("bd3lm").eval(), answers(choose=choose)
    engine = Engine(model)
    for number in range(5):
        options = SamplingOptions(8 + number, sampler=order, seed=number, stop="none")
        engine.admit([1], options)
    engine.admit([1], SamplingOptions(8))
    engine.step()
    assert asked == [5] and engine.waits == 1


def test_an_order_from_outside():
    """As an object: nothing is registered. It fixes the last masked position first."""

    class Backwards(blockdiff.Order):
        name = "backwards"

        def choose(self, logits, wanted, rows):
            last = wanted & (np.flip(wanted, 1).cumsum(1) == 1)[:, ::-1]
            return torch.from_numpy(last[wanted]), rows.draw(logits, wanted)

    model = model_of("bd3lm")
    steps = list(
        blockdiff.stream(model, [[1, 2], [3]], sampler=Backwards(), max_new_tokens=6, stop="none")
    )
    places = [step.fixed[0].nonzero().flatten().tolist() for step in steps]
    assert [place for place in places if place] == [[3], [2], [7], [6], [5], [4]]


@pytest.mark.parametrize("sampler", ["first_hitting", "analytic", "threshold"])
def test_what_the_host_knows_is_moved_without_waiting(monkeypatch, sampler):
    """And never in float64, which MPS lacks: here a device that takes float32 only."""
    for room in (base, scheduled):
        monkeypatch.setattr(room, "real_dtype", lambda device: torch.float32)
    moved, waited = [], []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            done = func(*args, **(kwargs or {}))
            to_device = [x for x in args[1:] if isinstance(x, torch.device | torch.Tensor)]
            if func is torch.Tensor.to and to_device:
                moved.append(done.dtype)
                waited.extend([] if (kwargs or {}).get("non_blocking") else [args])
            elif func is torch.Tensor.new_tensor:  # a number of the host's
                waited.append(args)
            return done

    model = tiny_model(vocab_size=9, block_size=12, time_conditioning=True, score=True)
    engine = Engine(model.eval())
    steps = 5 if sampler == "analytic" else None
    for seed, prompt in enumerate(prompts(1, 3)):
        engine.admit(prompt, SamplingOptions(8, sampler=sampler, steps=steps, seed=seed))
    with Moves():
        while engine.active:
            engine.step()
    assert torch.float32 in moved and torch.float64 not in moved and not waited
