"""Two replicas of the server by Ray Serve, one of them killed under load: what became of requests?

    python benchmarks/replicas.py [--requests 60]

The official `openai` client, told never to retry, sends requests from eight threads, every third
one streamed; a third of the way through one replica's process is killed (SIGKILL). Each answer is
counted and compared with that of the model alone in this process. The result is
benchmarks/results/replicas.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil

import blockdiff
from blockdiff.serving.replicas import serve_replicas

RESULTS = Path(__file__).parent / "results" / "replicas.json"
TOKENS = 48
PROMPTS = [f"In the year {1800 + i} the people of" for i in range(7)]


def replicas() -> list[int]:
    """The processes that hold a model."""
    own = psutil.Process().children(recursive=True)
    return [p.pid for p in own if "ServeReplica" in " ".join(p.cmdline())]


def asked(client: openai.OpenAI, number: int) -> dict[str, Any]:
    """One request's fate: what it was answered, and after how many seconds."""
    begin = time.monotonic()
    told: dict[str, Any] = {
        "model": "starter", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": TOKENS,
        "seed": number,
    }  # fmt: skip
    found: dict[str, Any] = {"number": number, "streamed": number % 3 == 0}
    try:
        if found["streamed"]:
            text = ""
            for part in client.completions.create(stream=True, **told):
                text += part.choices[0].text if part.choices else ""
        else:
            text = client.completions.create(**told).choices[0].text
        found |= {"answer": "text", "text": text}
    except openai.APIStatusError as error:
        found["answer"] = f"status {error.status_code}"
    except openai.APIError as error:
        # What a stream that had begun says in its last event.
        found["answer"] = f"error in the stream: {error.code or type(error).__name__}"
    except Exception as error:
        found["answer"] = type(error).__name__
    found["seconds"] = time.monotonic() - begin
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60)
    count = parser.parse_args().requests
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    serve_replicas("starter", replicas=2, port=port, device="cpu")
    record: dict[str, Any] = {
        "model": "starter", "replicas": 2, "requests": count, "clients": 8,
        "new_tokens": TOKENS, "seconds_to_start": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120
    )
    processes = replicas()
    assert len(processes) == 2, processes
    killed = threading.Event()
    done: list[dict[str, Any]] = []

    def one(number: int) -> None:
        done.append(asked(client, number))
        if len(done) >= count // 3 and not killed.is_set():
            killed.set()
            os.kill(processes[0], signal.SIGKILL)
            record["killed_after_answers"] = len(done)

    begin = time.monotonic()
    with ThreadPoolExecutor(record["clients"]) as pool:
        list(pool.map(one, range(count)))
    record["seconds"] = round(time.monotonic() - begin, 1)
    end = time.monotonic() + 120
    while len(replicas()) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    record["replicas_in_the_end"] = len(replicas())
    record["answers"] = dict(Counter(one["answer"] for one in done))
    model, tokenizer = blockdiff.load("starter", device="cpu")
    different = 0
    for fate in done:
        if fate["answer"] == "text":
            alone = blockdiff.generate(
                model, PROMPTS[fate["number"] % len(PROMPTS)], tokenizer=tokenizer,
                max_new_tokens=TOKENS, seed=fate["number"],
            )  # fmt: skip
            different += alone.texts[0] != fate["text"]
    record["texts_that_differ_from_the_model_alone"] = different
    times = sorted(one["seconds"] for one in done)
    record["seconds_of_an_answer"] = {
        "median": round(times[len(times) // 2], 2), "longest": round(times[-1], 2),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1), flush=True)

    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
