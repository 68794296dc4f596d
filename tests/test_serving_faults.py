"""What goes wrong with a server: a few of each fault that `benchmarks/serving_faults.py` shows."""

import importlib
from pathlib import Path

import pytest

from processes import started

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("serving_faults")


@pytest.fixture
def launch(tmp_path):
    """Servers forked from one that has imported torch already, as the script starts them."""
    processes = []

    def one(words):
        streams = tmp_path / str(len(processes))
        process = started(streams, words, OMP_NUM_THREADS="1")
        processes.append(process)

        def ended(seconds):
            process.join(seconds)
            return process.exitcode

        import time

        until = time.monotonic() + 60
        while not (said := (streams / "stderr").read_text().partition("\n")[0] if (streams / "stderr").exists() else ""):
            assert time.monotonic() < until
            time.sleep(0.01)
        return process.pid, ended, said

    yield one
    for process in processes:
        process.kill()
        process.join()


def test_the_server_goes_on_and_nobody_gets_another_s_text(script, launch, tmp_path):
    record = script.campaign("starter", True, tmp_path, launch)
    assert record["wrong"] == []
    for name, found in record["faults"].items():
        if name != "sigkill":
            assert found["equal"] == found["compared"] >= 4, name
            
