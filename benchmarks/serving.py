"""How a server holds load: clients that each ask for a text, and for the next when it is there.

    python benchmarks/serving.py starter                          a server in a process of its own
    python benchmarks/serving.py starter --way direct             the worker alone, without HTTP
    python benchmarks/serving.py FOLDER --way transformers        `transformers serve` of a causal
                                                                  language model's folder
    python benchmarks/serving.py starter --minutes 30             memory under changing load

For each number of clients: tokens a second, and the time until the first new text was there and
from there for each token (p50 and p99), beside one `generate` of as many rows, measured in turn
with it, so that what else the machine does meets both. No two prompts are alike. Results:
benchmarks/results/serving.json, under the way the load was sent and the model.

A way to send load is a function (clients, requests) → (seconds, records). Over HTTP every request
is a connection of its own and its text is streamed; the clients share the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import blockdiff
from blockdiff import SamplingOptions
from blockdiff.apps.benchmark.compare import measure_machine
from blockdiff.models.weights import convert
from blockdiff.sampling.generate import generate_tokens
from blockdiff.serving.worker import Failed, Finished, Job, Worker

RESULTS = Path(__file__).parent / "results" / "serving.json"


@dataclass(frozen=True)
class Record:
    """One request: seconds since it was sent until its first new token was final, and its end."""

    first: float
    seconds: float
    tokens: int
    evaluations: int


@dataclass(frozen=True)
class Load:
    """What is asked for: prompts of so many tokens, so many new ones, each with its own seed."""

    model: Any
    prompt: int
    new: int
    sampler: dict[str, Any]
    stream: bool

    def job(self, number: int) -> Job:
        generator = np.random.default_rng(number)
        some = self.model.config.mask_token_id
        prompt = generator.integers(0, min(some, 1000), self.prompt).tolist()
        bias = {self.model.config.eos_token_id: -100.0}  # all texts are as long as was asked
        options = SamplingOptions(self.new, seed=number, logit_bias=bias, **self.sampler)
        return Job(prompt, options, 0, self.stream)


def direct(load: Load, worker: Worker) -> Callable[[int, int], tuple[float, list[Record]]]:
    """The worker's own interface, a thread for each client."""

    sent = [0]

    def send(clients: int, requests: int) -> tuple[float, list[Record]]:
        left, records = iter(range(sent[0], sent[0] + requests)), []
        sent[0] += requests
        lock = threading.Lock()

        def client() -> None:
            heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                begin = time.perf_counter()
                worker.submit([load.job(number)], lambda ticket, event: heard.put(event))
                event = heard.get()
                while not isinstance(event, Finished | Failed):
                    event = heard.get()
                if isinstance(event, Failed):
                    raise event.error
                seconds = time.perf_counter() - begin
                record = Record(event.first_seconds, seconds, len(event.tokens), event.nfe)
                with lock:
                    records.append(record)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begin, records

    return send


Send = Callable[[int, int], tuple[float, list[Record]]]


@contextmanager
def server(command: list[str], ready: str, port: int) -> Iterator[psutil.Process]:
    """A server in a process of its own, from when its route `ready` answers 200."""
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


async def asked(port: int, path: str, body: dict[str, Any], leave: float | None = None) -> Record:
    """One request on a connection of its own; gone without a word after `leave` seconds."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = json.dumps(body).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n".encode()
        + sent
    )
    first, tokens, evaluations, answer = 0.0, 0, 0, bytearray()
    try:
        async with asyncio.timeout(leave):
            while more := await reader.read(2**16):
                answer += more
                if not first and re.search(rb'"(text|content)": ?"[^"]', answer):
                    first = time.perf_counter() - begin
    except TimeoutError:
        writer.transport.abort()
        return Record(first, time.perf_counter() - begin, 0, 0)
    writer.close()
    usage = re.findall(rb'"completion_tokens": ?(\d+)', answer)
    if not answer.startswith(b"HTTP/1.1 200") or not usage:  # which stands in the last event
        raise SystemExit(f"the server answered {answer[:2000]!r}")
    tokens = int(usage[-1])
    told = re.findall(rb'"evaluations": ?(\d+)', answer)
    evaluations = int(told[-1]) if told else tokens
    return Record(first, time.perf_counter() - begin, tokens, evaluations)


def over_http(load: Load, port: int, body: Callable[[Job], dict[str, Any]], path: str) -> Send:
    """Clients of a server that streams what it writes."""
    sent = [0]

    def send(clients: int, requests: int) -> tuple[float, list[Record]]:
        left, records = iter(range(sent[0], sent[0] + requests)), []
        sent[0] += requests

        async def client() -> None:
            for number in left:
                records.append(await asked(port, path, body(load.job(number))))

        async def all_of_them() -> None:
            await asyncio.gather(*(client() for _ in range(clients)))

        begin = time.perf_counter()
        asyncio.run(all_of_them())
        return time.perf_counter() - begin, records

    return send


def our_body(job: Job) -> dict[str, Any]:
    """A job as a request."""
    options = job.options
    return {
        "prompt": job.prompt, "max_tokens": options.max_new_tokens, "seed": options.seed,
        "temperature": options.temperature, "stream": True,
        "stream_options": {"include_usage": True}, "logit_bias": options.logit_bias,
        "sampler": options.sampler, "block_size": options.block_size,
    }  # fmt: skip


def their_body(model: str, tokenizer: Any, job: Job) -> dict[str, Any]:
    """A job as a request to transformers' server."""
    return {
        "model": model, "prompt": tokenizer.decode(job.prompt),
        "max_tokens": job.options.max_new_tokens, "seed": job.options.seed,
        "temperature": job.options.temperature, "stream": True,
    }  # fmt: skip


async def _all(port: int, wishes: list[dict[str, Any]]) -> None:
    await asyncio.gather(*(asked(port, "/v1/completions", wish) for wish in wishes))


def memory(load: Load, port: int, process: psutil.Process, minutes: float) -> dict[str, Any]:
    """RSS every ten seconds under sixteen clients whose wishes differ, of which some go away."""
    seen: list[tuple[float, float]] = []
    done = {"texts": 0, "gone": 0}
    chance = random.Random(0)
    # Every way at its largest, all clients at once: what comes after is a part of that.
    for sampler in ("first_hitting", "entropy_bound", "verified") * 3:
        wish = our_body(load.job(0)) | {"sampler": sampler, "top_p": 0.9, "logprobs": 1}
        each = [wish | {"prompt": 3 * load.job(2**20 + n).prompt} for n in range(16)]
        asyncio.run(_all(port, each))
    end = time.monotonic() + 60 * minutes

    async def client() -> None:
        while time.monotonic() < end:
            wish = our_body(load.job(chance.randrange(2**20)))
            wish["max_tokens"] = chance.choice([8, 32, 128])
            wish["prompt"] = wish["prompt"] * chance.choice([1, 2, 3])
            wish["logprobs"] = chance.choice([None, 1])
            wish["sampler"] = chance.choice(["first_hitting", "entropy_bound", "verified"])
            wish["top_p"] = chance.choice([0.9, 1.0])
            leave = chance.random() if chance.random() < 0.2 else None
            record = await asked(port, "/v1/completions", wish, leave)
            done["texts" if record.tokens else "gone"] += 1

    async def watch() -> None:
        begin = time.monotonic()
        while time.monotonic() < end:
            seen.append((time.monotonic() - begin, process.memory_info().rss / 2**20))
            await asyncio.sleep(10)

    async def both() -> None:
        await asyncio.gather(watch(), *(client() for _ in range(16)))

    asyncio.run(both())
    # The first sixth warms caches and allocators; then a straight line through what is left.
    late = np.array([one for one in seen if one[0] > 10 * minutes])
    middle = float(np.median(late[:, 1]))
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * (late[-1, 0] - late[0, 0])
    return {
        "minutes": minutes, **done, "growth": round(slope / middle, 5),
        "mib": [round(rss, 1) for _, rss in seen],
    }  # fmt: skip


def generated(load: Load, rows: int) -> float:
    """Tokens a second of one `generate` of so many rows, with one seed and numbers of their own."""
    jobs = [load.job(number) for number in range(rows)]
    options = replace(jobs[0].options, seed=0)
    begin = time.perf_counter()
    done = generate_tokens(load.model, [job.prompt for job in jobs], options)
    return sum(map(len, done.tokens)) / (time.perf_counter() - begin)


def figures(seconds: float, records: list[Record]) -> dict[str, float]:
    """What is told of one load."""
    first = [record.first for record in records]
    each = [(one.seconds - one.first) / max(one.tokens - 1, 1) for one in records]
    tokens = sum(record.tokens for record in records)
    return {
        "requests": len(records),
        "tokens_per_second": tokens / seconds,
        "tokens_per_evaluation": tokens / sum(record.evaluations for record in records),
        **{f"first_token_p{p}": float(np.percentile(first, p)) for p in (50, 99)},
        **{f"per_token_p{p}": float(np.percentile(each, p)) for p in (50, 99)},
    }


def measure(
    send: Callable[[int, int], tuple[float, list[Record]]],
    load: Load,
    clients: int,
    each: int,
    repeats: int,
) -> dict[str, Any]:
    """Load and `generate` in turn; the medians, and the ratio of those of a turn."""
    turns, base = [], []
    for turn in range(repeats):
        for what in (0, 1) if turn % 2 == 0 else (1, 0):
            if what:
                turns.append(figures(*send(clients, clients * each)))
            else:
                base.append(generated(load, clients))
    found: dict[str, Any] = {
        name: round(statistics.median(turn[name] for turn in turns), 6) for name in turns[0]
    }
    found["generate_tokens_per_second"] = round(statistics.median(base), 3)
    ratios = [turn["tokens_per_second"] / one for turn, one in zip(turns, base, strict=True)]
    return {"clients": clients, **found, "of_generate": round(statistics.median(ratios), 4)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--way", choices=["http", "direct", "transformers"], default="http")
    parser.add_argument("--clients", default="1,8,16,32,128", help="how many, with commas")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a text")
    parser.add_argument("--repeats", type=int, default=3, help="load and generate, in turn")
    parser.add_argument("--sampler", default="first_hitting")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--stream", action="store_true", help="`direct` tells each evaluation")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--minutes", type=float, help="measure memory instead, for so long")
    parser.add_argument("--batching", action="store_true", help="transformers' continuous batching")
    parser.add_argument("--name", help="what the model is called in the results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    model, tokenizer = blockdiff.load(given.model)
    convert(model, given.precision, model.device)
    model.eval()
    sampler = {"sampler": given.sampler, "block_size": given.block_size}
    load = Load(model, given.prompt, given.new, sampler, given.stream or given.way != "direct")
    counts, port = [int(word) for word in given.clients.split(",")], free_port()
    most = str(max(counts))
    here = [sys.executable, "-m"]
    commands = {
        "http": [*here, "blockdiff", "serve", given.model, "--port", str(port), "--rows", most,
                 "--queue", most, "--precision", given.precision],
        "transformers": [*here, "transformers.cli.transformers", "serve", given.model,
                         "--port", str(port), "--device", "cpu", "--dtype",
                         {"bf16": "bfloat16"}.get(given.precision, given.precision)],
    }  # fmt: skip
    if given.batching:
        commands["transformers"].append("--continuous-batching")
    rows: list[dict[str, Any]] = []

    def run(send: Send) -> None:
        send(1, 1)
        generated(load, 1)
        for clients in counts:
            rows.append(measure(send, load, clients, given.requests, given.repeats))
            print(json.dumps(rows[-1]), flush=True)

    if given.way == "direct":
        worker = Worker(model, rows=max(counts), queue=max(counts))
        worker.start()
        print(worker.room)
        run(direct(load, worker))
        worker.drain(10)
    else:
        ours = given.way == "http"
        with server(commands[given.way], "/ready" if ours else "/health", port) as process:
            if given.minutes:
                found = memory(load, port, process, given.minutes)
            elif ours:
                run(over_http(load, port, our_body, "/v1/completions"))
            else:
                body = partial(their_body, given.model, tokenizer)
                run(over_http(load, port, body, "/v1/completions"))
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    way = given.way + ("-batching" if given.batching else "")
    if given.minutes:
        way, told = "memory", found
    else:
        told = {
            "threads": torch.get_num_threads(), "precision": given.precision,
            "prompt": given.prompt, "new": given.new, **sampler, "stream": load.stream,
            "loads": rows,
        }  # fmt: skip
    machine = {"machine": vars(measure_machine(model.device))}
    record.setdefault(way, {})[given.name or given.model] = machine | told
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
