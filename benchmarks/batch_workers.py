"""`blockdiff batch` with two workers: its file, the time Ray takes, and a worker that is killed.

    python benchmarks/batch_workers.py [--lines 96]

One process writes the prompts (`blockdiff generate --out`), two workers of Ray Data write them, two
more with one killed (SIGKILL) after a third of the lines, and the pairs are scored both ways. The
files are compared byte by byte. The result is benchmarks/results/batch-workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from batch_kills import prepared

RESULTS = Path(__file__).parent / "results" / "batch-workers.json"
STARTING = """
import time
begin = time.monotonic()
from blockdiff.serving.batch import cluster
import ray
imported = time.monotonic()
with cluster(None):
    print(imported - begin, time.monotonic() - imported)
"""


def blockdiff(*words: str, kill_after: tuple[Path, int] | None = None) -> dict[str, Any]:
    """Runs a command; a worker of it dies once a file has so many lines."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "blockdiff", *words], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    found: dict[str, Any] = {}
    while kill_after is not None and process.poll() is None and not found:
        time.sleep(0.01)
        path, lines = kill_after
        if not path.exists() or path.read_bytes().count(b"\n") < lines:
            continue
        for one in psutil.Process(process.pid).children(recursive=True):
            if "MapWorker" in " ".join(one.cmdline()):
                os.kill(one.pid, signal.SIGKILL)
                found = {"killed_after_lines": path.read_bytes().count(b"\n")}
                break
    said = process.communicate()[0]
    found |= {"exit_code": process.returncode, "seconds": round(time.monotonic() - begin, 1)}
    # Ray's own noise is to be none.
    found["lines_said"] = len(said.splitlines())
    print(words[0], found, said, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=96)
    count = parser.parse_args().lines
    spent = subprocess.run(
        [sys.executable, "-c", STARTING], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()[-2:]
    record: dict[str, Any] = {
        "model": "starter", "lines": count,
        "seconds_to_import_ray": round(float(spent[0]), 1),
        "seconds_of_ray_init": round(float(spent[1]), 1),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, words in list(prepared(folder, count).items())[:2]:
            one, two, killed = (folder / f"{task}{i}.jsonl" for i in range(3))
            file = words[3]
            size = words[4:]
            record[task] = {"one_process": blockdiff(*words, "--out", str(one))}
            both = ["batch", "starter", "--task", task, "--prompt-file", file, *size, "--workers",
                    "2", "--device", "cpu"]  # fmt: skip
            record[task]["two_workers"] = blockdiff(*both, "--out", str(two))
            record[task]["two_workers"]["equal_byte_by_byte"] = one.read_bytes() == two.read_bytes()
            if task == "generate":
                found = blockdiff(*both, "--out", str(killed), kill_after=(killed, count // 3))
                found["equal_byte_by_byte"] = one.read_bytes() == killed.read_bytes()
                record[task]["two_workers_one_killed"] = found
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main()
