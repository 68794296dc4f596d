"""The report: every table beside the paper's, every claim with its verdict.

Of the paper's figures only those are quoted that a second source confirms.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from blockdiff.plots import variance_plot
from blockdiff.reproduction import figures
from blockdiff.reproduction.plan import BLOCK_SIZES, CLIPS, COMPARED, Scale
from blockdiff.reproduction.results import Nats, Results, apart

# LM1B perplexities, and generative perplexities of OpenWebText models at L = 1,024.
PAPER_PERPLEXITY = {"ar": "22.83", "L4": "28.23", "mdlm": "31.78"}
PAPER_GENERATION = {"ar": "14.1", "L4": "25.7", "mdlm": "46.8"}
NAMES = {"ar": "AR", "mdlm": "MDLM", "sedd": "SEDD"}
# What the per-window arrays would only make long.
_ARRAYS = ("nats", "tokens", "metrics", "config", "lengths", "finish")


def write_report(folder: Path, scale: Scale, data: str) -> Path:
    """Writes report.md, its plots and results.json into the folder's `report`."""
    results = Results(folder, scale)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    figures.perplexity_by_block_size(results, out / "perplexity.png")
    figures.clip_course(results, out / "clips.png")
    figures.quality_by_nfe(results, out / "quality.png")
    figures.length_histogram(results, out / "lengths.png")
    records = [r for size in _sizes(results) for r in results[f"variance-L{size}"]["estimators"]]
    variance_plot(records, out / "variance.png", title="Noise of the estimators")
    (out / "results.json").write_text(
        json.dumps(_summary(results, data), indent=1) + "\n", encoding="utf-8"
    )
    parts = [_head(results, data), _perplexities(results), _blocks_of_one(results),
             _estimators(results), _initialisation(results), _variances(results),
             _clips(results), _generation(results), _times(results)]  # fmt: skip
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out / "report.md"


def _sizes(results: Results) -> list[int]:
    return [*BLOCK_SIZES, results.scale.length]


def _summary(results: Results, data: str) -> dict[str, Any]:
    """Every result without its arrays, and the perplexities over seeds."""
    models = _models(results)
    seeds = {name: results.nats(name) for name in models}
    return {
        "data": Path(data).name,
        "commit": _commit(results),
        "machine": _machine(),
        "over_seeds": {
            name: {
                "perplexity": x.perplexity, "interval_95": x.interval, "nats_per_token": x.mean,
                "stderr": x.stderr, "seeds": x.seeds,
            }
            for name, x in seeds.items()
        },
        "gap_closed": {size: results.gap_closed(f"L{size}") for size in (4, 8, 16)},
        "jobs": {
            name: {k: v for k, v in results[name].items() if k not in _ARRAYS}
            for name in results.jobs
        },
        "clip_course": {
            size: [m for m in results[f"s0-L{size}-clip-auto"]["metrics"] if "clip_beta" in m]
            for size in COMPARED
        },
    }  # fmt: skip


def _models(results: Results) -> list[str]:
    found = [
        job.settings["model"].partition("-")[2]
        for job in results.jobs.values()
        if job.kind == "likelihood"
    ]
    return list(dict.fromkeys(found))


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "torch": torch.__version__,
        "blockdiff": version("blockdiff"),
    }


def _commit(results: Results) -> str:
    """The commit of the code that made the plan; empty where it is not known."""
    plan = json.loads((results.folder / "plan.json").read_text(encoding="utf-8"))
    return str(plan.get("commit", ""))


def _processor() -> str:
    """The processor's own name where Linux tells it, and what counts for speed here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    extras = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    return " ".join([name[1].strip() if name else platform.machine(), *extras])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(model: Nats, bound: bool = True) -> str:
    low, high = model.interval
    return f"{'≤ ' if bound else ''}{model.perplexity:.2f} [{low:.2f}, {high:.2f}]"


def _verdict(holds: bool) -> str:
    return "**yes**" if holds else "**no**"


def _head(results: Results, data: str) -> str:
    scale, machine = results.scale, _machine()
    tokens = scale.steps * scale.batch_size * scale.length
    seconds = sum(results[name]["processor_seconds"] for name in results.jobs)
    cores = machine["cores"] or 1
    return f"""# The paper in miniature

`blockdiff reproduce paper-mini --data {Path(data).name}`: every model a `{scale.preset}` network on
passages of {scale.sentences} sentences, a BPE of {scale.vocab_size} tokens, context
{scale.length}, {tokens:,} tokens of training each ({scale.steps} steps of {scale.batch_size}
windows, Adam at {scale.lr:g}, EMA {scale.ema}). The block diffusion models start from the MDLM of
{scale.base_steps} steps and go on for {scale.fine_steps} at their own block size. {scale.seeds}
seeds of everything but what is marked. Measured on {scale.test_windows} windows of texts that no
model has seen; [..] is the 95% interval over windows.

On {cores} cores ({machine["processor"]}, torch {machine["torch"]}): {seconds / 3600:.2f} hours of
processor time, {seconds / 3600 / cores:.2f} hours with every core at work. Commit
{_commit(results)[:12] or "unknown"}. Every figure is in [results.json](results.json)."""


def _perplexities(results: Results) -> str:
    order = ["ar", "L1", "L4", "L8", "L16", "mdlm", "sedd"]
    models = {name: results.nats(name) for name in order}
    rows = []
    for name, model in models.items():
        seeds = [f"{results.nats(name, s).perplexity:.2f}" for s in results.seeds(name)]
        label = NAMES.get(name, f"BD3-LM L' = {name[1:]}")
        rows.append([label, _cell(model, name != "ar"), ", ".join(seeds),
                     f"{results.seconds(name):.0f} s", PAPER_PERPLEXITY.get(name, "")])  # fmt: skip
    claimed = ["ar", "L4", "L8", "L16", "mdlm"]
    verdicts = []
    clears = apart([models[x] for x in claimed])
    for (a, b), clear in zip(pairwise(claimed), clears, strict=True):
        verdicts.append(_order(results, a, b, clear))
    sedd = _order(results, "mdlm", "sedd", apart([models["mdlm"], models["sedd"]])[0], seed=0)
    shares = []
    for name in ("L4", "L8", "L16"):
        share, low, high = results.gap_closed(name)
        shares.append(f"L' = {name[1:]}: {share:.1%} [{low:.1%}, {high:.1%}]")
    enough = results.gap_closed("L4")[0] >= 0.40
    return "\n\n".join([
        "## Perplexity by block size\n\n![perplexity](perplexity.png)",
        table(["model", "test perplexity, mean of seeds", "seeds", "training, one core",
               "paper, LM1B"], rows),
        "Is each better than the next? Window by window, in nats per token, and whether the two "
        "95% intervals are apart:\n\n" + "\n".join([*verdicts, sedd]),
        f"Share of the gap from MDLM to AR that is closed (the paper: 40% at L' = 4): "
        f"{'; '.join(shares)}. At least the paper's share at L' = 4: {_verdict(enough)}.",
    ])  # fmt: skip


def _order(results: Results, a: str, b: str, clear: bool, seed: int | None = None) -> str:
    gap, error = results.nats(b, seed).minus(results.nats(a, seed))
    names = [NAMES.get(x, f"L' = {x[1:].partition('-')[0]}") for x in (a, b)]
    return (
        f"- {names[0]} < {names[1]}: {_verdict(gap > 1.96 * error)}, by {gap:.4f} ± {error:.4f}; "
        f"intervals apart: {'yes' if clear else 'no'}"
    )


def _blocks_of_one(results: Results) -> str:
    ar = results.nats("ar")
    rows = []
    labels = {
        "ar": "AR",
        "L1-from-ar": "exact_k, started from AR",
        "L1-scratch": "exact_k, from scratch",
        "L1": "exact_k, started from MDLM",
        "L1-bernoulli": "bernoulli, linear, started from MDLM",
    }
    for name, label in labels.items():
        model = results.nats(name)
        rows.append([label, _cell(model, False), f"{model.perplexity / ar.perplexity - 1:+.1%}"])
    exact = ("L1", "L1-from-ar", "L1-scratch")
    gap = min(results.nats(x).perplexity for x in exact) / ar.perplexity - 1
    return "\n\n".join([
        "## Blocks of one token",
        "At L' = 1 the bound is the likelihood. With every token masked (the paper's tuned "
        "schedule) `clipped` draws what `exact_k` draws, weight for weight (a test asserts it), so "
        "one run stands for both.",
        table(["L' = 1", "test perplexity", "against AR"], rows),
        f"Within 2% of AR by `exact_k`: {_verdict(gap <= 0.02)}, {gap:+.1%}.",
    ])  # fmt: skip


def _estimators(results: Results) -> str:
    parts = ["## Estimators and clips: what training with them gives"]
    for size in COMPARED:
        best = results.nats(f"L{size}")
        rows = [["exact_k, stratified", _cell(best), "", str(best.seeds)]]
        for name in ("bernoulli", *CLIPS):
            model = results.nats(f"L{size}-{name}")
            own = results.seeds(f"L{size}-{name}")
            pairs = [results.nats(f"L{size}-{name}", s).minus(results.nats(f"L{size}", s))
                     for s in own]  # fmt: skip
            clip = f" U[{CLIPS[name]}]" if name in CLIPS and name != "clip-auto" else ""
            gaps = ", ".join(f"{gap:+.4f} ± {error:.4f}" for gap, error in pairs)
            rows.append([name + clip, _cell(model), gaps, str(model.seeds)])
        parts.append(f"L' = {size} (every model measured with the same unbiased estimator):")
        parts.append(
            table(
                ["trained with", "test perplexity", "nats per token above exact_k, by seed",
                 "seeds"], rows,
            )
        )  # fmt: skip
    return "\n\n".join(parts)


def _initialisation(results: Results) -> str:
    parts = [
        "## Initialisation, at equal total tokens",
        "From MDLM and from AR: the share of the tokens before the start counts. By compute a "
        "token of AR costs least; training seconds stand beside.",
    ]
    for size in COMPARED:
        rows = []
        for name, label in ((f"L{size}-from-ar", "AR"), (f"L{size}", "MDLM (the paper's way)"),
                            (f"L{size}-scratch", "from scratch")):  # fmt: skip
            model = results.nats(name)
            rows.append([label, _cell(model), f"{results.seconds(name):.0f} s", str(model.seeds)])
        head = [f"L' = {size}, started from", "test perplexity", "training, one core", "seeds"]
        parts.append(table(head, rows))
        shares = []
        for start in ("from-ar", "scratch"):
            share, low, high = results.gap_closed(f"L{size}-{start}", 0)
            shares.append(f"{start.replace('-', ' ')} {share:.1%} [{low:.1%}, {high:.1%}]")
        parts.append(f"Share of the gap from MDLM to AR that is closed: {'; '.join(shares)}.")
    order = ["ar", "L4-scratch", "L8-scratch", "L16-scratch", "mdlm"]
    models = [results.nats(name, 0) for name in order]
    lines = [
        _order(results, a, b, clear, seed=0)
        for (a, b), clear in zip(pairwise(order), apart(models), strict=True)
    ]
    perplexities = " < ".join(f"{model.perplexity:.2f}" for model in models)
    parts.append(
        f"The order of block sizes when every model is trained from scratch (one seed; AR, L' = 4, "
        f"8, 16, MDLM: {perplexities}):\n\n" + "\n".join(lines)
    )
    return "\n\n".join(parts)


def _variances(results: Results) -> str:
    parts = [
        "## Variance of loss and gradient",
        "![variance](variance.png)",
        "Noise of the masks only, at equal passes, of batches of "
        f"{results.scale.variance[1]} windows; ± one standard error. Measured on each block size's "
        "own model. The last columns: how much less than Bernoulli's.",
    ]
    for size in _sizes(results):
        found = {r["estimator"]: r for r in results[f"variance-L{size}"]["estimators"]}
        plain = found["bernoulli"]
        rows = []
        for r in sorted(found.values(), key=lambda r: r["passes"] * r["gradient"]["mask"]):
            cells = []
            for kind in ("loss", "gradient"):
                own, base = r["passes"] * r[kind]["mask"], plain[kind]["mask"]
                error = r["passes"] * r[kind]["mask_stderr"]
                factor = "no noise" if own < 1e-6 * base else f"{base / own:.2f}×"
                cells.append((f"{own:.3g} ± {error:.1g}", factor))
            name = r["estimator"] + ("" if r["unbiased"] else " (biased)")
            (loss, less_loss), (gradient, less_gradient) = cells
            rows.append([name, f"{r['loss_mean']:.3f}", loss, gradient, less_loss, less_gradient])
        parts.append(f"L' = {size}:")
        parts.append(
            table(
                ["estimator", "nats per token", "variance of the loss", "of the gradient (trace)",
                 "loss", "gradient"], rows,
            )
        )  # fmt: skip
    return "\n\n".join(parts)


def _clips(results: Results) -> str:
    last = [
        f"L' = {size}: [{m[-1]['clip_beta']:.2f}, {m[-1]['clip_omega']:.2f}]"
        for size in COMPARED
        if (m := [x for x in results[f"s0-L{size}-clip-auto"]["metrics"] if "clip_beta" in x])
    ]
    return "\n\n".join([
        "## The searched clip",
        "![clips](clips.png)",
        f"The last ones found: {'; '.join(last)}.",
    ])  # fmt: skip


def _generation(results: Results) -> str:
    rows = []
    for name, job in results.jobs.items():
        if job.kind != "samples" or job.settings["options"]["stop"] != "none":
            continue
        quality = results[name]["quality"]
        model = job.settings["model"].partition("-")[2]
        options = job.settings["options"]
        how = f"T = {options['steps']}" if "steps" in options else "one token a step"
        paper = PAPER_GENERATION.get(model, "") if name == f"samples-{model}-all" else ""
        rows.append([NAMES.get(model, f"L' = {model[1:]}"), str(options["max_new_tokens"]), how,
                     *_quality(quality), paper])  # fmt: skip
    for label in ("real", "shuffled"):
        quality = results["samples-real"][label]
        rows.append([f"{label} text", str(results.scale.length - 1), "", *_quality(quality), ""])
    lengths = []
    for name, job in results.jobs.items():
        if name.endswith("-end"):
            model = job.settings["model"].partition("-")[2]
            own = results[name]["lengths"]
            ended = sum(reason == "eos" for reason in results[name]["finish"]) / len(own)
            lengths.append([NAMES.get(model, f"L' = {model[1:]}"), *_lengths(own), f"{ended:.0%}"])
    lengths.append(["real passages", *_lengths(results["samples-real"]["lengths"]), ""])
    return "\n\n".join([
        "## Samples",
        "![quality](quality.png)",
        "Generative perplexity is that of an AR model of another seed, small as the models it "
        "judges: compare within the table only, and never without entropy and divergence. "
        f"{results.scale.samples} samples a row, none rejected; ± one standard error.",
        "At one token a step, by generative perplexity:\n\n" + "\n".join(_sample_order(results)),
        table(["model", "tokens", "steps a block", "NFE", "gen. perplexity", "entropy",
               "distinct-2", "divergence, 2-grams", "tokens/s", "paper, OWT, L = 1,024"], rows),
        "![lengths](lengths.png)",
        "Texts that end by themselves (or at "
        f"{results.scale.long_tokens} tokens; SEDD at its context):",
        table(["model", "median", "max", "ended"], lengths),
    ])  # fmt: skip


def _sample_order(results: Results) -> list[str]:
    """Whether each model's samples are better than the next one's, at equal NFE."""
    names = ("L4", "L8", "L16", "mdlm")
    found = [results[f"samples-{name}-all"]["quality"]["perplexity"] for name in names]
    lines = []
    for (a, b), (x, y) in zip(pairwise(names), pairwise(found), strict=True):
        gap, error = y["value"] - x["value"], math.hypot(x["stderr"], y["stderr"])
        labels = [NAMES.get(name, f"L' = {name[1:]}") for name in (a, b)]
        lines.append(
            f"- {labels[0]} < {labels[1]}: {_verdict(gap > 1.96 * error)}, "
            f"by {gap:.1f} ± {error:.1f}"
        )
    return lines


def _quality(quality: dict[str, Any]) -> list[str]:
    def cell(found: dict[str, float], digits: int) -> str:
        return f"{found['value']:.{digits}f} ± {found['stderr']:.{digits}f}"

    cost = quality["cost"] or {}
    return [
        f"{cost['nfe']:.1f}" if cost else "",
        cell(quality["perplexity"], 1),
        cell(quality["entropy"], 2),
        cell(quality["distinct"]["2"], 3),
        cell(quality["divergence"]["2"], 3),
        f"{cost['tokens_per_second']:.0f}" if cost else "",
    ]


def _lengths(own: Sequence[int]) -> list[str]:
    ordered = sorted(own)
    return [str(ordered[len(ordered) // 2]), str(ordered[-1])]


def _times(results: Results) -> str:
    kinds: dict[str, list[float]] = {}
    for name, job in results.jobs.items():
        kinds.setdefault(job.kind, []).append(results[name]["seconds"])
    rows = [[kind, str(len(x)), f"{sum(x) / 60:.1f}"] for kind, x in kinds.items()]
    total = sum(map(sum, kinds.values())) / 60
    rows.append(["all", str(len(results.jobs)), f"{total:.1f}"])
    return "## Time\n\n" + table(["jobs", "number", "core-minutes"], rows)
