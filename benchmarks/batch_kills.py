"""Jobs that are killed at random moments and resumed: is the file that of an uninterrupted one?

    python benchmarks/batch_kills.py [--kills 20] [--seed 0]

For each task (generate, score, evaluate) one job runs through; a second one is killed (SIGKILL) at
a random moment, started again, killed again …, and at last runs through. The two files are compared
byte by byte. Wherever a kill fell, loading included, nothing may be lost, doubled or different. Few
texts are written at once, for units (see blockdiff.many) of which a run between two kills does
several. The result is benchmarks/results/batch-kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results" / "batch-kills.json"
TEXT = "The people of the United States in order to form a more perfect union and"


def prepared(folder: Path, lines: int) -> dict[str, list[str]]:
    """Task → the words of its command, but for the file it writes."""
    draw, words = random.Random(0), TEXT.split()
    texts = [" ".join(draw.sample(words, draw.randint(1, 6))) for _ in range(lines)]
    prompts = [
        {"prompt": text, "max_new_tokens": draw.choice([4, 16, 64])}
        | ({"id": f"p{i}"} if i % 3 == 0 else {}) | ({"threshold": 0.7} if i % 4 == 0 else {})
        for i, text in enumerate(texts)
    ]  # fmt: skip
    pairs = [{"context": text, "continuation": f" {draw.choice(words)}"} for text in texts]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        lined = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lined, encoding="utf-8")
    (folder / "text.txt").write_text(" ".join(texts * 8), encoding="utf-8")
    return {
        "generate": ["generate", "starter", "--prompt-file", str(folder / "prompts.jsonl"),
                     "--batch-size", "4"],
        "score": ["score", "starter", "--file", str(folder / "pairs.jsonl"), "--batch-size", "8"],
        "evaluate": ["evaluate", "starter", str(folder / "text.txt"), "--length", "64",
                     "--batch-size", "4"],
    }  # fmt: skip


def started(words: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "blockdiff", *words, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(folder: Path, words: list[str], kills: int, draw: random.Random) -> dict[str, object]:
    whole, out = folder / f"{words[0]}-whole.jsonl", folder / f"{words[0]}.jsonl"
    begin = time.monotonic()
    process = started(words, whole)
    first = None
    while process.poll() is None:
        if first is None and whole.exists() and whole.stat().st_size:
            first = time.monotonic() - begin
        time.sleep(0.002)
    assert process.returncode == 0
    took = time.monotonic() - begin
    assert first is not None
    found: list[dict[str, object]] = []
    ended = 0
    while len(found) < kills:
        # Most kills while lines are written: from just before the first one could be.
        wait = draw.uniform(0.8 * first, first + 2 * (took - first) / kills)
        process = started(words, out)
        try:
            process.wait(wait)
            ended += 1  # it had come to its end: begin anew, kills are what is counted
            assert process.returncode == 0 and out.read_bytes() == whole.read_bytes()
            out.unlink()
            out.with_name(out.name + ".job").unlink()
            continue
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        written = out.read_bytes() if out.exists() else b""
        whole_lines = written.rpartition(b"\n")[0]
        assert whole.read_bytes().startswith(written), "always a beginning of the whole file"
        found.append({"seconds": round(wait, 2), "lines": whole_lines.count(b"\n") + 1
                      if whole_lines else 0, "half_a_line": not written.endswith(b"\n")
                      and bool(written)})  # fmt: skip
        print(words[0], found[-1], flush=True)
    code = started(words, out).wait()
    lines = whole.read_bytes().count(b"\n")
    return {
        "lines": lines, "bytes": whole.stat().st_size, "seconds_uninterrupted": round(took, 1),
        "kills": len(found), "runs_that_ended_first": ended, "killed": found,
        "exit_code": code, "equal_byte_by_byte": out.read_bytes() == whole.read_bytes(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    wish = parser.parse_args()
    record: dict[str, object] = {"model": "starter", "precision": "float32", "seed": wish.seed}
    with tempfile.TemporaryDirectory() as name:
        for task, words in prepared(Path(name), wish.lines).items():
            draw = random.Random(f"{wish.seed} {task}")
            record[task] = measure(Path(name), words, wish.kills, draw)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main()
