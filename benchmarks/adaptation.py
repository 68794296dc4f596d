"""A pretrained causal model adapted: its bound before and after a short training, by convention.

    python benchmarks/adaptation.py MODEL TEXT [--steps 60]     the tables of docs/adaptation.md

MODEL is the folder of a causal language model, TEXT a corpus. Each row is measured once and kept
in benchmarks/results/adaptation.json, so that an interrupted run goes on. Times of steps are
measured alone, at the end (--only speed): nothing else may run then.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import blockdiff
from blockdiff.attention.masks import dense_mask
from blockdiff.evaluation.corpus import DEFAULTS, open_sequences
from blockdiff.models.loading import adapt_folder

RESULTS = Path(__file__).parent / "results" / "adaptation.json"
CONVENTIONS = (("shift", "causal"), ("shift", "block"), ("same", "causal"), ("same", "block"))
SIZES, TRAINED = (1, 4, 8), 8
LENGTH, WINDOWS, BATCH = 256, 16, 2
PROMPT = "Fellow citizens of the Senate and of the House of Representatives:"


def kept(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of that name, measured where it is not there yet."""
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if name not in records:
        records[name] = measure()
        RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(name, records[name], flush=True)
    found: dict[str, Any] = records[name]
    return found


def bounds(folder: Path, text: str, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Perplexity of held-out windows by block size, exact at L' = 1 under shift."""
    model, tokenizer = blockdiff.load(folder, device="cpu")
    how = {name: value for name, value in DEFAULTS.items() if name != "part"}
    _, windows = open_sequences(
        model, tokenizer, text, part="validation", length=LENGTH, windows=WINDOWS, **how
    )
    found = {}
    for size in sizes if not model.config.causal else (1,):
        one = blockdiff.likelihood(model, windows["x_0"], "exact_k", 2, block_size=size)
        found[str(size)] = {"perplexity": one.perplexity, "nats": one.nats_per_token,
                            "stderr": one.stderr}  # fmt: skip
    return found


def trained(base: Path, out: Path, text: str, steps: int, **options: Any) -> dict[str, Any]:
    """What training from `base` leaves in `out`, and what it took."""
    config = blockdiff.TrainConfig(
        data=text, out=str(out), init_from=str(base), length=LENGTH, block_size=TRAINED,
        steps=steps, batch_size=BATCH, warmup=5, ema=0.0, eval_windows=2,
        report_to="none", overwrite=True, precision="bf16", **options,
    )  # fmt: skip
    done = blockdiff.train(config, progress=False)
    return {"steps": steps, "seconds": done.seconds, "bounds": bounds(out, text)}


def sample(folder: Path) -> dict[str, Any]:
    """Text by two samplers, and what it cost."""
    model, tokenizer = blockdiff.load(folder, device="cpu")
    found = {}
    for sampler in ("first_hitting", "threshold"):
        done = blockdiff.generate(
            model, PROMPT, tokenizer=tokenizer, max_new_tokens=64, sampler=sampler, stop="none",
            temperature=0.7, seed=1,
        )  # fmt: skip
        per_nfe = sum(map(len, done.tokens)) / sum(done.nfe)
        found[sampler] = {"text": done.texts[0], "tokens_per_evaluation": per_nfe}
    return found


def step_speed(folder: Path, way: str) -> dict[str, Any]:
    """Median seconds of a forward and backward of 2 × 256 tokens, and the peak of memory above."""
    model = blockdiff.load_model(folder).train()
    x_0 = torch.randint(1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    model(x_0, labels=x_0) if way == "ours" else None
    process, times = psutil.Process(), []
    gc.collect()
    peak = before = process.memory_info().rss
    for _ in range(5):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x_0, labels=x_0).loss if way == "ours" else plain_loss(model, x_0)
            peak = max(peak, process.memory_info().rss)
            loss.backward()
        peak = max(peak, process.memory_info().rss)
        times.append(time.perf_counter() - begin)
        model.zero_grad()
    return {"seconds": sorted(times), "peak_gib": peak / 2**30, "before_gib": before / 2**30}


def plain_loss(model: Any, x_0: torch.Tensor) -> torch.Tensor:
    """The plain way: 2L tokens, a 4-D mask, and all their logits."""
    config, lm = model.config, model.lm
    layout = config.layout_of(LENGTH)
    seen = dense_mask(layout, "two_stream", x_0.device)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    masked = torch.rand(x_0.shape) < 0.5
    masked &= ~layout.starts(x_0.device)
    x_t = torch.where(masked, config.mask_token_id, x_0)
    positions = torch.arange(LENGTH).repeat(len(x_0), 2)
    lm.set_attn_implementation("sdpa")
    logits = lm(
        input_ids=torch.cat([x_0, x_t], 1), position_ids=positions,
        attention_mask=bias[None, None].expand(len(x_0), -1, -1, -1), use_cache=False,
    ).logits[:, LENGTH:]  # fmt: skip
    lm.set_attn_implementation("blockdiff")
    shifted, targets = logits[:, :-1][masked[:, 1:]], x_0[:, 1:][masked[:, 1:]]
    return torch.nn.functional.cross_entropy(shifted.float(), targets)


def low_rank(base: Path, given: argparse.Namespace) -> None:
    """LoRA for as many steps as take the time that full training took."""
    options: dict[str, Any] = {"lr": 1e-3, "lora": 16}
    trial = given.work / "lora-trial"
    lora = kept("lora trial", lambda: trained(base, trial, given.text, 6, **options))
    full = json.loads(RESULTS.read_text(encoding="utf-8"))["full shift-causal"]
    steps = round(full["seconds"] / lora["seconds"] * 6)
    kept("lora", lambda: trained(base, given.work / "lora", given.text, steps, **options))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path)
    options.add_argument("text")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--work", type=Path, default=Path("runs/adaptation"))
    options.add_argument("--only", default="")
    given = options.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bases = {}
    for prediction, clean in CONVENTIONS:
        bases[prediction, clean] = base = given.work / f"{prediction}-{clean}"
        if not (base / "config.json").is_file():
            adapt_folder(given.model, base, block_size=TRAINED, prediction=prediction, clean=clean)
    best = bases[CONVENTIONS[0]]
    if "speed" not in given.only:
        kept("ar", lambda: bounds(given.model, given.text))
        for name, base in bases.items():
            kept(f"before {'-'.join(name)}", lambda base=base: bounds(base, given.text))
        # The defaults and the way furthest from them first, then LoRA, which is compared with them.
        for name in (CONVENTIONS[0], CONVENTIONS[3], "lora", CONVENTIONS[1], CONVENTIONS[2]):
            if name == "lora":
                low_rank(best, given)
                continue
            base, word = bases[name], "-".join(name)
            out = given.work / f"full-{word}"
            kept(
                f"full {word}",
                lambda base=base, out=out: trained(base, out, given.text, given.steps, lr=2e-4),
            )
        places = ("lora", "full-shift-causal")
        kept("samples", lambda: {name: sample(given.work / name) for name in places})
    if "speed" in given.only:
        for way in ("plain", "ours"):
            kept(f"speed {way}", lambda way=way: step_speed(bases["shift", "causal"], way))


if __name__ == "__main__":
    main()
