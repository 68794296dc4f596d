"""How a server holds load: clients that each ask for a text, and for the next when it is there.

    python benchmarks/serving.py --direct starter                 the worker alone, without HTTP
    python benchmarks/serving.py --direct starter --clients 1,16 --new 64 --repeats 2

For each number of clients: tokens a second, and the time until the first new token was final and
from there for each token (p50 and p99), beside one `generate` of as many rows, measured in turn
with it, so that what else the machine does meets both. No two prompts are alike. Results:
benchmarks/results/serving.json, under the way the load was sent and the model.

A way to send load is a function (clients, requests) → (seconds, records), in `WAYS`.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
        options = SamplingOptions(self.new, seed=number, stop="none", **self.sampler)
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


WAYS = {"direct": direct}


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
    parser.add_argument("--direct", action="store_true", required=True, help="without HTTP")
    parser.add_argument("--clients", default="1,8,16,32,128", help="how many, with commas")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a text")
    parser.add_argument("--repeats", type=int, default=3, help="load and generate, in turn")
    parser.add_argument("--sampler", default="first_hitting")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--stream", action="store_true", help="each evaluation is told")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--name", help="what the model is called in the results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    model, _ = blockdiff.load(given.model)
    convert(model, given.precision, model.device)
    model.eval()
    sampler = {"sampler": given.sampler}
    if given.threshold is not None:
        sampler["threshold"] = given.threshold
    load = Load(model, given.prompt, given.new, sampler, given.stream)
    counts = [int(word) for word in given.clients.split(",")]
    worker = Worker(model, rows=max(counts), queue=max(counts))
    worker.start()
    print(worker.room)
    send = direct(load, worker)
    send(1, 1)
    generated(load, 1)
    rows = []
    for clients in counts:
        rows.append(measure(send, load, clients, given.requests, given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    worker.drain(10)
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    record.setdefault("direct", {})[given.name or given.model] = {
        "machine": vars(measure_machine(model.device)),
        "threads": torch.get_num_threads(),
        "precision": given.precision,
        "prompt": given.prompt, "new": given.new, **sampler, "stream": given.stream,
        "loads": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
