"""The server's OpenAPI schema is true: what is made of it is answered as it says."""

import runpy
import threading
import time
from pathlib import Path

import pytest

import blockdiff

pytest.importorskip("schemathesis")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")

from blockdiff.serving.app import make_app  # noqa: E402
from blockdiff.serving.limits import Limits  # noqa: E402
from blockdiff.serving.port import listen  # noqa: E402
from blockdiff.serving.served import Served  # noqa: E402
from blockdiff.serving.worker import Worker  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serving_schema.py"


def test_requests_made_of_the_schema_are_answered_as_it_says():
    """A few of each route, right ones and wrong ones; the script asks many."""
    model, tokenizer = blockdiff.load("starter")
    worker = Worker(model, rows=16, queue=64)
    worker.start()
    served = Served("starter", model, tokenizer, worker)
    app = make_app({"starter": served}, Limits(new_tokens=4, body_bytes=2**26))
    taken = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    try:
        answers = runpy.run_path(str(SCRIPT))["campaign"](address, 10)
        assert {"POST /v1/completions", "GET /ready", "POST /v1/score"} <= set(answers)
        for route, count in answers.items():
            if route.startswith("POST"):
                assert count.get("400", 0) >= 5, "wrong ones are among them"
                assert set(count) <= {"200", "400", "404"}, route
        assert httpx.get(f"{address}/ready").status_code == 200
    finally:
        server.should_exit = True
        thread.join(10)
        worker.drain(0)
