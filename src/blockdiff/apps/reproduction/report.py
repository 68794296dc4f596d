"""The report: every table beside the paper's, every claim with its verdict.

Of the paper's figures only those are quoted that a second source confirms.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from blockdiff.apps.benchmark.compare import processor_name
from blockdiff.apps.reproduction import figures
from blockdiff.apps.reproduction.measures import generation, variances
from blockdiff.apps.reproduction.plan import CLIPS, COMPARED, LONGER, Scale, clips, sizes
from blockdiff.apps.reproduction.results import Rate, Results, Summary, apart, over_seeds
from blockdiff.apps.reproduction.wording import NAMES, label, verdict
from blockdiff.outputs import to_json, write_text
from blockdiff.plots import variance_plot
from blockdiff.printing import markdown_table
from blockdiff.version import VERSION

# LM1B perplexities.
PAPER_PERPLEXITY = {"ar": "22.83", "L4": "28.23", "mdlm": "31.78"}
# At L' = 1.
PAPER_BLOCKS_OF_ONE = {"ar": "22.88", "ar-half": "24.37", "L1-linear": "25.56", "L1": "22.88"}
# What is claimed of block sizes, and how it is shown the paper's way.
ORDER = ("ar", "L4", "L8", "L16", "mdlm")
PAPERS_ORDER = ("ar", *(f"L{size}-from-mdlm" for size in COMPARED), "mdlm")
# What the per-window arrays would only make long.
_ARRAYS = ("nats", "tokens", "metrics", "config", "lengths", "finish")


def write_report(folder: Path, scale: Scale, data: str) -> Path:
    """Writes report.md, its plots and results.json into the folder's `report`."""
    results = Results(folder, scale)
    (out := folder / "report").mkdir(exist_ok=True)
    figures.perplexity_by_block_size(results, out / "perplexity.png")
    figures.clip_course(results, out / "clips.png")
    figures.quality_by_nfe(results, out / "quality.png")
    figures.frontier(results, out / "frontier.png")
    figures.length_histogram(results, out / "lengths.png")
    records = [r for size in sizes(scale) for r in results.estimators(size)]
    variance_plot(records, out / "variance.png", title="Noise of the estimators")
    # As read again, so that the text says what the file holds.
    record = json.loads(to_json(_summary(results, data), indent=1))
    write_text(out / "results.json", to_json(record, indent=1) + "\n")
    write_text(out / "report.md", report_text(record))
    return out / "report.md"


def report_text(record: dict[str, Any]) -> str:
    """report.md, from what results.json holds and nothing else."""
    results = Summary(record)
    parts = [_head(results), _perplexities(results), _blocks_of_one(results),
             _estimators(results), _initialisation(results), variances(results),
             _clips(results), generation(results), _times(results)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _summary(results: Results, data: str) -> dict[str, Any]:
    """Every result without its arrays, and the figures over seeds."""
    models = _models(results)
    return {
        "data": Path(data).name,
        "scale": asdict(results.scale),
        "commits": _commits(results),
        "machine": _machine(),
        "notes": [],
        "over_seeds": {name: _over_seeds(results, name) for name in models},
        "gap_closed": {
            name: _gap_closed(results, name)
            for name in models
            if re.fullmatch(r"L(4|8|16)(-from-(mdlm|ar))?", name)
        },
        "nats_above": {
            f"{a} above {b}": _above(results, a, b) for a, b in _compared(models)
        },
        "jobs": {name: _without_arrays(results[name]) for name in results.jobs},
        "clip_course": {
            size: [m for m in results[f"s0-L{size}-clip-auto"]["metrics"] if "clip_beta" in m]
            for size in COMPARED
        },
    }  # fmt: skip


def _over_seeds(results: Results, model: str) -> dict[str, Any]:
    """The mean of a model's seeds, and both kinds of interval of its perplexity."""
    rate = results.nats(model).rate
    own = [results.rate(model, seed) for seed in results.seeds(model)]
    between = over_seeds([one.mean for one in own])
    return {
        "perplexity": rate.perplexity, "interval_95": rate.interval,
        "nats_per_token": rate.mean, "stderr": rate.stderr, "seeds": len(own),
        "by_seed": [one.perplexity for one in own],
        "interval_95_over_seeds": between and [math.exp(end) for end in between],
    }  # fmt: skip


def _gap_closed(results: Results, model: str) -> dict[str, Any]:
    share, low, high = results.gap_closed(model)
    own = results.shares(model)
    return {
        "share": share, "interval_95": [low, high],
        "by_seed": own, "interval_95_over_seeds": over_seeds(own),
    }  # fmt: skip


def _without_arrays(found: dict[str, Any]) -> dict[str, Any]:
    """A job's result in brief: of its lengths the middle and the longest, of its log the course."""
    brief = {key: value for key, value in found.items() if key not in _ARRAYS}
    if "lengths" in found:
        ordered = sorted(found["lengths"])
        brief |= {"median_length": ordered[len(ordered) // 2], "longest": ordered[-1]}
    if "finish" in found:
        brief["ended"] = sum(reason == "eos" for reason in found["finish"]) / len(found["finish"])
    return brief | _course(found.get("metrics", []))


def _above(results: Results, model: str, reference: str) -> list[tuple[float, float]]:
    """Nats per token above another model's, ± s.e. over windows, for each seed both have."""
    seeds = [seed for seed in results.seeds(model) if seed in results.seeds(reference)]
    return [results.nats(model, seed).minus(results.nats(reference, seed)) for seed in seeds]


def _compared(models: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of models whose difference the report states."""
    found = [(b, a) for order in (ORDER, PAPERS_ORDER) for a, b in pairwise(order)]
    found += [("sedd", "mdlm"), ("L1-longer", "ar-longer")]
    found += [
        (name, "ar") for name in models if re.match(r"L1(-from-ar|-bernoulli|-linear)?$", name)
    ]
    found += [("ar-half", "ar"), ("L1-linear", "ar-half")]
    for size in COMPARED:
        names = [f"L{size}-{name}" for name in ("bernoulli", *clips(size))]
        found += [(name, f"L{size}-from-ar") for name in names]
    return list(dict.fromkeys(found))


def _course(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """[tokens, loss] at every fourth line of a training log, and the last evaluation's nats."""
    losses = [[line["tokens"], line["loss"]] for line in metrics if "loss" in line]
    ends = [x["eval_nats_per_token"] for x in metrics if "eval_nats_per_token" in x]
    return {"losses": losses[3::4], "evaluated_nats_per_token": ends[-1]} if losses else {}


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
        "processor": processor_name(),
        "torch": torch.__version__,
        "blockdiff": VERSION,
    }


def _commits(results: Results) -> dict[str, int]:
    """How many jobs each commit of the code did; "unknown" where it was no git checkout."""
    found = Counter(results[name].get("commit") or "unknown" for name in results.jobs)
    return dict(found.most_common())


def _cell(model: Rate, bound: bool = True) -> str:
    low, high = model.interval
    return f"{'≤ ' if bound else ''}{model.perplexity:.2f} [{low:.2f}, {high:.2f}]"


def _head(results: Summary) -> str:
    record, scale, machine = results.record, results.scale, results.record["machine"]
    tokens = scale.steps * scale.batch_size * scale.length
    seconds = sum(results[name]["processor_seconds"] for name in results.jobs)
    cores = 1 if machine["cores"] is None else machine["cores"]
    commits = ", ".join(f"{name[:12]} ({count} jobs)" for name, count in record["commits"].items())
    notes = "".join(f"\n\n{note}" for note in record["notes"])
    return f"""# The paper in miniature

`blockdiff reproduce paper-mini --data {record["data"]}`: every model a `{scale.preset}` network on
passages of {scale.sentences} sentences, a BPE of {scale.vocab_size} tokens, context
{scale.length}, {tokens:,} tokens of training each ({scale.steps} steps of {scale.batch_size}
windows, Adam at {scale.lr:g}, EMA {scale.ema}). A model is trained from scratch unless it says
otherwise; one that starts from MDLM or from AR takes over after {scale.base_steps} of those steps
and goes on for {scale.fine_steps} at its own block size. {scale.seeds} seeds, but for what
is marked. Measured on {scale.test_windows} windows of texts that no model has seen; [..] is the 95%
interval over windows of the seeds' mean: it says how well these windows stand for the text, not
how far another seed would be, and may leave out both seeds. The seeds stand beside it, with
Student's interval over them: of two, 12.7 standard errors to each side, which mostly says that two
are few.

On {cores} cores ({machine["processor"]}, torch {machine["torch"]}): {seconds / 3600:.2f} hours of
processor time, {seconds / 3600 / cores:.2f} hours with every core at work. Code: {commits}.
Every figure is in [results.json](results.json).{notes}"""


def _perplexities(results: Summary) -> str:
    order = ["ar", "L1", "L4", "L8", "L16", "mdlm", "sedd"]
    models = {name: results.mean(name) for name in order}
    rows = []
    for name, model in models.items():
        title = NAMES.get(name, f"BD3-LM L' = {name[1:]}")
        rows.append([title, _cell(model, name != "ar"), *_seed_cells(results, name),
                     f"{results.seconds(name):.0f} s", PAPER_PERPLEXITY.get(name, "")])  # fmt: skip
    ends = [results.rate(name, 0) for name in ("mdlm", "sedd")]
    sedd = _pair(results, "mdlm", "sedd", apart(ends)[0])
    shares = []
    for name in ("L4", "L8", "L16", "L4-from-mdlm"):
        found = results.record["gap_closed"][name]
        how = " started from MDLM, the paper's way" if name == "L4-from-mdlm" else ""
        holds = min([found["interval_95"][0], *found["by_seed"]]) >= 0.40
        enough = "" if name in ("L8", "L16") else f"; at least 40%: {_yes(holds)}"
        shares.append(
            f"- {label(name)}{how}: {_share(found)}; seeds {_shares(found)}"
            f"{_between(found, '.1%', '; over seeds ')}{enough}"
        )
    return "\n\n".join([
        "## Perplexity by block size\n\n![perplexity](perplexity.png)",
        markdown_table(["model", "test perplexity, mean of seeds", "seeds", "over seeds",
               "training, one core", "paper, LM1B"], rows),
        "Is each better than the next? Window by window, in nats per token, at every seed both "
        "have (± s.e. over windows), and whether the 95% intervals of the means are apart:\n\n"
        + "\n".join([*_order(results, ORDER), sedd]),
        "Share of the gap from MDLM to AR that is closed (the paper: 40% at L' = 4, started from "
        "MDLM), of the seeds' mean [over windows]:\n\n" + "\n".join(shares),
    ])  # fmt: skip


def _order(results: Summary, names: Sequence[str]) -> list[str]:
    """Whether each model is better than the next."""
    clears = apart([results.mean(name) for name in names])
    return [
        _pair(results, a, b, clear) for (a, b), clear in zip(pairwise(names), clears, strict=True)
    ]


def _pair(results: Summary, a: str, b: str, clear: bool) -> str:
    gaps = results.above(b, a)
    return (
        f"- {label(a)} < {label(b)}: {verdict(*gaps)}, by {_nats(gaps)}; "
        f"intervals apart: {'yes' if clear else 'no'}"
    )


def _blocks_of_one(results: Summary) -> str:
    labels = {
        "ar": "AR",
        "ar-half": "AR, the loss of a random half of the tokens",
        "L1-linear": "bernoulli, linear, from scratch",
        "L1": "exact_k, from scratch",
        "L1-from-ar": "exact_k, started from AR",
        "L1-bernoulli": "bernoulli, linear, started from AR",
        "ar-longer": f"AR, {LONGER} times as many tokens",
        "L1-longer": f"exact_k, from scratch, {LONGER} times as many tokens",
    }
    rows = []
    for name, title in labels.items():
        ar = "ar-longer" if name.endswith("-longer") else "ar"
        gaps = [] if name == ar else results.above(name, ar)
        own, paper = _seed_cells(results, name)[0], PAPER_BLOCKS_OF_ONE.get(name, "")
        cells = ", ".join(map(_percent, gaps))
        rows.append([title, _cell(results.mean(name), False), own, cells, paper])
    best = min(("L1", "L1-from-ar"), key=lambda name: results.mean(name).mean)
    gaps = results.above(best, "ar")
    room = [(0.02 - math.expm1(gap), math.exp(gap) * error) for gap, error in gaps]
    rest = ", ".join(map(_percent, results.above("L1-linear", "ar-half")))
    return "\n\n".join([
        "## Blocks of one token",
        "At L' = 1 the bound is the likelihood. With every token masked (the paper's tuned "
        "schedule) `clipped` draws what `exact_k` draws, weight for weight (a test asserts it), so "
        "one run stands for both. The linear schedule masks each token with probability 1/2; the "
        "paper's control takes the loss of as many tokens, at random, from AR.",
        markdown_table(["L' = 1", "test perplexity", "seeds", "above AR of the same seed, by seed",
               "paper, LM1B, 16B tokens"], rows),
        f"The linear schedule above AR that counts as many tokens: {rest}.",
        f"Within 2% of AR by `exact_k` ({labels[best].partition(', ')[2]}): "
        f"{verdict(*room)}, {', '.join(map(_percent, gaps))} by seed.",
    ])  # fmt: skip


def _nats(pairs: Sequence[tuple[float, float]], sign: str = "") -> str:
    """Differences of nats ± their errors."""
    return ", ".join(f"{gap:{sign}.4f} ± {error:.4f}" for gap, error in pairs)


def _percent(pair: tuple[float, float]) -> str:
    """A difference of nats ± its error as one of perplexity, in percent of the lower one."""
    gap, error = pair
    return f"{math.expm1(gap):+.1%} ± {math.exp(gap) * error:.1%}"


def _seed_cells(results: Summary, model: str) -> list[str]:
    """The perplexity of each seed, and the interval over them."""
    found = results.record["over_seeds"][model]
    return [", ".join(f"{own:.2f}" for own in found["by_seed"]), _between(found, ".1f")]


def _between(found: dict[str, Any], form: str, before: str = "") -> str:
    """The interval over seeds; nothing where there is one seed."""
    ends = found["interval_95_over_seeds"]
    return f"{before}[{ends[0]:{form}}, {ends[1]:{form}}]" if ends else ""


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval_95"]
    return f"{found['share']:.1%} [{low:.1%}, {high:.1%}]"


def _shares(found: dict[str, Any]) -> str:
    return ", ".join(f"{share:.1%}" for share in found["by_seed"])


def _estimators(results: Summary) -> str:
    parts = [
        "## Estimators and clips: what training with them gives",
        "Started from AR, every model measured with the same unbiased estimator.",
    ]
    for size in COMPARED:
        reference = f"L{size}-from-ar"
        rows = [["exact_k, stratified", _cell(results.mean(reference)),
                 _seed_cells(results, reference)[0], ""]]  # fmt: skip
        for name in ("bernoulli", *clips(size)):
            model = f"L{size}-{name}"
            pairs = results.above(model, reference)
            clip = f" U[{CLIPS[name]}]" if name in CLIPS and name != "clip-auto" else ""
            rows.append([name + clip, _cell(results.mean(model)), _seed_cells(results, model)[0],
                         _nats(pairs, "+")])  # fmt: skip
        # Clips are chosen at the seed that has them all.
        best = min(clips(size), key=lambda name: results.rate(f"L{size}-{name}", 0).mean)
        pairs = results.above(f"L{size}-{best}", reference)
        parts += [
            markdown_table([f"L' = {size}, trained with", "test perplexity", "seeds",
                   "nats per token above exact_k, by seed"], rows),
            f"`exact_k` better than the best clip of seed 0 ({best}): {verdict(*pairs)}; "
            f"the clip is {_nats(pairs, '+')} nats above it, by seed.",
        ]  # fmt: skip
    return "\n\n".join(parts)


def _yes(holds: bool) -> str:
    return "**yes**" if holds else "**no**"


def _initialisation(results: Summary) -> str:
    parts = [
        "## Initialisation, at equal total tokens",
        "From MDLM and from AR: the share of the tokens before the start counts. By compute a "
        "token of AR costs least; training seconds stand beside.",
    ]
    for size in COMPARED:
        rows = []
        for name, title in ((f"L{size}", "from scratch"), (f"L{size}-from-ar", "AR"),
                            (f"L{size}-from-mdlm", "MDLM (the paper's way)")):  # fmt: skip
            found = results.record["gap_closed"][name]
            rows.append([title, _cell(results.mean(name)), *_seed_cells(results, name),
                         _share(found), _shares(found),
                         f"{results.seconds(name):.0f} s"])  # fmt: skip
        parts.append(markdown_table([f"L' = {size}, started from", "test perplexity, mean of seeds",
                            "seeds", "over seeds", "of the gap from MDLM to AR closed", "by seed",
                            "training, one core"], rows))  # fmt: skip
    lines = _order(results, PAPERS_ORDER)
    parts.append("The order of block sizes the paper's way:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _clips(results: Summary) -> str:
    last = [
        f"L' = {size}: [{found[-1]['clip_beta']:.2f}, {found[-1]['clip_omega']:.2f}]"
        for size, found in results.record["clip_course"].items()
        if found
    ]
    return "\n\n".join([
        "## The searched clip (seed 0)",
        "![clips](clips.png)",
        f"The last ones found: {'; '.join(last)}.",
    ])  # fmt: skip


def _times(results: Summary) -> str:
    kinds: dict[str, list[float]] = {}
    for name, job in results.jobs.items():
        kinds.setdefault(job.kind, []).append(results[name]["processor_seconds"])
    rows = [[kind, str(len(x)), f"{sum(x) / 60:.1f}"] for kind, x in kinds.items()]
    total = sum(map(sum, kinds.values())) / 60
    rows.append(["all", str(len(results.jobs)), f"{total:.1f}"])
    return "## Time\n\n" + markdown_table(["jobs", "number", "processor minutes"], rows)
