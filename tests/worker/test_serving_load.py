"""benchmarks/serving.py, minutely."""

import json
import runpy
from pathlib import Path

import pytest

import blockdiff
from blockdiff.sampling.generate import generate_tokens

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = SCRIPTS / "serving.py"


def test_a_little_load(tmp_path, capsys):
    main, out = runpy.run_path(str(SCRIPT))["main"], tmp_path / "serving.json"
    for name in ("one", "two"):
        main(
            f"starter --way direct --clients 1,3 --requests 2 --prompt 9 --new 6 --repeats 1 "
            f"--stream --name {name} --out {out}".split()
        )
    record = json.loads(out.read_text())["direct"]
    assert list(record) == ["one", "two"]  # nothing measured before is lost
    for load, clients in zip(record["two"]["loads"], (1, 3), strict=True):
        assert load["clients"] == clients and load["requests"] == 2 * clients
        assert load["tokens_per_evaluation"] == pytest.approx(6 / 7, rel=0.3)
        assert 0 < load["first_token_p50"] <= load["first_token_p99"]
        assert load["of_generate"] > 0 and load["tokens_per_second"] > 0
    assert "3 rows of up to" in capsys.readouterr().out


def test_clients_over_http_are_counted_as_they_are_answered():
    pytest.importorskip("schemathesis")
    script = runpy.run_path(str(SCRIPT))
    sampler = {"sampler": "entropy_bound", "block_size": 8}
    load = script["Load"](blockdiff.load("starter")[0], 9, 16, sampler, True)
    with runpy.run_path(str(SCRIPTS / "serving_schema.py"))["starter"](16) as address:
        port = int(address.rsplit(":", 1)[1])
        send = script["over_http"](load, port, script["our_body"], "/v1/completions")
        seconds, records = send(3, 5)
    jobs = [load.job(number) for number in range(5)]
    alone = [generate_tokens(load.model, [job.prompt], job.options) for job in jobs]
    assert sum(one.tokens for one in records) == 5 * 16
    assert sum(one.evaluations for one in records) == sum(one.nfe[0] for one in alone)
    assert all(0 < one.first <= one.seconds < seconds for one in records)
