"""What each way of decoding costs and gives: tokens/s, tokens an evaluation, a judge's perplexity.

    python benchmarks/decoding.py MODEL TEXT --judge JUDGE [--ways "ar;threshold 0.9"]

MODEL is a folder of ours or of a causal language model, TEXT a corpus, of whose held-out documents
the prompts are: 64 beginnings of 32 tokens, 128 new tokens. Quality and tokens an evaluation are
measured on all of them at once; speed on a few of them one by one, as one user waits for them, the
ways in turn, so that a ratio is of one run: nothing else may run then. Each cell is kept in
benchmarks/results/decoding.json; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import blockdiff
from blockdiff.evaluation.corpus import documents_of_run
from blockdiff.evaluation.judge import load_judge
from blockdiff.evaluation.statistics import mean_error, ratio_error
from blockdiff.models.weights import convert
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.stopping import token_entropy

RESULTS = Path(__file__).parent / "results" / "decoding.json"
PROMPTS, PROMPT_TOKENS, NEW = 64, 32, 128
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"block_size": 1},
    "first_hitting": {"sampler": "first_hitting"},
    "threshold 0.9": {"threshold": 0.9},
    "entropy_bound 0.1": {"entropy_bound": 0.1},
    "editing": {"sampler": "editing"},
    "verified, masks": {"sampler": "verified", "drafter": "masks"},
    "verified, 2 masks": {"sampler": "verified", "drafter": "masks", "drafts": 2},
    "verified, 4 masks": {"sampler": "verified", "drafter": "masks", "drafts": 4},
    "verified, table": {"sampler": "verified", "drafter": "table"},
}
THEIRS = "transformers"


def kept(key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if key not in records:
        records[key] = measure()
        RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(key, {k: v for k, v in records[key].items() if k != "seconds"}, flush=True)
    found: dict[str, Any] = records[key]
    return found


def beginnings(folder: str, text: str, tokenizer: Any) -> list[list[int]]:
    """64 prompts, spread over documents that the model's run held out, or 5% of another text."""
    documents, *_ = documents_of_run(folder, text, {"part": "validation"})
    ids = [tokenizer.encode(one, add_special_tokens=False) for one in documents]
    pieces = [
        row[i : i + PROMPT_TOKENS] for row in ids for i in range(0, len(row) - PROMPT_TOKENS, 160)
    ]
    return pieces[:: max(1, len(pieces) // PROMPTS)][:PROMPTS]


def options(way: dict[str, Any], temperature: float, seed: int) -> blockdiff.SamplingOptions:
    return blockdiff.SamplingOptions(
        max_new_tokens=NEW, stop="none", temperature=temperature, seed=seed, **way
    )


def quality(
    model: Any, tokenizer: Any, prompts: list[list[int]], wish: Any, judge: Any
) -> dict[str, Any]:
    """Tokens an evaluation, the prompt's included, and what the texts are like, with errors."""
    done = generate_tokens(model, prompts, wish)
    each = np.array([len(row) for row in done.tokens], float), np.array(done.nfe, float)
    entropies = np.array([token_entropy(row) for row in done.tokens])
    found = {
        "tokens_per_nfe": done.tokens_per_nfe, "tokens_per_nfe_stderr": ratio_error(*each),
        "entropy": float(entropies.mean()), "entropy_stderr": mean_error(entropies),
    }  # fmt: skip
    if judge is not None:
        texts = [
            tokenizer.decode(prompt + new, skip_special_tokens=True)
            for prompt, new in zip(prompts, done.tokens, strict=True)
        ]
        nats, count = (part.numpy() for part in judge.nats(texts))
        found["judge_perplexity"] = float(np.exp(nats.sum() / count.sum()))
        found["judge_perplexity_stderr"] = found["judge_perplexity"] * ratio_error(nats, count)
    return found


def speeds(
    runs: dict[str, Callable[[list[int]], int]], prompts: Sequence[list[int]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Seconds of each way for each prompt alone, the ways in turn."""
    for run in runs.values():
        run(prompts[0])  # the first time is another
    found: dict[str, list[float]] = {name: [] for name in runs}
    tokens = dict.fromkeys(runs, 0)
    for _ in range(repeats):
        for prompt in prompts:
            for name, run in runs.items():
                begin = time.perf_counter()
                tokens[name] += run(prompt)
                found[name].append(time.perf_counter() - begin)
    each = repeats * len(prompts)
    return {
        name: {
            "tokens_per_second": tokens[name] / each / statistics.median(found[name]),
            "seconds": found[name],
        }
        for name in runs
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=str)
    arguments.add_argument("text")
    arguments.add_argument("--name", help="what the model is called in the results")
    arguments.add_argument("--judge")
    arguments.add_argument("--ways", default=";".join(WAYS))
    arguments.add_argument("--theirs", help="the causal model's folder, for transformers' generate")
    arguments.add_argument("--precisions", default="float32,bf16")
    arguments.add_argument("--temperatures", default="1,0")
    arguments.add_argument("--speed-prompts", type=int, default=4)
    arguments.add_argument("--repeats", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", choices=["quality", "speed"])
    given = arguments.parse_args()
    name = given.name or Path(given.model).name
    ways = {way: own for way, own in WAYS.items() if way in given.ways.split(";")}
    judge = load_judge(given.judge) if given.judge else None
    for precision in given.precisions.split(","):
        model, tokenizer = blockdiff.load(given.model, device="cpu")
        convert(model, precision, model.device)
        prompts = beginnings(given.model, given.text, tokenizer)
        for temperature in map(float, given.temperatures.split(",")):
            where = f"{name}, {Path(given.text).name}, {precision}, T = {temperature:g}"
            wishes = {way: options(own, temperature, given.seed) for way, own in ways.items()}
            if given.only != "speed" and precision == "float32":
                for way, wish in wishes.items():
                    measure = partial(quality, model, tokenizer, prompts, wish, judge)
                    kept(f"{where}, {way}", measure)
            if given.only == "quality":
                continue
            runs = {way: partial(ours, model, wish) for way, wish in wishes.items()}
            if given.theirs:
                runs[THEIRS] = theirs(given.theirs, precision, temperature)
            few = prompts[: given.speed_prompts]
            kept(f"{where}, speed", partial(speeds, runs, few, given.repeats))


def ours(model: Any, wish: Any, prompt: list[int]) -> int:
    return len(generate_tokens(model, [prompt], wish).tokens[0])


def theirs(folder: str, precision: str, temperature: float) -> Callable[[list[int]], int]:
    from transformers import AutoModelForCausalLM

    kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
    lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kinds[precision]).eval()
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0}
    how: dict[str, Any] = sampled if temperature else {"do_sample": False}

    @torch.inference_mode()
    def run(prompt: list[int]) -> int:
        ids = torch.tensor([prompt])
        out = lm.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=NEW, max_new_tokens=NEW,
            pad_token_id=0, **how,
        )  # fmt: skip
        return out.shape[1] - len(prompt)

    return run


if __name__ == "__main__":
    main()
