"""LAMBADA and a choice made from it, through lm-evaluation-harness: models side by side.

LAMBADA=lambada.jsonl.xz python benchmarks/harness.py --limit 500 \
    l4=pretrained=starter l1=pretrained=starter,block_size=1 ar=pretrained=runs/ar

A result is benchmarks/results/lm_eval/NAME.json, and the table of all of them is printed.
"""

import argparse
import json
import re
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import blockdiff  # noqa: F401 - names our model to lm_eval
from blockdiff.outputs import to_json
from blockdiff.printing import markdown_table

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results" / "lm_eval"
TASKS = ["lambada_local", "lambada_choice"]
# Of the harness's record what tells a run again.
KEPT = ("model_args", "model_num_parameters", "model_kind", "model_block_size", "model_precision",
        "max_length", "estimator", "draws", "likelihood_is", "likelihood_stderr_mean",
        "likelihood_stderr_max", "left_truncated", "bootstrap_iters")  # fmt: skip


def measure(model_args: str, limit: int | None) -> dict[str, object]:
    tasks = TaskManager(include_path=str(HOME / "recipes" / "lm_eval"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="blockdiff", model_args=model_args, tasks=TASKS, limit=limit, batch_size="auto",
        task_manager=tasks, bootstrap_iters=1000, log_samples=False,
    )  # fmt: skip
    # A result names the model, not where it lay.
    found["config"]["model_args"] = re.sub(r"(pretrained=)[^,]*/", r"\1", model_args)
    return {
        "passages": found["n-samples"][TASKS[0]]["effective"],
        "lm_eval": found["lm_eval_version"],
        "config": {name: found["config"].get(name) for name in KEPT},
        "results": {
            task: {k.removesuffix(",none"): v for k, v in figures.items() if ",none" in k}
            for task, figures in found["results"].items()
        },
    }


def line(name: str, record: dict) -> list[str]:
    words, choice = (record["results"][task] for task in TASKS)
    exact = record["config"]["likelihood_is"] == "exact"
    perplexity = f"{words['perplexity']:.3g} ± {words['perplexity_stderr']:.2g}"
    cells = [f"{100 * one['acc']:.1f} ± {100 * one['acc_stderr']:.1f}" for one in (words, choice)]
    error = record["config"]["likelihood_stderr_mean"]
    return [name, str(record["passages"]), ("" if exact else "≤ ") + perplexity, *cells,
            f"{error:.3f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL_ARGS")
    wish = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, _, model_args in (one.partition("=") for one in wish.models):
        record = measure(model_args, wish.limit)
        (RESULTS / f"{name}.json").write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
    head = ["model", "passages", "perplexity of the last word", "last word, %", "choice of 4, %",
            "error of an answer by its masks, nats"]  # fmt: skip
    rows = [line(path.stem, json.loads(path.read_text("utf-8")))
            for path in sorted(RESULTS.glob("*.json"))]  # fmt: skip
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
