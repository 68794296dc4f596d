"""Many machines: what Ray's workers do, and what lies before the server's replicas.

Ray itself takes long to start: benchmarks/batch_workers.py and benchmarks/replicas.py run it, with
workers and replicas that are killed, and so does the last test where BLOCKDIFF_TEST_RAY is set.
"""

import asyncio
import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from blockdiff import cli
from blockdiff.data.lines import Lines
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.many import Scoring, Writing
from blockdiff.models.hub import save_model
from blockdiff.sampling.options import SamplingOptions
from blockdiff.serving.batch import _said, _Worker, share_of
from helpers import tiny_model

pytest.importorskip("fastapi")
from blockdiff.serving.replicas import Again

ROWS = [{"id": f"r{i}", "prompt": ["the law", "land"][i % 2], "max_new_tokens": 1 + i % 9}
        for i in range(20)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the law of the land is the law. "] * 20, 290)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    save_model(tiny_model(vocab_size=len(tokenizer), length=16, **ends), folder, tokenizer)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pairs = [{"context": "the", "continuation": " law of"[: 2 + i], "n": i} for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


# workers


def wish(**given):
    known = {"samples": 2, "precision": "auto", "tokenizer": None, "batch_size": 2}
    return SimpleNamespace(**{**known, **given})


def test_a_worker_makes_the_records_of_one_process(folder):
    """Units of lines go to workers of their own, in any order."""
    scores = wish(precision="float32", estimator="auto", draws=2, timesteps=9, seed=1, greedy=True)
    for make, file in (
        (partial(Writing, str(folder), wish(), SamplingOptions(), told=[]), "prompts.jsonl"),
        (partial(Scoring, str(folder), scores), "pairs.jsonl"),
    ):
        task, lines = make(device="cpu"), list(Lines("file", str(folder / file)))
        for line in lines:
            task.check(line)
        task.keep(task.plan())
        whole = list(task.records(lines))
        assert len(whole) == len(lines) * task.records_each > task.unit
        told = [json.dumps([[x.id, x.number, x.where, x.row] for x in lines[at : at + task.unit]])
                for at in range(0, len(lines), task.unit)]  # fmt: skip
        assert len(told) > 2
        found = {}
        for part in (told[1::2], told[::2]):
            worker = _Worker(make, "cpu", task.plan(), [])
            for unit in part[::-1]:
                found[unit] = worker({"lines": [unit]})["records"][0]
        together = [record for unit in told for record in json.loads(found[unit])]
        assert together == json.loads(json.dumps(whole))


@pytest.mark.parametrize(
    ("there", "workers", "device", "found"),
    [
        ({"CPU": 8}, None, "auto", (1, {"num_cpus": 8})),
        ({"CPU": 8}, 3, "auto", (3, {"num_cpus": 2})),
        ({"CPU": 8, "GPU": 2}, None, "auto", (2, {"num_gpus": 1})),
        ({"CPU": 8, "GPU": 2}, 1, "cuda:0", (1, {"num_gpus": 1})),
        ({"CPU": 8, "GPU": 2}, 4, "cpu", (4, {"num_cpus": 2})),
        ({"CPU": 2}, 3, "auto", "is 3, and the cluster has 2 processors"),
        ({"CPU": 2}, None, "cuda", "the cluster has 0 GPUs"),
    ],
)
def test_what_a_worker_takes_of_a_cluster(there, workers, device, found):
    ray = SimpleNamespace(cluster_resources=lambda: there)
    if isinstance(found, str):
        with pytest.raises(InputError, match=found):
            share_of(ray, workers, device)
    else:
        assert share_of(ray, workers, device) == found


def test_a_workers_refusal_is_said_as_it_is_here():
    outer = RuntimeError("a task failed\nsomewhere")
    outer.cause = InputError("p.jsonl, line 2: the prompt is empty")
    assert str(_said(outer)) == "p.jsonl, line 2: the prompt is empty"
    assert str(_said(ValueError("two\nlines"))) == "a worker failed: two lines"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--draws", "3"], "--draws is not for the --task generate"),
        (["--task", "score", "--temperature", "1"], "--temperature is not for the --task score"),
        (["--task", "score", "--samples", "2"], "--samples is not for"),
        (["--task", "train"], "--task cannot be 'train'"),
    ],
)
def test_what_does_not_go_with_a_task(folder, words, said, capsys):
    given = ["batch", str(folder), "--prompt-file", "p.jsonl", "--out", "o.jsonl", *words]
    with pytest.raises(SystemExit) as stop:
        cli.main(given)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and said in line and line.count("\n") == 1


def test_without_ray_it_is_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["batch", str(folder), "--prompt-file", str(folder / "prompts.jsonl"), "--out",
                  str(tmp_path / "o.jsonl")])  # fmt: skip
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install 'blockdiff[ray]'" in line
    assert line.count("\n") == 1 and list(tmp_path.iterdir()) == []


# what lies before the replicas


class Dying:
    """An app that ends without an answer so often, or in the middle of one, as Ray's proxy does."""

    def __init__(self, times, streams=None, after=None):
        self.times, self.streams, self.after, self.bodies = times, streams, after, []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        if len(self.bodies) <= self.times and not self.streams:
            return
        kind = self.streams or b"application/json"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if len(self.bodies) > self.times:
            await send({"type": "http.response.body", "body": b"end"})


def asked(app, body=(b"ab", b"cd"), **options):
    """(status, headers, body, whether it was ended) of what a request is answered."""
    parts = [{"type": "http.request", "body": x, "more_body": x != body[-1]} for x in body]
    sent = []

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [], "method": "POST", "path": "/"}
    asyncio.run(Again(app, **options)(scope, receive, send))
    start, *rest = sent
    assert start["type"] == "http.response.start" and [m["type"] for m in rest] == [
        "http.response.body"
    ] * len(rest)
    ended = not rest[-1].get("more_body", False)
    return start["status"], dict(start["headers"]), b"".join(m["body"] for m in rest), ended


@pytest.mark.parametrize("times", [0, 1, 2])
def test_what_a_dead_replica_held_is_sent_again(times):
    app = Dying(times)
    assert asked(app)[::2] == (200, b"data: 1\n\nend") and app.bodies == [b"abcd"] * (times + 1)


def test_after_some_tries_it_is_503():
    app = Dying(9)
    status, headers, body, ended = asked(app)
    assert (status, len(app.bodies), ended) == (503, 3, True)
    assert headers[b"retry-after"] == b"1" and json.loads(body)["error"]["code"] == "replica_lost"


def test_a_body_too_large_to_be_kept_is_sent_once():
    for times, status in ((0, 200), (1, 503)):
        app = Dying(times)
        body = [b"x" * 9, b"y" * 9, b"z" * 9]
        assert asked(app, body, body_bytes=10)[0] == status
        assert app.bodies == [b"".join(body)], "whole all the same"


def test_a_stream_that_had_begun_ends_with_an_error():
    app = Dying(1, streams=b"text/event-stream; charset=utf-8")
    status, _, body, ended = asked(app)
    assert (status, len(app.bodies), ended) == (200, 1, True)
    event = body.split(b"\n\n")[1]
    name, data = event.split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["error"]["code"] == "replica_lost"
    assert not asked(Dying(1, streams=b"application/json"))[3], "its end is left out, as it was"


# Ray


@pytest.mark.skipif("BLOCKDIFF_TEST_RAY" not in os.environ, reason="Ray takes long to start")
def test_two_real_workers_write_the_file_of_one_process(folder, tmp_path):
    pytest.importorskip("ray")
    words = [str(folder), "--prompt-file", str(folder / "prompts.jsonl"), "--batch-size", "1"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    cli.main(["generate", *words, "--out", str(one)])
    cli.main(["batch", *words, "--out", str(two), "--workers", "2", "--device", "cpu"])
    assert one.read_bytes() == two.read_bytes() and one.read_bytes().count(b"\n") == 20
