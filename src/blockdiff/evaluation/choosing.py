"""What the measured points of a grid are worth, and which is chosen; see `evaluation.tuning`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blockdiff.evaluation.likelihood import perplexity_of
from blockdiff.evaluation.samples import Measured
from blockdiff.evaluation.statistics import mean_error, paired_error, ratio_error
from blockdiff.printing import names_of, table_text
from blockdiff.starter import packaged

Point = dict[str, Any]  # fields of `SamplingOptions`
Record = dict[str, Any]


def decide(record: Record, tolerance: float, entropy_tolerance: float) -> None:
    """Adds to a record what its points are worth, and which is `chosen` (its place).

    Of each point `perplexity`, `entropy` and their ratios to the reference's with standard errors,
    `tokens_per_second`, whether it is `lively` enough, whether it is `allowed`, and the figures of
    whose `frontier` it is: none that is lively has more of it and is better. `tuned` has the
    tolerances.
    """
    points, settings = record["points"], record["settings"]
    base = next(one for one in points if one["options"] == settings["reference"])
    for one in [base, *points]:
        one |= texts_figures(one["texts"], base["texts"])
        speeds = one["tokens_per_nfe"] / np.array(one["seconds_per_nfe"])
        one["tokens_per_second"] = float(np.median(speeds))
        base_speeds = base["tokens_per_nfe"] / np.array(base["seconds_per_nfe"])
        one["lively"] = bool(one is base or one["entropy_ratio"]["value"] >= 1 - entropy_tolerance)
        good = one["perplexity_ratio"]["value"] <= 1 + tolerance
        faster = (speeds > base_speeds).all()
        one["allowed"] = bool(one is base or (one["lively"] and good and faster))
    record["real"] |= texts_figures(record["real"]["texts"], base["texts"])
    lively = [one for one in points if one["lively"]]
    for one in points:
        one["frontier"] = [
            figure
            for figure in ("tokens_per_second", "tokens_per_nfe")
            if one["lively"] and not any(_beats(other, one, figure) for other in lively)
        ]
    allowed = [i for i, one in enumerate(points) if one["allowed"]]
    record["chosen"] = max(allowed, key=lambda i: points[i]["tokens_per_second"])
    record["reference"] = points.index(base)
    record["tuned"] = {"tolerance": tolerance, "entropy_tolerance": entropy_tolerance}


def _beats(one: Record, other: Record, figure: str) -> bool:
    better = one["perplexity"]["value"], -one[figure]
    than = other["perplexity"]["value"], -other[figure]
    return better != than and all(a <= b for a, b in zip(better, than, strict=True))


def texts_figures(texts: Record, base: Record) -> Record:
    """Perplexity and entropy of texts, and their ratios to those of the same beginnings."""
    nats, tokens, entropy = _columns(texts)
    nats_0, tokens_0, entropy_0 = _columns(base)
    rate = nats.sum() / max(tokens.sum(), 1)
    perplexity = perplexity_of(rate)
    ratio = perplexity_of(rate - nats_0.sum() / max(tokens_0.sum(), 1))
    with np.errstate(invalid="ignore"):  # nats without end have no error
        error = paired_error(nats, tokens, nats_0, tokens_0)
        own = ratio_error(nats, tokens)
    lively = entropy.mean() / max(entropy_0.mean(), 1e-12)
    spread = mean_error(entropy - lively * entropy_0) / max(entropy_0.mean(), 1e-12)
    found = {
        "perplexity": Measured(perplexity, perplexity * own),
        "entropy": Measured(float(entropy.mean()), mean_error(entropy)),
        "perplexity_ratio": Measured(ratio, ratio * error),
        "entropy_ratio": Measured(float(lively), spread),
    }
    return {name: dict(vars(value)) for name, value in found.items()}


def _columns(texts: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def column(name: str) -> np.ndarray:
        # JSON has no infinity: nats without end are null there.
        return np.array([math.inf if x is None else x for x in texts[name]], dtype=float)

    return column("nats"), column("tokens"), column("entropy")


def label(options: Point) -> str:
    """An order with its settings, for people: "threshold 0.7"."""
    values = [
        f"{value:g}" if name == options["sampler"] else f"{name} {value:g}"
        for name, value in options.items()
        if name not in ("sampler", "block_size", "temperature")
    ]
    return " ".join([options["sampler"], *values])


def tuning_table(record: Record) -> str:
    """A record for people: fastest last, the choice marked."""

    def cell(found: Mapping[str, Any], digits: int) -> str:
        error = found["stderr"]
        shown = "" if error is None or math.isnan(error) else f" ± {error:.{digits}f}"
        return f"{found['value']:.{digits}f}{shown}"

    def figures(one: Record) -> list[str]:
        return [cell(one["perplexity"], 2), cell(one["perplexity_ratio"], 3),
                cell(one["entropy"], 3), cell(one["entropy_ratio"], 3)]  # fmt: skip

    points, settings = record["points"], record["settings"]
    warm = len({one["options"]["temperature"] for one in points}) > 1
    head = ["order", "L'", *["T"] * warm, "perplexity", "× reference", "entropy", "× reference",
            "divergence", "TPF", "tokens/s", ""]  # fmt: skip
    real = record["real"]
    rows: list[list[str] | None] = [
        ["real text", "", *[""] * warm, *figures(real), "", "", "", ""],
        None,
    ]
    for one in sorted(points, key=lambda one: one["tokens_per_second"]):
        place, options = points.index(one), one["options"]
        mark = {record["reference"]: "reference"}.get(place, "allowed" if one["allowed"] else "")
        mark = "chosen" if place == record["chosen"] else mark
        rows.append([
            label(options), str(options["block_size"]), *[f"{options['temperature']:g}"] * warm,
            *figures(one), f"{one['divergence']['2']['value']:.3f}",
            f"{one['tokens_per_nfe']:.2f}", f"{one['tokens_per_second']:.1f}", mark,
        ])  # fmt: skip
    caption = (
        f"{settings['texts']} texts of {settings['max_new_tokens']} tokens after "
        f"{settings['prompt_tokens']}; judge: {settings['judge']}; speed: {settings['batch_size']} "
        f"at once, {settings['precision']}, {settings['device']}"
    )
    title = f"{settings['model']} on {names_of(settings['data'])} ({settings['part']})"
    return table_text(head, rows, 150, title=title, caption=caption) + "\n" + summary(record)


def summary(record: Record) -> str:
    """The choice in a line, and where it was written."""
    points = record["points"]
    chosen, base = points[record["chosen"]], points[record["reference"]]
    faster = chosen["tokens_per_second"] / base["tokens_per_second"]
    said = f"{label(chosen['options'])}, block size {chosen['options']['block_size']}"
    model = record["settings"]["model"]
    own = own_folder(model) is not None
    reason = "as asked" if own else f"{model} is not a folder of yours"
    where = record["written"]
    return f"chosen: {said}; {faster:.2f} times the reference's tokens/s; " + (
        f"not written: {reason}" if where is None else f"written into {where}"
    )


def own_folder(model: str | Path) -> Path | None:
    """The folder of a model that may be written to: neither the hub's nor the package's."""
    path = Path(model).expanduser()
    return path if packaged(model) == model and path.is_dir() else None
