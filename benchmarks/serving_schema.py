"""Requests made of the server's OpenAPI schema, right ones and wrong ones: no 500, no status that
the schema does not name, no answer of another shape, and nothing wrong taken for right.

    python benchmarks/serving_schema.py --examples 500

writes how many were answered how, per route, to benchmarks/results/serving_schema.json. The first
failure ends it with a request that repeats it. The tests ask a few.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

import blockdiff
from blockdiff.serving.app import make_app
from blockdiff.serving.limits import Limits
from blockdiff.serving.port import listen
from blockdiff.serving.served import Served
from blockdiff.serving.worker import Worker

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# Right for sure, and answered in each of the shapes there are.
RIGHT = {
    "POST /v1/completions": [
        {"prompt": "A"} | more
        for more in ({"n": 2, "logprobs": 1}, {"stream": True},
                     {"stream": True, "logprobs": 0, "stream_options": {"include_usage": True}})
    ],
    "POST /v1/chat/completions": [
        {"messages": [{"role": "user", "content": "A"}]} | more
        for more in ({"n": 2}, {"logprobs": True}, {"stream": True},
                     {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}})
    ],
    "POST /v1/denoise": [{"prompt": "A"}, {"prompt": "A", "sampler": "editing"}],
    "POST /v1/score": [{"context": "A", "continuation": ["b", "c"], "greedy": True}],
}  # fmt: skip
RESULT = Path(__file__).parent / "results" / "serving_schema.json"


def campaign(address: str, examples: int) -> dict[str, dict[str, int]]:
    """Route → status → how many requests got it: `RIGHT`, `examples` right and as many wrong ones.

    The same ones each time. Raises schemathesis' failure for an answer that is not as it should be.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    counts: dict[str, Counter[str]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        counts[operation.label] = count = Counter()
        # A path takes any text: only a body can be wrong.
        modes = list(GenerationMode) if operation.method == "post" else [GenerationMode.POSITIVE]
        for mode in modes:
            _ask(operation.as_strategy(mode), examples, count)
        for body in RIGHT.get(operation.label, []):
            case = operation.Case(body=body, media_type="application/json")
            response = case.call_and_validate(checks=CHECKS, timeout=60)
            count[str(response.status_code)] += 1
    return {route: dict(sorted(count.items())) for route, count in counts.items()}


def _ask(strategy, examples: int, count: Counter[str]) -> None:
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(strategy)
    def ask(case) -> None:
        response = case.call_and_validate(checks=CHECKS, timeout=60)
        count[str(response.status_code)] += 1

    ask()


@contextmanager
def starter(new_tokens: int) -> Iterator[str]:
    """The address of a server of the starter, in a thread; texts have at most so many tokens."""
    model, tokenizer = blockdiff.load("starter")
    worker = Worker(model, rows=16, queue=64)
    worker.start()
    served = Served("starter", model, tokenizer, worker)
    app = make_app({"starter": served}, Limits(new_tokens=new_tokens, body_bytes=2**26))
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, args=[[listener]], daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    worker.drain(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=300, help="of each kind and route")
    parser.add_argument("--address", help="of a server that runs; else one is started")
    given_ = parser.parse_args()
    if given_.address is not None:
        print(json.dumps(campaign(given_.address, given_.examples), indent=2))
        return
    with starter(16) as address:
        begin = time.perf_counter()
        answers = campaign(address, given_.examples)
    record = {
        "model": "starter",
        "examples": given_.examples,
        "checks": [check.__name__ for check in CHECKS],
        "seconds": round(time.perf_counter() - begin, 1),
        "requests": sum(sum(count.values()) for count in answers.values()),
        "answers": answers,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
