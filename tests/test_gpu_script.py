"""benchmarks/gpu.py on a CPU, minutely: every row answers, nothing but the GPU image is needed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
# What a machine has that has torch and transformers alone, and what these bring.
THERE = {
    "torch", "transformers", "accelerate", "safetensors", "psutil", "rich",
    "numpy", "huggingface_hub", "tokenizers",
}  # fmt: skip
# Of our own dependencies, what it lacks: hidden from transformers too, which looks for some.
LACKS = {"click", "datasets", "docstring_parser", "matplotlib", "pyarrow", "scipy", "tensorboard"}
# Python runs this before anything else.
GUARD = f"""
import builtins, importlib.machinery, os, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {LACKS!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [
    Without if x is importlib.machinery.PathFinder else x for x in sys.meta_path
]
known = {THERE!r} | {{"blockdiff", "helpers", "adapted"}} | sys.stdlib_module_names
plain = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    file = (globals or {{}}).get("__file__") or ""
    ours = "/src/blockdiff/" in file or file.endswith(("/gpu.py", "/tests/helpers.py"))
    if ours and level == 0 and name.split(".")[0] not in known:
        with open(os.environ["FOREIGN"], "a") as out:
            print(name, "in", file, file=out)
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
"""


def run(script: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(GUARD)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "FOREIGN": str(folder / "foreign"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), *options, "--out", str(folder / "gpu.json")],
        capture_output=True, text=True, env=os.environ | own, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("smoke")
    done = run(SCRIPT, folder, "--device", "cpu", "--smoke")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "gpu.json").read_text()), folder


def test_every_row_answers(smoke: tuple[str, dict[str, Any], Path]) -> None:
    _, record, _ = smoke
    wrong = [row for row in record["rows"] if row["ok"] is False]
    assert not wrong
    right = [row["name"] for row in record["rows"] if row["ok"]]
    for begin in ("golden", "training against", "graphs against", "train after", "FSDP2", "host"):
        assert any(name.startswith(begin) for name in right), begin
    seconds = {row["name"]: row["figures"].get("seconds") for row in record["rows"]}
    for name in ("train, flex", "train, ar", "sample 1, ours", "sample 1, int8", "loss alone"):
        assert all(found > 0 for found in seconds[name])  # each repeat: the spread is there
    assert record["device"] and record["torch"] and record["smoke"]


def test_every_expectation_has_a_row(smoke: tuple[str, dict[str, Any], Path]) -> None:
    _, record, _ = smoke
    settled = {name for row in record["rows"] for name in row["settles"].split()}
    assert settled == set(record["expected"])


def test_a_smoke_run_measures_no_aim(smoke: tuple[str, dict[str, Any], Path]) -> None:
    """The table is last and short; a CPU's figures are nobody's."""
    out, record, _ = smoke
    names = {row["name"] for row in record["rows"]}
    rows = {row for _, row, *_ in runpy.run_path(str(SCRIPT))["AIMS"]}
    assert {name for name in rows if "64" not in name} <= names
    assert all(aim["measured"] is None for aim in record["aims"].values())
    table = out.split("=== ")[1].splitlines()
    assert len(table) < 60 and sum("unmeasured, at least" in line for line in table) == len(rows)


def test_nothing_else_is_imported(smoke: tuple[str, dict[str, Any], Path]) -> None:
    foreign = smoke[2] / "foreign"
    assert not foreign.exists(), foreign.read_text()


def test_a_row_that_fails_hangs_or_dies_is_a_row(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    text = text.replace("Path(__file__).resolve().parents[1]", f"Path({str(SCRIPT.parents[1])!r})")
    text = text.replace("ROW_SECONDS = 120", "ROW_SECONDS = 1")
    rows = """
    add("x raises", "", lambda s: 1 / 0)
    add("x dies", "", lambda s: os._exit(9))
    add("x hangs", "", lambda s: time.sleep(60))
    add("x goes on", "", lambda s: Found("well", True))
"""
    begin = '    add("rate of products", "G8", rates)\n'
    assert text.count(begin) == 1
    copy = tmp_path / "gpu.py"
    copy.write_text(text.replace(begin, rows + begin))
    done = run(copy, tmp_path, "--device", "cpu", "--smoke", "--only", "x ")
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert [row["ok"] for row in found.values()] == [False, False, False, True]
    assert "ZeroDivisionError" in found["x raises"]["text"]
    assert "exit code 9" in found["x dies"]["text"] and "1 s" in found["x hangs"]["text"]


def test_a_device_there_is_not_is_one_line(tmp_path: Path) -> None:
    done = run(SCRIPT, tmp_path, "--device", "abacus")
    assert done.returncode == 2 and not (tmp_path / "gpu.json").exists()
    assert done.stderr.splitlines()[-1].startswith("gpu.py: `device` 'abacus' cannot be used here")
