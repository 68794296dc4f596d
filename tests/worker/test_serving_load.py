"""benchmarks/serving.py, minutely."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


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
