"""The server's OpenAPI schema is true: what is made of it is answered as it says."""

import copy
import runpy
from pathlib import Path

import pytest

schemathesis = pytest.importorskip("schemathesis")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")

from schemathesis.core.failures import FailureGroup  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serving_schema.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def address(script):
    with script["starter"](4) as found:
        yield found


def test_requests_made_of_the_schema_are_answered_as_it_says(address, script):
    """A few of each route, right ones and wrong ones; the script asks many."""
    answers = script["campaign"](address, 10)
    assert {"POST /v1/completions", "GET /ready", "POST /v1/score"} <= set(answers)
    for route, count in answers.items():
        if route.startswith("POST"):
            assert count["200"] >= len(script["RIGHT"][route])
            assert count.get("400", 0) >= 5, "wrong ones are among them"
            assert set(count) <= {"200", "400", "404"}, route
    assert httpx.get(f"{address}/ready").status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "right", "wrong"),
    [
        ("POST /v1/completions", {"prompt": "A"}, b'"text":', b'"txt":'),
        ("POST /v1/completions", {"prompt": "A", "stream": True}, b'"index": 0', b'"index": "0"'),
        ("POST /v1/chat/completions", {"messages": [{"role": "user", "content": "A"}],
                                       "stream": True}, b'"delta":', b'"message":'),
        ("POST /v1/denoise", {"prompt": "A"}, b"event: start", b"event: begin"),
        ("POST /v1/denoise", {"prompt": "A"}, b'"nfe":', b'"evaluations":'),
    ],
)  # fmt: skip
def test_an_answer_of_another_shape_is_seen(address, script, route, body, right, wrong):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operation = next(o.ok() for o in schema.get_all_operations() if o.ok().label == route)
    case = operation.Case(body=body, media_type="application/json")
    checks, response = script["CHECKS"], case.call()
    other = copy.copy(response)
    other.content = response.content.replace(right, wrong)
    assert other.content != response.content
    case.validate_response(response, checks=checks)
    with pytest.raises(FailureGroup, match="schema"):
        case.validate_response(other, checks=checks)
