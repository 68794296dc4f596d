"""How much memory packing takes: 500 MB of text, in many documents and in a single one.

    python benchmarks/packing_memory.py             both, some minutes; writes results/
    python benchmarks/packing_memory.py many 20     one of them, so many MB

Each is split, and both sides are packed, as `train` does it with the starter's tokenizer, in a
process of its own; the peak is that process's resident memory, libraries included.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "packing-memory.json"
LIMIT = 1.5e9  # bytes
WORDS = 4_000
LINE = 400  # characters or a little more
DOCUMENT = 5  # lines


def write_corpus(path: Path, kind: str, size: int) -> None:
    """Random words, the common ones more often; a JSON line a document, or one text file."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    # Drawn once, then dealt: drawing every word of 500 MB would take longer than packing.
    lines = [" ".join(rng.choices(words, weights, k=LINE // 6)) for _ in range(20_000)]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            chosen = rng.choices(lines, k=DOCUMENT)
            if kind == "many":
                written += file.write(json.dumps({"text": "\n".join(chosen)}) + "\n")
            else:
                written += file.write("\n".join(chosen) + "\n")


def measure(path: Path, cache: Path) -> dict[str, object]:
    from blockdiff.data.corpora import load_corpus, split_documents
    from blockdiff.data.packing import pack
    from blockdiff.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("starter")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    parts = split_documents(load_corpus(str(path)), 0.05, 0, progress=True)
    packed = [pack(part, tokenizer, length=1024, cache_dir=cache, progress=True) for part in parts]
    return {
        "bytes": sum(windows.bytes for windows in packed),
        "tokens": sum(windows.corpus_tokens for windows in packed),
        "seconds": round(time.perf_counter() - begin, 1),
        "libraries_bytes": before * 1024,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_alone(kind: str, size: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("corpus.jsonl" if kind == "many" else "corpus.txt")
        write_corpus(path, kind, size)
        command = [sys.executable, __file__, "measure", str(path), str(Path(folder) / "cache")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, object] = json.loads(done.stdout)
    return record


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    if len(sys.argv) > 1:
        print(json.dumps(measure_alone(sys.argv[1], int(float(sys.argv[2]) * 1e6))))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line sets it
    record: dict[str, object] = {"limit_bytes": LIMIT}
    for kind in ("many", "one"):
        found = measure_alone(kind, 500_000_000)
        record[kind] = found
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(kind, found, flush=True)


if __name__ == "__main__":
    main()
