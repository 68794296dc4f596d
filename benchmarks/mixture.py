"""What a mixture of block sizes and a causal clean stream cost in likelihood, at equal tokens.

    python benchmarks/mixture.py TEXT [--seeds 0,1] [--only block4,mixed]

Each model is a `nano` trained on TEXT for 1,500 steps of 16 × 128 tokens and measured on windows
held out, at each of its block sizes: exact over masks up to L' = 4, else by 8 draws of exact_k. A
finished training and a measurement are kept (benchmarks/results/mixture.json), and a run that was
stopped goes on, from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import blockdiff
from blockdiff.data.corpora import load_corpus
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.evaluation.corpus import DEFAULTS, open_sequences

RESULTS = Path(__file__).parent / "results" / "mixture.json"
MODELS: dict[str, dict[str, Any]] = {
    "ar": {"objective": "ar"},
    "block4": {"block_size": 4},
    "block16": {"block_size": 16},
    "causal4": {"block_size": 4, "clean": "causal"},
    "mixed": {"block_size": "1,4,16", "block_weights": "0.3,0.35,0.35", "clean": "causal"},
}
LENGTH, STEPS, BATCH, WINDOWS, DRAWS = 128, 1500, 16, 512, 8


def measured(folder: Path, text: str) -> dict[str, Any]:
    """The bound of held-out windows at each of the model's block sizes."""
    model, tokenizer = blockdiff.load(folder, device="cpu")
    how = {name: value for name, value in DEFAULTS.items() if name != "part"}
    _, windows = open_sequences(
        model, tokenizer, text, part="validation", length=LENGTH, windows=WINDOWS, **how
    )
    found = {}
    for size in model.config.block_sizes:
        one = blockdiff.likelihood(model, windows["x_0"], draws=DRAWS, block_size=size)
        found[str(size)] = one.record()
    return found


def run(name: str, seed: int, text: str, work: Path) -> None:
    out, key = work / f"{name}-{seed}", f"{name}, seed {seed}"
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if key in records:
        return
    config = blockdiff.TrainConfig(
        data=text, out=str(out), tokenizer=str(work / "tokenizer"), length=LENGTH, steps=STEPS,
        batch_size=BATCH, lr=3e-3, lr_schedule="linear", warmup=100, dropout=0.0,
        ema=0.998, eval_windows=16, save_every=300, report_to="none", precision="bf16", seed=seed,
        resume=(out / "run.json").is_file(), **MODELS[name],
    )  # fmt: skip
    done = blockdiff.train(config, progress=False)
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    records[key] = {"model": name, "seed": seed, **MODELS[name], "steps": STEPS,
                    "tokens": STEPS * BATCH * LENGTH, "seconds": done.seconds,
                    "bounds": measured(out, text)}  # fmt: skip
    RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(key, {k: v["perplexity"] for k, v in records[key]["bounds"].items()}, flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("text")
    options.add_argument("--seeds", default="0,1")
    options.add_argument("--only", default=",".join(MODELS))
    options.add_argument("--work", type=Path, default=Path("runs/mixture"))
    given = options.parse_args()
    words = given.work / "tokenizer"
    if not words.is_dir():
        train_tokenizer(load_corpus(given.text), 1024).save_pretrained(words)
    for seed in map(int, given.seeds.split(",")):
        for name in given.only.split(","):
            run(name, seed, given.text, given.work)


if __name__ == "__main__":
    main()
