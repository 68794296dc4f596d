"""The server as its clients meet it: OpenAI's own client, real sockets, a real process."""

import asyncio
import json
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockdiff
from blockdiff import SamplingOptions
from blockdiff.registry import ORDERS
from blockdiff.sampling.orders.base import Order

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")
pytest.importorskip("prometheus_client")

from blockdiff.serving import schemas  # noqa: E402
from blockdiff.serving.answers import Choice, Completion  # noqa: E402
from blockdiff.serving.app import make_app  # noqa: E402
from blockdiff.serving.errors import Refused  # noqa: E402
from blockdiff.serving.jobs import Draining, Failed, Finished, Full, Job, Progress  # noqa: E402
from blockdiff.serving.limits import Limits  # noqa: E402
from blockdiff.serving.port import listen  # noqa: E402
from blockdiff.serving.served import Served  # noqa: E402
from blockdiff.serving.text import Writer  # noqa: E402
from blockdiff.serving.worker import Worker  # noqa: E402

PROMPT = "The people of the"


class Poisoned(Order):
    """Raises at the third evaluation of a block, or where the row's number is odd only."""

    name = "poisoned_for_a_test"

    def choose(self, logits, wanted, rows):
        if (rows.evaluations >= 2).any():
            raise RuntimeError("poisoned")
        first = torch.from_numpy((wanted.cumsum(1) == 1)[wanted])
        return first, logits.argmax(-1)


@pytest.fixture(scope="module")
def poisoned():
    blockdiff.register_order(Poisoned())
    yield Poisoned.name
    del ORDERS._objects[Poisoned.name]


@pytest.fixture(scope="module")
def starter():
    return blockdiff.load("starter")


@pytest.fixture(scope="module")
def served(starter):
    model, tokenizer = starter
    worker = Worker(model, rows=8, queue=16)
    worker.start()
    yield Served("starter", model, tokenizer, worker)
    worker.drain(5)


def running(app):
    """Serves an app in a thread; its address, and what ends it."""
    taken = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def end():
        server.should_exit = True
        thread.join(10)

    return f"http://127.0.0.1:{taken.getsockname()[1]}", end


@pytest.fixture(scope="module")
def address(served, poisoned):
    limits = Limits(body_bytes=10_000, new_tokens=250)
    found, end = running(make_app({"starter": served}, limits))
    yield found
    end()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


def wait_for(truth, seconds=15.0):
    until = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)


# The worker


def collected(worker, jobs, count=None):
    """What became of each job: its last event, and the progress before."""
    events = queue.Queue()
    tickets = worker.submit(jobs, lambda *pair: events.put(pair))
    told = {ticket: [] for ticket in tickets}
    left = len(tickets)
    while left:
        ticket, event = events.get(timeout=30)
        told[ticket].append(event)
        left -= not isinstance(event, Progress)
    return list(told.values())


def alone(model, job):
    found = blockdiff.generate(model, [job.prompt], options=job.options, rows=[job.number])
    return found.tokens[0], found.nfe[0]


def test_rows_of_all_kinds_together_are_what_they_are_alone(starter, served):
    jobs = [
        Job([1 + i, 7, 9], SamplingOptions(max_new_tokens=6 + i, seed=i, **more), i)
        for i, more in enumerate(
            [{}, {"threshold": 0.5}, {"block_size": 8}, {"sampler": "verified"},
             {"sampler": "editing"}, {"temperature": 0.0}, {"logprobs": True}]
        )
    ]  # fmt: skip
    for job, events in zip(jobs, collected(served.worker, jobs * 2), strict=False):
        tokens, nfe = alone(starter[0], job)
        assert (events[-1].tokens, events[-1].nfe) == (tokens, nfe)
        written = {}
        for event in events[:-1]:
            written |= dict(zip(event.at, event.tokens, strict=True))
        assert [written[i] for i in range(len(tokens))] == tokens


def test_only_the_rows_that_raise_fail_and_nothing_is_told_twice(starter, poisoned):
    model, _ = starter
    worker = Worker(model, rows=8)
    worker.start()
    good = [Job([5, 6, i], SamplingOptions(max_new_tokens=12, seed=i), i) for i in range(4)]
    bad = [Job([9], SamplingOptions(max_new_tokens=12, sampler=poisoned), i) for i in range(2)]
    told = collected(worker, [good[0], bad[0], *good[1:], bad[1]])
    ends = [events[-1] for events in told]
    for place in (1, 5):
        assert isinstance(ends[place], Failed) and str(ends[place].error) == "poisoned"
    for job, place in zip(good, (0, 2, 3, 4), strict=True):
        assert (ends[place].tokens, ends[place].nfe) == alone(model, job)
        evaluations = [event.nfe for event in told[place][:-1]]
        assert evaluations == sorted(set(evaluations))
        positions = [at for event in told[place][:-1] for at in event.at]
        assert len(positions) == len(set(positions))
    (events,) = collected(worker, good[:1])
    assert events[-1].tokens == ends[0].tokens, "it goes on"
    assert worker.drain(5)


def test_a_cancelled_row_leaves_at_once_and_calls_run_between(served):
    events = []
    worker = served.worker
    before = worker.stats()
    (ticket,) = worker.submit(
        [Job([1], SamplingOptions(max_new_tokens=10_000, stop="none"))], lambda *e: events.append(e)
    )
    wait_for(lambda: events)
    now = worker.stats()  # of one row that is not finished: its own evaluations are all there are
    assert now.tokens > before.tokens and now.row_evaluations > before.row_evaluations
    assert worker.call(lambda: threading.current_thread().name).result(5) == "blockdiff-worker"
    worker.cancel(ticket)
    told = len(events)
    wait_for(lambda: worker.stats().rows == 0)
    assert len(events) <= told + 1 and ticket.state == "cancelled"


def test_a_full_queue_takes_all_rows_of_a_request_or_none(starter):
    worker = Worker(starter[0], rows=1, queue=2)  # not started: what comes waits
    job = Job([1], SamplingOptions(max_new_tokens=2))
    worker.submit([job, job], lambda *_: None)
    with pytest.raises(Full):
        worker.submit([job, job], lambda *_: None)
    assert worker.stats().queued == 2
    worker.submit([job], lambda *_: None)
    with pytest.raises(blockdiff.InputError, match="mask token"):
        worker.submit([Job([starter[0].config.mask_token_id], job.options)], lambda *_: None)
    worker.start()
    wait_for(lambda: worker.stats().finished == 3)
    worker.drain(1)
    with pytest.raises(Draining):
        worker.submit([job], lambda *_: None)


def test_draining_waits_for_what_runs_and_fails_what_is_too_long(starter):
    for seconds, kind in ((20, Finished), (0, Failed)):
        worker, ends = Worker(starter[0], rows=1), []
        worker.start()
        many = 40 if seconds else 4000  # the row has to run still when there is no time left
        jobs = [Job([1], SamplingOptions(max_new_tokens=many, stop="none"), i) for i in range(2)]
        first, second = worker.submit(jobs, lambda t, e, ends=ends: ends.append((t, e)))
        wait_for(lambda ends=ends: ends)
        assert worker.drain(seconds) == (kind is Finished)
        last = dict(ends)
        assert isinstance(last[first], kind) and isinstance(last[second], Failed)


@pytest.mark.parametrize("stops", [[], ["é"], ["ab", "bc"], [" abc", "b"], ["\n\n"]])
def test_text_does_not_depend_on_how_many_tokens_come_at_once(starter, stops):
    text = "  naïve café 漢字 🙂 ab abc \n\nend"
    tokens = starter[1].encode(text, add_special_tokens=False)
    found = set()
    for size in (1, 2, 3, len(tokens)):
        writer, parts = Writer(starter[1], [1], stops, strip=True), []
        for start in range(0, len(tokens), size):
            last = start + size >= len(tokens)
            parts.append(writer.write(tokens[start : start + size], last=last)[0])
        assert "".join(parts) == writer.text
        found.add(writer.text)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert found == {text[: min(ends, default=(0, len(text)))[1]].lstrip()}


def test_a_text_that_ends_within_a_character(starter):
    """Its tokens come one by one, before and behind a stop string, too."""
    tokens = starter[1].encode("so 🙂", add_special_tokens=False)[:-1]
    for stops, text in (([], "so \ufffd"), (["o"], "s"), (["never"], "so \ufffd")):
        for last in (tokens[-1:], []):
            writer, given = Writer(starter[1], [1], stops), []
            for one in tokens[: len(tokens) - len(last)]:
                given += writer.write([one])[1]
            given += writer.write(last, last=True)[1]
            assert writer.text == text and writer.ids == tokens
            assert "".join(token.text for token in given) in text
            assert stops == ["o"] or [token.id for token in given] == tokens


# OpenAI's client


def test_models(client):
    (model,) = client.models.list().data
    facts = model.blockdiff
    assert model.id == "starter" and facts["reproducible"] and facts["context"] == 256
    assert "float32" in facts["promise"]
    assert {"first_hitting", "verified", "threshold"} <= set(facts["samplers"])
    assert client.models.retrieve("starter").id == "starter"
    with pytest.raises(openai.NotFoundError, match="there is starter"):
        client.models.retrieve("other")


def test_completions_are_what_generate_writes(client, starter):
    done = client.completions.create(
        model="starter", prompt=[PROMPT, "In"], max_tokens=12, seed=3, n=2, logprobs=0,
        temperature=0.9, extra_body={"sampler": "threshold", "threshold": 0.6, "block_size": 8},
    )  # fmt: skip
    own = blockdiff.generate(
        starter[0], [PROMPT, "In"], tokenizer=starter[1], samples=2, max_new_tokens=12, seed=3,
        temperature=0.9, threshold=0.6, block_size=8, logprobs=True,
    )  # fmt: skip
    assert [choice.text for choice in done.choices] == own.texts
    assert done.usage.evaluations == sum(own.nfe)
    assert done.usage.completion_tokens == sum(map(len, own.tokens))
    for choice, logprobs in zip(done.choices, own.path_logprobs, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        assert "".join(choice.logprobs.tokens) == choice.text
        place = choice.logprobs.text_offset[3]
        assert choice.text[place:].startswith(choice.logprobs.tokens[3])


def test_where_a_streamed_token_begins(starter):
    """Part of its text may have come before, while the rest may have begun one of the stops."""
    tokenizer = starter[1]
    ids = tokenizer.encode(" the moment of the people")
    for stops in ((), ("t~", "n of~", "e~")):
        choice, found = Choice(Writer(tokenizer, [], stops)), []
        for place, one in enumerate(ids):
            step = Progress(place, [place], [one], [], place + 1, [-1.0], 0.0)
            text, tokens = choice.see(step)
            piece = Completion.piece(SimpleNamespace(logprobs=True), text, tokens, choice)
            found += piece["logprobs"]["text_offset"]
        text, tokens = choice.see(Finished(ids, 9, False, [-1.0] * len(ids), 0.0, 0.0))
        piece = Completion.piece(SimpleNamespace(logprobs=True), text, tokens, choice)
        found += piece["logprobs"]["text_offset"]
        sizes = [len(token.text) for token in choice.given]
        assert len(found) == len(ids) and found == [sum(sizes[:n]) for n in range(len(ids))]


def test_every_sampling_option_is_served_or_refused():
    ours = set(SamplingOptions.__dataclass_fields__)
    served = schemas.CompletionRequest.model_fields.keys() & ours
    assert ours == served | (schemas._REFUSED.keys() & ours)
    for name in sorted(served - {"stop", "seed", "logit_bias", "logprobs"}):
        told = schemas.CompletionRequest.model_construct(**{name: 1}).told()
        assert told == {name: 1}, "it arrives"
    for name in sorted(ours - served):
        with pytest.raises(Refused, match=f"`{name}`"):
            schemas.CompletionRequest.model_validate({name: [1]}).told()


WISHES = [
    {}, {"stop": [" of", "the "]}, {"logprobs": 1, "n": 2}, {"extra_body": {"sampler": "editing"}},
    {"extra_body": {"sampler": "verified"}}, {"logit_bias": {"260": -100}, "top_p": 0.9},
    {"extra_body": {"choices": [" yes", " no"]}},
]  # fmt: skip


@pytest.mark.parametrize("wish", WISHES)
def test_streaming_equals_not_streaming_whatever_else_runs(client, wish):
    asked = {"model": "starter", "prompt": PROMPT, "max_tokens": 24, "seed": 11} | wish
    whole = client.completions.create(**asked)
    other = client.completions.create(model="starter", prompt="A", max_tokens=40, stream=True)
    texts, tokens, reasons = {}, {}, {}
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
    other.close()
    first, then = whole.usage, chunk.usage
    assert (first.prompt_tokens, first.total_tokens) == (then.prompt_tokens, then.total_tokens)
    # The prompt is known by then: it may cost no evaluation.
    known = then.prompt_tokens_details.cached_tokens
    assert known <= then.prompt_tokens, "a prompt counts once"
    assert first.evaluations - (len(whole.choices) if known else 0) <= then.evaluations
    assert then.evaluations <= first.evaluations
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        if choice.logprobs:
            assert tokens[choice.index] == choice.logprobs.tokens
        for stop in wish.get("stop", []):
            assert stop not in choice.text


def test_a_text_without_a_seed_can_be_had_again(client, monkeypatch):
    # Random ones would once in some hundred runs meet a number that is rounded otherwise.
    seeds = iter(range(7, 99))
    monkeypatch.setattr(secrets, "randbelow", lambda most: next(seeds))
    asked = {"model": "starter", "prompt": PROMPT, "max_tokens": 24}
    first, other = (client.completions.create(**asked) for _ in range(2))
    assert first.seed != other.seed and first.choices[0].text != other.choices[0].text
    assert client.completions.create(**asked, seed=first.seed).choices == first.choices
    *_, last = client.completions.create(**asked, stream=True, seed=first.seed)
    assert last.seed == first.seed
    del asked["prompt"]
    asked["messages"] = [{"role": "user", "content": "Hello"}]
    *parts, last = client.chat.completions.create(**asked, stream=True)
    again = client.chat.completions.create(**asked, seed=last.seed)
    said = "".join(part.choices[0].delta.content for part in [*parts, last])
    assert again.seed == last.seed and again.choices[0].message.content == said


def test_known_beginnings_are_told_streamed_or_not(client):
    asked = {"model": "starter", "prompt": "A beginning of some more tokens than a block has: it",
             "max_tokens": 4, "seed": 1, "n": 2}  # fmt: skip
    client.completions.create(**asked)
    whole = client.completions.create(**asked).usage
    *_, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert not last.choices and last.usage == whole
    assert 0 < whole.prompt_tokens_details.cached_tokens <= whole.prompt_tokens


def test_chat_obeys_a_schema_and_streams_the_same(client):
    schema = {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 5},
                                         "old": {"type": "boolean"}},
        "required": ["name", "old"], "additionalProperties": False,
    }  # fmt: skip
    asked = {
        "model": "starter", "seed": 2, "max_tokens": 60, "logprobs": True,
        "messages": [{"role": "system", "content": "Answer."},
                     {"role": "user", "content": [{"type": "text", "text": "Who <|mask|>?"}]}],
        "response_format": {"type": "json_schema",
                            "json_schema": {"name": "who", "schema": schema}},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    said = json.loads(whole.choices[0].message.content)
    assert set(said) == {"name", "old"} and whole.choices[0].finish_reason == "stop"
    parts = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(p.delta.content for p in parts) == whole.choices[0].message.content
    assert parts[0].delta.role == "assistant" and parts[1].delta.role is None
    logprobs = [t for p in parts for t in p.logprobs.content]
    again = whole.choices[0].logprobs.content  # its prompt was known: float32 may round otherwise
    assert [t.bytes for t in logprobs] == [t.bytes for t in again]
    assert [t.logprob for t in logprobs] == pytest.approx([t.logprob for t in again], abs=1e-4)


def test_an_object_and_plain_chat(client):
    asked = {"model": "starter", "seed": 2, "messages": [{"role": "user", "content": "Hello"}]}
    found = client.chat.completions.create(**asked, max_completion_tokens=40, n=2)
    texts = [choice.message.content for choice in found.choices]
    assert texts[0] != texts[1] and all("\nUser:" not in text for text in texts)
    found = client.chat.completions.create(
        **asked, max_tokens=40, response_format={"type": "json_object"}
    )
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(found.choices[0].message.content), dict)


def test_a_row_ends_with_the_words_that_end_a_turn(starter, served):
    template = "{% for one in messages %}{{ one.content }} of {% endfor %}"
    talk = Served("talk", *starter, served.worker, template=template)
    assert talk.turn_end.text == "of"
    options = talk.options({"max_new_tokens": 200, "seed": 1}, chat=True)
    ((*_, end),) = collected(served.worker, [Job(talk.encode(PROMPT), options)])
    text = starter[1].decode(end.tokens)
    assert end.stopped and text.endswith("of") and text.count("of") == 1


def test_score(address, starter):
    answer = httpx.post(
        f"{address}/v1/score", json={"context": PROMPT, "continuation": [" United", " zq"]}
    )
    own = blockdiff.score(starter[0], PROMPT, [" United", " zq"], tokenizer=starter[1])
    found = answer.json()["data"]
    assert [one["nats"] for one in found] == pytest.approx([one.nats for one in own], abs=1e-4)


def test_denoising_as_events(address):
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 1, "sampler": "editing"}
    answer = httpx.post(f"{address}/v1/denoise", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", answer.text)
    names = [name for name, _ in events]
    assert names[0] == "start" and names[-1] == "done" and set(names[1:-1]) == {"step"}
    start, *steps, done = (json.loads(data) for _, data in events)
    assert start["sampler"] == "editing" and start["seed"] == 1 and start["max_tokens"] == 12
    written = {}
    for step in steps:
        assert set(step["edited"]) <= written.keys()
        written |= dict(zip(step["at"], step["text"], strict=True))
    assert "".join(written[i] for i in range(12)) == done["text"]
    whole = httpx.post(f"{address}/v1/completions", json=body).json()
    assert whole["choices"][0]["text"] == done["text"]
    one, two = whole["usage"], done["usage"]  # the prompt is known the second time
    assert one["completion_tokens"] == two["completion_tokens"] == 12
    assert 0 <= two["evaluations"] - one["evaluations"] <= 1


# What cannot be


REFUSED = [
    ({"prompt": 5}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 251}, "max_tokens"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 1000}, "n"),
    ({"n": 25}, "n"),
    ({"prompt": ["a"] * 5, "n": 5}, "n"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"regex": "[" * 5000}, "regex"),
    ({"sampler": "other"}, "sampler"),
    ({"sampler": "ancestral"}, "steps"),
    ({"block_size": 5}, "block_size"),
    ({"num_steps": 5}, "num_steps"),
    ({"tools": [{}]}, "tools"),
    ({"frequency_penalty": 1.0}, "frequency_penalty"),
    ({"logit_bias": {"x": 1.0}}, "logit_bias"),
    ({"logit_bias": {"1": 1e308}}, "logit_bias"),
    ({"logit_bias": {"999999": 1.0}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"prompt": "a " * 400}, "prompt"),
    ({"prompt": [[999999]]}, None),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""], "stop": ["", "a"]}, "stop"),
    ({"json_schema": "/etc/passwd"}, "json_schema"),
    ({"regex": "("}, "regex"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
     "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "param"), REFUSED)
def test_a_request_that_cannot_be_meant_is_refused_by_its_field(address, wish, param):
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a"} | wish, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert "Traceback" not in answer.text and "site-packages" not in answer.text
    if wish.get("n", 100) <= 25:  # 8 rows, a queue of 16
        assert "25" in error["message"] and "24" in error["message"]
    if "a a a" in str(wish):
        assert "402" in error["message"] and "255" in error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"\xff\xfe", 400), (b"[" * 9000, 400), (b'{"prompt": "\\ud800"}', 400),
     (b'{"temperature": NaN}', 400), (b'"' + b"a" * 20_000 + b'"', 413), (b"", 400)],
)  # fmt: skip
def test_a_body_that_is_none(address, body, status):
    answer = httpx.post(
        f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status and answer.json()["error"]["message"]
    plain = httpx.post(f"{address}/v1/completions", content=b'{"prompt": "a"}')
    assert plain.status_code == 400, "a page elsewhere could send it unasked"


def test_no_other_status_than_is_told(address):
    schema = httpx.get(f"{address}/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]
    for path in schema["paths"].values():
        for method in path.values():
            assert "422" not in method["responses"]
    for path in ("/docs", "/redoc", "/v1/other"):
        assert httpx.get(f"{address}{path}").status_code == 404
    assert httpx.put(f"{address}/v1/completions").json()["error"]["type"]


# What goes wrong


def test_a_poisoned_request_fails_alone(client, poisoned):
    asked = {"model": "starter", "prompt": PROMPT, "max_tokens": 60, "seed": 5}
    whole = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True)
    text = next(stream).choices[0].text
    with pytest.raises(openai.InternalServerError) as failure:
        client.completions.create(**asked, extra_body={"sampler": poisoned})
    assert "poisoned" not in failure.value.message
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole


def test_a_client_that_goes_away_frees_its_row(client, address, served):
    stats = served.worker.stats
    wait_for(lambda: stats().rows == 0)
    before = stats().cancelled
    never = {str(served.model.config.eos_token_id): -100}  # a text that ends early is another thing
    asked = {"model": "starter", "prompt": "A", "max_tokens": 250, "logit_bias": never}
    streams = [client.completions.create(**asked, stream=True) for _ in range(4)]
    wait_for(lambda: stats().rows == 4)
    for stream in streams:
        stream.close()
    wait_for(lambda: stats().rows == 0)
    assert stats().cancelled == before + 4

    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    raw = socket.create_connection((host, int(port)))
    raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    wait_for(lambda: stats().rows == 1)
    raw.close()
    wait_for(lambda: stats().cancelled == before + 5)


def test_key_time_and_readiness(served):
    models = {}
    app = make_app(models, Limits(api_key="secret", seconds=0.05, body_seconds=0.2))
    address, end = running(app)
    bearer = {"Authorization": "Bearer secret"}
    assert httpx.get(f"{address}/health").status_code == 200
    assert httpx.get(f"{address}/ready").status_code == 503
    loading = httpx.get(f"{address}/v1/models", headers=bearer)
    assert loading.status_code == 503 and loading.headers["retry-after"]
    models["starter"] = served
    assert httpx.get(f"{address}/ready").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    body = {"prompt": "A", "max_tokens": 250}
    answer = httpx.post(f"{address}/v1/completions", json=body, headers=bearer)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    wait_for(lambda: served.worker.stats().rows == 0)
    page = httpx.get(f"{address}/metrics", headers=bearer).text
    assert 'blockdiff_requests_total{path="/v1/completions",status="504"} 1.0' in page
    assert 'blockdiff_rows{model="starter"} 0.0' in page
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
        raw.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        raw.settimeout(5)
        assert b" 408 " in raw.recv(100)
    end()


def test_the_queue_keeps_no_more_than_the_text_of_one_who_does_not_read():
    from blockdiff.serving.inbox import Inbox

    async def told():
        inbox = Inbox(apart=3)
        ticket = object()
        inbox.tickets = [ticket]
        for i in range(100):
            inbox.listen(ticket, Progress(i, [i], [i], [], i, None, 0.0))
        inbox.listen(ticket, Finished([], 100, False, None, 0.0, 0.0))
        until = asyncio.get_running_loop().time() + 1
        return [event async for _, event in inbox.events(until)]

    *steps, last = asyncio.run(told())
    assert len(steps) == 3 and isinstance(last, Finished)
    assert [at for step in steps for at in step.at] == list(range(100))


def test_a_process_drains_and_a_port_in_use_is_said_before_the_model_is_opened(tmp_path):
    shutil.copytree(Path(blockdiff.__file__).parent / "starter", tmp_path / "other")
    command = [sys.executable, "-m", "blockdiff", "serve", "starter"]
    command += [str(tmp_path / "other"), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    address = process.stderr.readline().strip()
    port = address.rpartition(":")[2]
    refused = subprocess.run(
        [*command[:4], "no/such/model", "--port", port], capture_output=True, text=True
    )
    assert refused.returncode == 2 and f"--port {port}: Address already in use" in refused.stderr

    def ready():
        try:
            return httpx.get(f"{address}/ready").status_code == 200
        except httpx.ConnectError:
            return False

    wait_for(ready, 60)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="starter", prompt="A", max_tokens=240, stream=True)
    next(stream)
    process.send_signal(signal.SIGTERM)
    # A new connection is answered, too: who balances load sees that it ends.
    wait_for(lambda: httpx.get(f"{address}/ready").status_code == 503)
    asked = httpx.post(f"{address}/v1/completions", json={"prompt": "a"}, timeout=20)
    assert asked.status_code == 503 and asked.headers["retry-after"]
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    assert process.wait(20) == 0
    said = process.stderr.read()
    assert "Traceback" not in said
    together = 0.0
    for name in ("starter", "other"):
        assert said.count(f"{name} has no chat template") == 1
        (line,) = re.findall(f"{name}: float32, context of 256 tokens, .*", said)
        _, cache, free, known = (
            float(number) * {"G": 1e9, "M": 1e6}[unit]
            for number, unit in re.findall(r"([\d.]+) ([GM])B", line)
        )
        together += cache + known
    assert together < 0.41 * free, "of what is free all models together take their share"
