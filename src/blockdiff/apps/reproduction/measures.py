"""The report's parts on noise and on samples."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from blockdiff.apps.reproduction.plan import COLDER, sizes
from blockdiff.apps.reproduction.results import Summary
from blockdiff.apps.reproduction.wording import label, verdict
from blockdiff.printing import markdown_table

# Generative perplexities of OpenWebText models at L = 1,024.
PAPER_GENERATION = {"ar": "14.1", "L4": "25.7", "mdlm": "46.8"}


def variances(results: Summary) -> str:
    parts = [
        "## Variance of loss and gradient (seed 0)",
        "![variance](variance.png)",
        "Noise of the masks only, at equal passes, of batches of "
        f"{results.scale.variance[1]} windows; ± one standard error. Measured on each block size's "
        "own model. The last columns: how much less than Bernoulli's. Where a verdict is "
        "unclear, Bernoulli's own variance is known too badly.",
    ]
    for size in sizes(results.scale):
        found = {r["estimator"]: r for r in results.estimators(size)}
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
        parts.append(f"L' = {size}: `exact_k`, stratified, below Bernoulli: {_less_noise(found)}.")
        parts.append(
            markdown_table(
                ["estimator", "nats per token", "variance of the loss", "of the gradient (trace)",
                 "loss", "gradient"], rows,
            )
        )  # fmt: skip
    return "\n\n".join(parts)


def _less_noise(found: dict[str, Any]) -> str:
    """Whether stratified exact_k has less variance than Bernoulli, beyond both errors."""
    verdicts = []
    for kind in ("loss", "gradient"):
        own, other = found["exact_k+stratified"][kind], found["bernoulli"][kind]
        error = math.hypot(own["mask_stderr"], other["mask_stderr"])
        verdicts.append(f"{kind} {verdict((other['mask'] - own['mask'], error))}")
    return ", ".join(verdicts)


def generation(results: Summary) -> str:
    rows = []
    for name, job in results.jobs.items():
        if job.kind != "samples" or job.settings["options"]["stop"] != "none":
            continue
        quality = results[name]["quality"]
        model = job.settings["model"].partition("-")[2]
        options = job.settings["options"]
        how = f"T = {options['steps']}" if "steps" in options else "one token a step"
        if "temperature" in options:
            how += f", temperature {options['temperature']:g}"
        paper = PAPER_GENERATION.get(model, "") if name == f"samples-{model}-all" else ""
        rows.append([label(model), str(options["max_new_tokens"]), how,
                     *_quality(quality), paper])  # fmt: skip
    for kind in ("real", "shuffled"):
        quality = results["samples-real"][kind]
        rows.append([f"{kind} text", str(results.scale.length - 1), "", *_quality(quality), ""])
    lengths = []
    for name, job in results.jobs.items():
        if name.endswith("-end"):
            model = job.settings["model"].partition("-")[2]
            lengths.append(
                [label(model), *_lengths(results[name]), f"{results[name]['ended']:.0%}"]
            )
    lengths.append(["real passages", *_lengths(results["samples-real"]), ""])
    return "\n\n".join([
        "## Samples (seed 0)",
        "![quality](quality.png)",
        "Generative perplexity is that of an AR model of another seed, small as the models it "
        "judges: compare within the table only, and never without entropy and divergence. "
        f"{results.scale.samples} samples a row, none rejected; ± one standard error.",
        "At one token a step, by generative perplexity:\n\n" + "\n".join(_sample_order(results)),
        "At the nearest NFE that MDLM was sampled with, by generative perplexity:\n\n"
        + "\n".join(_at_equal_nfe(results)),
        markdown_table(["model", "tokens", "steps a block", "NFE", "gen. perplexity", "entropy",
               "distinct-2", "divergence, 2-grams", "tokens/s", "paper, OWT, L = 1,024"], rows),
        *_frontier(results),
        "![lengths](lengths.png)",
        "Texts that end by themselves (or at "
        f"{results.scale.long_tokens} tokens; SEDD at its context):",
        markdown_table(["model", "median", "max", "ended"], lengths),
    ])  # fmt: skip


def _frontier(results: Summary) -> list[str]:
    if not any(f"-at-{COLDER[0]:g}" in name for name in results.jobs):
        return []
    return [
        "A colder text has a lower perplexity and is duller, so models are compared by their "
        "curves: at the same entropy, which has the lower perplexity.",
        "![frontier](frontier.png)",
    ]


def _sample_order(results: Summary) -> list[str]:
    """Whether each model's samples are better than the next one's, at one token a step."""
    names = ("L4", "L8", "L16", "mdlm")
    return [
        _better(results, (f"samples-{a}-all", label(a)), (f"samples-{b}-all", label(b)))
        for a, b in pairwise(names)
    ]


def _at_equal_nfe(results: Summary) -> list[str]:
    """Block models beside MDLM, whose number of steps is that of nearest NFE."""
    ours: list[tuple[str, str, int, float]] = []
    mdlm: list[tuple[str, str, int, float]] = []
    for name, job in results.jobs.items():
        steps = job.settings.get("options", {}).get("steps")
        model = job.settings.get("model", "").partition("-")[2]
        if job.kind == "samples" and steps and model in ("mdlm", "L4", "L8", "L16"):
            nfe = results[name]["quality"]["cost"]["nfe"]
            (mdlm if model == "mdlm" else ours).append((name, model, steps, nfe))
    lines = []
    for name, model, steps, nfe in ours:
        other, _, other_steps, other_nfe = min(mdlm, key=lambda m: abs(m[3] - nfe))
        lines.append(_better(results, (name, f"{label(model)}, T = {steps} ({nfe:.1f} NFE)"),
                             (other, f"MDLM, T = {other_steps} ({other_nfe:.1f})")))  # fmt: skip
    return lines


def _better(results: Summary, a: tuple[str, str], b: tuple[str, str]) -> str:
    x, y = (results[name]["quality"]["perplexity"] for name, _ in (a, b))
    gap, error = y["value"] - x["value"], math.hypot(x["stderr"], y["stderr"])
    return f"- {a[1]} < {b[1]}: {verdict((gap, error))}, by {gap:.1f} ± {error:.1f}"


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


def _lengths(found: dict[str, Any]) -> list[str]:
    return [str(found["median_length"]), str(found["longest"])]
