"""The report's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter

from blockdiff.apps.reproduction.plan import BLOCK_SIZES, COLDER, COMPARED, FRONTIER
from blockdiff.apps.reproduction.results import Results
from blockdiff.plots import COLOURS, logarithmic, new_figure, save_figure

# name in a plot, name of the jobs, colour
FAMILIES = (("AR", "ar", 0), ("BD3-LM L' = 4", "L4", 2), ("BD3-LM L' = 8", "L8", 4),
            ("BD3-LM L' = 16", "L16", 5), ("MDLM", "mdlm", 1), ("SEDD", "sedd", 3))  # fmt: skip


def perplexity_by_block_size(results: Results, path: Path) -> Figure:
    """Each model's perplexity over L', a point for every seed, AR and SEDD as lines."""
    figure, (axes,) = new_figure(7.5, 4.6)
    sizes = [*BLOCK_SIZES, results.scale.length]
    names = [*(f"L{size}" for size in BLOCK_SIZES), "mdlm"]
    models = [results.nats(name).rate for name in names]
    low, high = (np.array([m.interval[i] for m in models]) for i in (0, 1))
    middle = np.array([m.perplexity for m in models])
    axes.errorbar(sizes, middle, yerr=[middle - low, high - middle], fmt="o-", color=COLOURS[0],
                  capsize=3, label="block diffusion from scratch (L' = L: MDLM)")  # fmt: skip
    for size, name in zip(sizes, names, strict=True):
        own = [results.rate(name, seed).perplexity for seed in results.seeds(name)]
        axes.plot([size] * len(own), own, "_", color=COLOURS[0], markersize=14)
    starts = (
        ("from-ar", "started from AR", 2),
        ("from-mdlm", "started from MDLM, as the paper", 4),
    )
    for start, label, colour in starts:
        own = [results.nats(f"L{size}-{start}").rate.perplexity for size in COMPARED]
        axes.plot(COMPARED, own, "s--", color=COLOURS[colour], label=label, markersize=5)
    for name, label, colour in (("ar", "AR", 1), ("sedd", "SEDD (one seed)", 3)):
        model = results.nats(name).rate
        axes.axhline(model.perplexity, color=COLOURS[colour], linewidth=1.2, label=label)
        axes.axhspan(*model.interval, color=COLOURS[colour], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("block size L'")
    axes.set_ylabel("test perplexity (bound), 95% interval; dashes: seeds")
    axes.set_title("Perplexity at equal training tokens", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save_figure(figure, path)


def clip_course(results: Results, path: Path) -> Figure:
    """β and ω of the searched clip over training."""
    figure, (axes,) = new_figure(7.5, 4.6)
    for i, size in enumerate(COMPARED):
        lines = [m for m in results[f"s0-L{size}-clip-auto"]["metrics"] if "clip_beta" in m]
        tokens = [m["tokens"] for m in lines]
        low, high = ([m[key] for m in lines] for key in ("clip_beta", "clip_omega"))
        axes.fill_between(tokens, low, high, step="post", alpha=0.15, color=COLOURS[i], linewidth=0)
        for edge, label in ((low, f"L' = {size}"), (high, None)):
            # The second is thinner: where both find the same clip, both are seen.
            axes.step(tokens, edge, where="post", color=COLOURS[i], label=label,
                      linewidth=(5, 1.5)[i], marker="o", markersize=(10, 4)[i])  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens of fine-tuning")
    axes.set_ylabel("mask rates drawn from: β to ω")
    axes.set_title("The clip of least variance", loc="left")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def quality_by_nfe(results: Results, path: Path) -> Figure:
    """Generative perplexity and divergence of the samples over network evaluations."""
    figure, (left, right) = new_figure(11, 4.6, 2)
    real = results["samples-real"]["real"]
    panels = (
        (left, "perplexity", "generative perplexity"),
        (right, "divergence", "divergence of 2-grams from real text"),
    )
    for axes, key, label in panels:
        for name, model, colour in FAMILIES:
            jobs = [n for n, job in results.jobs.items()
                    if job.kind == "samples" and job.settings["model"] == f"s0-{model}"
                    and not n.endswith(("-long", "-end"))
                    and "temperature" not in job.settings["options"]]  # fmt: skip
            found = sorted((results[n]["quality"] for n in jobs), key=lambda q: q["cost"]["nfe"])
            if not found:
                continue
            values = [_figure_of(q, key) for q in found]
            axes.errorbar([q["cost"]["nfe"] for q in found], [v["value"] for v in values],
                          yerr=[1.96 * v["stderr"] for v in values], fmt="o-", capsize=2,
                          color=COLOURS[colour], label=name, markersize=4)  # fmt: skip
        axes.axhline(
            _figure_of(real, key)["value"], color="black", linestyle=":", label="real text"
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        if key == "perplexity":
            axes.set_yscale("log")
            logarithmic(axes.yaxis)
        axes.set_xlabel("network evaluations a sample")
        axes.set_ylabel(label)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False,
        fontsize=8,
    )  # fmt: skip
    figure.suptitle(f"Samples of {results.scale.length} tokens", x=0.01, ha="left")
    return save_figure(figure, path)


def frontier(results: Results, path: Path) -> Figure:
    """Generative perplexity against entropy, a point for each temperature."""
    figure, (axes,) = new_figure(7.5, 4.6)
    for name, model, colour in FAMILIES:
        jobs = [f"samples-{model}-at-{t:g}" for t in COLDER] + [f"samples-{model}-all"]
        if model in FRONTIER:
            found = [results[job]["quality"] for job in jobs]
            x, y = ([q[key] for q in found] for key in ("entropy", "perplexity"))
            across, up = ([1.96 * v["stderr"] for v in values] for values in (x, y))
            axes.errorbar([v["value"] for v in x], [v["value"] for v in y], xerr=across, yerr=up,
                          fmt="o-", capsize=2, color=COLOURS[colour], label=name,
                          markersize=4)  # fmt: skip
            for t, a, b in zip((*COLDER, 1.0), x, y, strict=True):
                axes.annotate(f"{t:g}", (a["value"], b["value"]), xytext=(4, -9), fontsize=7,
                              textcoords="offset points", color=COLOURS[colour])  # fmt: skip
    real = results["samples-real"]["real"]
    axes.plot(real["entropy"]["value"], real["perplexity"]["value"], "k*", markersize=11,
              linestyle="none", label="real text")  # fmt: skip
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.set_xlabel("entropy of a text, nats; more is more varied")
    axes.set_ylabel("generative perplexity; 95% intervals")
    axes.set_title("Temperatures, at one token a step", loc="left")
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _figure_of(quality: dict[str, Any], key: str) -> dict[str, float]:
    found: dict[str, float] = quality[key]["2"] if key == "divergence" else quality[key]
    return found


def length_histogram(results: Results, path: Path) -> Figure:
    """How long texts are that end by themselves, beside real passages."""
    figure, (axes,) = new_figure(7.5, 4.6)
    longest = results.scale.long_tokens
    bins = np.linspace(0, longest, 33).tolist()
    real = results["samples-real"]["lengths"]
    axes.hist(
        np.minimum(real, longest), bins=bins, density=True, color="lightgrey", label="real passages"
    )
    for name, model, colour in FAMILIES:
        if f"samples-{model}-end" in results.jobs:
            lengths = np.minimum(results[f"samples-{model}-end"]["lengths"], longest)
            axes.hist(lengths, bins=bins, density=True, histtype="step", linewidth=1.4,
                      color=COLOURS[colour], label=name)  # fmt: skip
    axes.axvline(results.scale.length, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(" training context", (results.scale.length, 0.98), va="top", fontsize=8,
                  xycoords=("data", "axes fraction"))  # fmt: skip
    axes.set_xlabel(f"tokens until the end of the text (or {longest}, the most asked for)")
    axes.set_ylabel("density")
    axes.set_title("Generated lengths", loc="left")
    axes.legend(frameon=False)
    return save_figure(figure, path)
