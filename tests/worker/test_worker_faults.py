"""What goes wrong under load: an evaluation, an order, memory; and rows that come and go."""

import random
import threading
import time

import pytest
import torch

import blockdiff
from blockdiff import SamplingOptions, plugins, registry
from blockdiff.errors import InputError, WrongAnswer
from blockdiff.serving.room import Room, need_of
from blockdiff.serving.worker import Draining, Failed, Finished, Interrupted, Job, Progress
from helpers import tiny_model
from worker.listening import FAST, LONG, PLAIN, Heard, alone, replayed

PLUGIN = """
import torch, blockdiff
from blockdiff.registry import register_order

class Poisoned(blockdiff.Order):
    name = "poisoned_{wrong}"
    def choose(self, logits, wanted, rows):
        first = wanted & (wanted.cumsum(1) == 1)
        if (rows.evaluations >= 2).any():
            {wrong}
        return torch.from_numpy(first[wanted]), rows.draw(logits, wanted)

register_order(Poisoned())
"""
WRONG = {"raises": "raise RuntimeError('poison')", "nan": "logits = logits * torch.nan"}
NEW = {"max_new_tokens": 12, "stop": "none"}


@pytest.fixture
def poisoned(tmp_path):
    """The names of orders of a plugin that go wrong at the third evaluation of a block."""
    known = set(registry.ORDERS._objects)
    for name, wrong in WRONG.items():
        file = tmp_path / f"{name}.py"
        file.write_text(PLUGIN.replace("{wrong}", name, 1).replace("{wrong}", wrong))
        plugins.load_plugin(str(file))
    yield {name: f"poisoned_{name}" for name in WRONG}
    for name in registry.ORDERS._objects.keys() - known - registry.ORDERS._modules.keys():
        del registry.ORDERS._objects[name]  # the package's own may have been imported since
    plugins._loaded.clear()


def test_a_plugin_s_order_that_goes_wrong_at_its_third_step(working, poisoned, caplog):
    """Ends its own rows; those that run and come beside it have the tokens they have alone."""
    worker, heard = working(), Heard()
    good = [Job([1, 2, 3], PLAIN, 0), Job([5], FAST, 1), Job([1], PLAIN, 2)]
    bad = [Job([2, 3], SamplingOptions(**NEW, sampler=name), 4) for name in poisoned.values()]
    tickets = [
        worker.submit([job], heard)[0] for job in (good[0], bad[0], good[1], bad[1], good[2])
    ]
    for ticket in tickets:
        end = heard.end(ticket)
        if ticket.job in good:
            assert end.tokens == alone(worker.model, ticket.job).tokens[0]
        else:
            kind = WrongAnswer if "nan" in ticket.job.options.sampler else RuntimeError
            assert type(end.error) is kind and ticket.state == "failed"
            assert len(heard.events[ticket.id]) == 5  # a block of two, and two steps of the next
    stats = worker.stats()
    assert (stats.finished, stats.failed, stats.restarted, stats.rows) == (3, 2, 0, 0)


def fails_when(model, monkeypatch, wrong):
    """The network raises where `wrong(tokens [n, T])` says so; returns how often it did."""
    times = []
    for name in ("encode", "decode"):
        real = getattr(model, name)

        def call(x, *rest, _real=real, **options):
            if wrong(x):
                times.append(len(x))
                raise RuntimeError("out of memory")
            return _real(x, *rest, **options)

        monkeypatch.setattr(model, name, call)
    return times


def test_memory_that_holds_fewer_rows_than_thought(working, monkeypatch, caplog):
    """Rows begin again, fewer at a time; nobody is told anything twice, or anything else."""
    model = tiny_model(vocab_size=9)
    jobs = [Job([1, 2, 3, 4, 5], PLAIN, 0), *(Job([n], FAST, n) for n in range(1, 7))]
    expected = [alone(model, job).tokens[0] for job in jobs]
    times = fails_when(model, monkeypatch, lambda x: len(x) > 2)
    worker, heard = working(model), Heard()
    first = worker.submit(jobs[:2], heard)
    heard.wait(first[0], lambda events: len(events) > 3)
    tickets = first + worker.submit(jobs[2:], heard)
    for ticket, tokens in zip(tickets, expected, strict=True):
        assert heard.end(ticket).tokens == tokens
        steps = heard.events[ticket.id][:-1]
        assert replayed(steps, len(tokens))[0] == tokens  # every position once
        nfe = [step.nfe for step in steps]
        assert nfe == sorted(set(nfe))
    assert times and worker.stats().restarted >= 7 and worker.stats().failed == 0


def test_a_row_with_which_no_evaluation_succeeds(working, monkeypatch, caplog):
    model = tiny_model(vocab_size=9)
    jobs = [Job([n], PLAIN, n) for n in range(5)]
    expected = [alone(model, job).tokens[0] for job in jobs]
    fails_when(model, monkeypatch, lambda x: bool((x == 7).any()))
    # Tokens that are written are no 7: the prompt alone is to blame.
    options = SamplingOptions(max_new_tokens=20, stop="none", seed=3, logit_bias={7: -float("inf")})
    jobs = [Job([n], options, n) for n in range(5)]
    expected = [alone(model, job).tokens[0] for job in jobs]
    worker, heard = working(model), Heard()
    tickets = worker.submit(jobs, heard)
    (bad,) = worker.submit([Job([3, 7], options, 9)], heard)
    assert "out of memory" in str(heard.end(bad).error)
    for ticket, tokens in zip(tickets, expected, strict=True):
        assert heard.end(ticket).tokens == tokens
    (after,) = worker.submit([jobs[0]], heard)
    assert heard.end(after).tokens == expected[0] and worker.stats().failed == 1


def test_what_was_told_in_bf16_is_not_begun_again(working, monkeypatch, caplog):
    model = tiny_model(vocab_size=9).to(torch.bfloat16)
    rows = [2]
    fails_when(model, monkeypatch, lambda x: len(x) > rows[0])
    worker, heard = working(model), Heard()
    (told,) = worker.submit([Job([1], LONG)], heard)
    heard.until(told, Progress)
    others = worker.submit([Job([2], PLAIN, n) for n in range(2)], heard)
    assert isinstance(heard.end(told).error, Interrupted)
    assert all(isinstance(heard.end(one), Finished) for one in others)


@pytest.mark.parametrize("kind", ["block", "causal", "window"])
def test_a_job_gives_the_same_tokens_whatever_else_runs(working, kind):
    """Random arrivals, cancels, orders, lengths, plugins; each against itself alone."""
    settings = {"block": {}, "causal": {"clean_stream": "causal"}, "window": {"block_size": 12}}
    model = tiny_model(vocab_size=9, **settings[kind])
    draw = random.Random(kind)
    orders = [
        {}, {"sampler": "threshold", "threshold": 0.3}, {"temperature": 0.5, "top_p": 0.8},
        {"sampler": "confidence", "tokens_per_step": 2}, {"sampler": "editing"},
        {"sampler": "ancestral", "steps": 3}, {"cfg_scale": 0.7}, {"repetition_penalty": 1.5},
        {"logprobs": True}, {"logit_bias": {2: -1e9}},
    ]  # fmt: skip
    model.config.bos_token_id = 0
    worker, heard = working(model, rows=6), Heard()
    shared = [draw.randrange(8) for _ in range(30)]
    tickets, gone = [], []
    for number in range(45):
        prompt = [*shared[: draw.choice([1, 5, 9, 16])], draw.randrange(8)]
        options = SamplingOptions(
            max_new_tokens=draw.choice([3, 9, 26]), seed=draw.randrange(3), stop="none",
            **draw.choice(orders),
        )  # fmt: skip
        job = Job(prompt, options, number, progress=draw.random() < 0.5)
        tickets += worker.submit([job], heard)
        if draw.random() < 0.3:
            gone.append(draw.choice(tickets))
            worker.cancel(gone[-1])
        time.sleep(draw.random() * 0.01)
    known = {}
    for ticket in tickets:
        if ticket.state == "cancelled":
            assert ticket in gone
            continue
        end = heard.end(ticket)
        assert end.tokens == alone(model, ticket.job).tokens[0]
        known[ticket.id] = end.cached_tokens
    assert len(known) > 30 and (kind == "window" or sum(known.values()) > 50)
    stats = worker.stats()
    assert stats.cached_tokens >= sum(known.values()) and stats.rows == stats.queued == 0


def test_rows_that_come_and_go_leave_nothing(working):
    """Hundreds of short texts of many kinds, while a long one runs."""
    worker, heard = working(rows=8, memory=2**20), Heard()
    (stays,) = worker.submit([Job([1], LONG, progress=False)], heard)

    def sizes():
        engine = worker._engine
        stacks = sum(x.nbytes for pair in engine.cache._stacks.values() for x in pair)
        return len(engine.rows.groups), engine.rows.canvas.nbytes, stacks, len(worker._running)

    found = []
    for number in range(150):
        options = SamplingOptions(
            max_new_tokens=1 + number % 5, seed=number, stop="none", logit_bias={1: number / 100},
            logprobs=number % 3 == 0,
        )  # fmt: skip
        tickets = worker.submit(
            [Job([number % 8] * (1 + number % 9), options, 0, False)] * 2, heard
        )
        if number % 10 == 9:
            for ticket in tickets:
                heard.end(ticket)
            found.append(worker.call(sizes).result(20))
            assert worker._engine.prefixes.held <= worker.room.prefixes
    first, last = found[4], found[-1]
    assert last[0] <= 3 and last[3] == 1 and last[1] <= first[1] * 1.01 and last[2] <= first[2]
    worker.cancel(stays)
    worker.call(lambda: None).result(20)
    deadline = time.monotonic() + 20
    while worker.stats().rows and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.call(sizes).result(20)[:2] == (0, 0)
    assert not worker._gone and not worker._calls and threading.active_count() < 20


def test_rows_are_admitted_as_memory_allows(working):
    """So many tokens of the cache; a row that alone is more than there is goes alone."""
    model = tiny_model(vocab_size=9, length=64)
    tokens, beside = need_of(model, 4, SamplingOptions(max_new_tokens=20, stop="none"))
    assert tokens == 24 + 8
    token = Room.of(model).token
    assert token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    memory = int(3.5 * (tokens * token + beside) / (1 - 0.25))
    worker, heard = working(model, rows=10, memory=memory), Heard()
    seen = []
    step = worker._engine.step

    def watch():
        seen.append(len(worker._running))
        cache = worker._engine.cache
        done = step()
        for pair in cache._stacks.values():
            assert pair[0].nbytes + pair[1].nbytes <= max(cache.most, 64 + 8) * token
        return done

    worker._engine.step = watch
    short = [
        Job([1, 2, 3, 4], SamplingOptions(20, stop="none", seed=n), n, False) for n in range(9)
    ]
    tickets = worker.submit(short, heard)
    for ticket in tickets:
        assert heard.end(ticket).tokens == alone(model, ticket.job).tokens[0]
    assert max(seen) == 3
    seen.clear()
    long = Job([1], SamplingOptions(60, stop="none"), 0, False)
    tickets = worker.submit([short[0], long, short[1]], heard)
    for ticket in tickets:
        assert heard.end(ticket).tokens == alone(model, ticket.job).tokens[0]
    assert max(seen) <= 2


def test_room_by_memory():
    model = tiny_model(vocab_size=9, length=64)
    room = Room.of(model, memory=10**6)
    assert room.rows == min((10**6 - room.prefixes) // room.whole, 128) and room.fits([(64, 0)])
    assert room.whole == (64 + 4) * room.token + 4 * 9 * 12
    for word in (f"{room.rows} rows of up to 0.0 MB each (", "MB of", "free memory"):
        assert word in str(room)
    assert Room.of(model, rows=5).rows == 5 and Room.of(model, memory=1).rows == 1
    assert 1 <= Room.of(model).rows <= 128
    assert not room.fits([(64, 10**6)]) and room.fits([])
    for settings in ({"block_size": 64}, {"causal": True}, {"clean_stream": "causal"}):
        other = tiny_model(vocab_size=9, length=64, **settings)
        for options in (PLAIN, FAST, SamplingOptions(9, cfg_scale=1.0)):
            tokens, beside = need_of(other, 5, options)
            engine = blockdiff.Engine(other.eval())
            other.config.bos_token_id = 0
            engine.admit([1, 2, 3, 4, 5], options)
            engine.step()
            engine.step()
            cache = engine.cache
            assert tokens >= (cache._room + cache._front) * (2 if options.cfg_scale else 1)
            assert beside >= 9 * 12
    with pytest.raises(InputError):
        need_of(model, 1, SamplingOptions(block_size=5))
    assert isinstance(Failed(ValueError()).error, ValueError)


def test_a_device_that_is_lost_ends_the_worker_and_nobody_waits(working, monkeypatch, caplog):
    """Where no engine can be made any more, what runs and waits is told, and no more is taken."""
    model = tiny_model(vocab_size=9)
    worker, heard = working(model, rows=2), Heard()
    running = worker.submit([Job([1], LONG), Job([2], LONG)], heard)
    waiting = worker.submit([Job([3], PLAIN)], heard)
    heard.wait(running[1], bool)

    def lost(*given, **options):
        raise RuntimeError("the device is lost")

    for name in ("new_cache", "encode", "decode"):
        monkeypatch.setattr(model, name, lost)
    for ticket in running + waiting:
        assert isinstance(heard.end(ticket).error, Draining) and ticket.state == "failed"
    with pytest.raises(Draining):
        worker.submit([Job([1], PLAIN)], heard)
    assert worker.draining and worker.stats().failed == 3
