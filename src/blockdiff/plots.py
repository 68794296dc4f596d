"""Loss curves, the noise of estimators, and what speed costs in quality."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FormatStrFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from blockdiff.errors import InputError
from blockdiff.printing import names_of

# Okabe and Ito's colours, distinct to colour-blind eyes too, darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# What common systems draw Chinese, Japanese and Korean with.
_WIDE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS",
    "Last Resort High-Efficiency",
)  # fmt: skip
_SMOOTHING = 1 / 25  # width of the moving average, as a share of the curve
_FEWEST_TO_SMOOTH = 20

Curve = Sequence[Mapping[str, float]]


# Draws the words of what it decorates as they are: a `$` begins no formula, and where this machine
# has a font with Chinese, Japanese or Korean characters they are not boxes.
_FAMILIES = [*rcParams["font.family"], *(x for x in _WIDE_FONTS if x in set(get_font_names()))]
words_as_written = rc_context({"text.parse_math": False, "font.family": _FAMILIES})


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure and its axes side by side, with a faint grid and without the frame's right half."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        bare(axes)
    return figure, panels


def bare(axes: Axes) -> None:
    """A faint grid; no frame above and on the right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axis: Axis) -> None:
    """A logarithmic axis's ticks at 1, 2, 5, 10, …, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path | None) -> Figure:
    """Writes a figure as a PNG, unless `path` is None; returns it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from|constrained_layout")
            figure.savefig(path, format="png")
    return figure


@words_as_written
def loss_plot(curves: Mapping[str, Curve], path: Path | None = None, *, title: str = "") -> Figure:
    """Draws losses in nats per token over tokens seen, as a PNG; perplexity on the right.

    `curves`: a name → the lines of its metrics.jsonl, each with `tokens` and `loss` (training) or
    `eval_nats_per_token` with `eval_stderr` (validation); others are passed over. Where a run has
    several block sizes, each one's loss (`loss_4`, …) is drawn in the place of their mixture.
    Training losses are drawn raw and faint beneath their moving average, validation as points ± 1
    standard error. With a single curve its name is left to the title. Returns the figure, and
    writes no file where `path` is None. Raises `InputError` if no line has a loss.
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    important: list[float] = []  # what the vertical range must hold; raw noise may leave it
    colours = cycle(COLOURS)
    for name, lines in curves.items():
        prefix = f"{name}, " if len(curves) > 1 else ""
        colour = next(colours)
        sizes = {int(key[5:]) for line in lines for key in line if key.startswith("loss_")}
        for size in sorted(sizes):
            label = f"{prefix}training loss, L' = {size}"
            important += _training(axes, lines, colour, label, f"loss_{size}")
            colour = next(colours)
        if not sizes:
            important += _training(axes, lines, colour, f"{prefix}training loss")
        important += _validation(axes, lines, colour, f"{prefix}validation ± standard error")
    if not important:
        raise InputError("no losses to draw: the metrics hold none yet")

    spread = max(important) - min(important)
    margin = 0.06 * spread if spread > 0 else 0.1
    axes.set_ylim(min(important) - margin, max(important) + margin)
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    _perplexity_axis(axes)
    return save_figure(figure, path)


def _having(lines: Curve, key: str) -> Curve:
    """The lines where `key` is there and finite; JSON has null for what is not."""
    return [line for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _column(lines: Curve, key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], dtype=float)


def _training(axes: Axes, lines: Curve, colour: str, label: str, key: str = "loss") -> list[float]:
    lines = _having(lines, key)
    if not lines:
        return []
    tokens, losses = _column(lines, "tokens"), _column(lines, key)
    if len(losses) < _FEWEST_TO_SMOOTH:
        axes.plot(tokens, losses, color=colour, linewidth=1.3, label=label)
        return losses.tolist()
    width = max(3, round(len(losses) * _SMOOTHING))
    window = np.ones(width)
    # Divided by the values there are, so that the ends are not pulled towards zero.
    smooth = np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")
    axes.plot(tokens, losses, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(tokens, smooth, color=colour, linewidth=1.4, label=f"{label}, smoothed")
    return smooth.tolist()


def _validation(axes: Axes, lines: Curve, colour: str, label: str) -> list[float]:
    lines = _having(_having(lines, "eval_nats_per_token"), "eval_stderr")
    if not lines:
        return []
    tokens, nats = _column(lines, "tokens"), _column(lines, "eval_nats_per_token")
    bars = _column(lines, "eval_stderr")
    axes.errorbar(
        tokens,
        nats,
        yerr=bars,
        fmt="o",
        color=colour,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        capsize=2.5,
        elinewidth=1,
        zorder=3,
        label=label,
    )
    return [*(nats - bars), *(nats + bars)]


def _perplexity_axis(axes: Axes) -> None:
    right = axes.secondary_yaxis(
        "right",
        functions=(
            lambda nats: np.exp(np.minimum(nats, 700.0)),
            lambda perplexity: np.log(np.maximum(perplexity, 1e-300)),
        ),
    )
    low, high = axes.get_ylim()
    ticks: Locator = LogLocator(subs=(1, 2, 5)) if high - low > math.log(8) else MaxNLocator(6)
    right.yaxis.set_major_locator(ticks)
    right.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("perplexity")
    right.spines["right"].set_alpha(0.4)


@words_as_written
def variance_plot(
    records: Sequence[Mapping[str, Any]], path: Path | None = None, *, title: str = ""
) -> Figure:
    """Draws the masks' variance of loss and gradient at equal passes, as a PNG.

    `records`: those of `EstimatorVariance`; a panel for each block size, estimators from the
    noisiest to the quietest, ± 1.96 standard errors. What is 0 but for rounding is written as such.
    Returns the figure, and writes no file where `path` is None.
    """
    sizes = list(dict.fromkeys(record["block_size"] for record in records))
    kinds = [kind for kind in ("loss", "gradient") if records[0].get(kind) is not None]
    height = 1.2 + 0.26 * max(sum(r["block_size"] == size for r in records) for size in sizes)
    figure = Figure(figsize=(4.4 * len(kinds) + 1, height * len(sizes)), dpi=130,
                    layout="constrained")  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left")
    panels = figure.subplots(len(sizes), len(kinds), squeeze=False)
    for row, size in zip(panels, sizes, strict=True):
        own = [r for r in records if r["block_size"] == size]
        own = sorted(own, key=lambda r: -r["passes"] * r[kinds[-1]]["mask"])
        for axes, kind in zip(row, kinds, strict=True):
            _variance_panel(axes, own, kind)
            axes.set_title(f"L' = {size}: {kind}", loc="left", fontsize=10)
            axes.set_yticks(range(len(own)), [_estimator_label(r) for r in own], fontsize=8)
            if kind != kinds[0]:
                axes.set_yticklabels([])
    unit = "variance × passes"
    panels[-1][0].set_xlabel(f"{unit}, nats² per token²")
    if len(kinds) > 1:
        panels[-1][1].set_xlabel(f"{unit}, trace of the covariance")
    return save_figure(figure, path)


def _estimator_label(record: Mapping[str, Any]) -> str:
    return str(record["estimator"]) + ("" if record["unbiased"] else " (biased)")


def _variance_panel(axes: Axes, records: Sequence[Mapping[str, Any]], kind: str) -> None:
    values = np.array([r["passes"] * r[kind]["mask"] for r in records])
    # JSON has no NaN: an error that could not be measured is null there.
    known = [r[kind]["mask_stderr"] for r in records]
    errors = np.array(
        [
            np.nan if error is None else 1.96 * r["passes"] * error
            for r, error in zip(records, known, strict=True)
        ]
    )
    noise = 1e-6 * values.max()
    seen = values > noise
    where = np.arange(len(values))
    colours = [COLOURS[0] if r["unbiased"] else COLOURS[1] for r in records]
    low = np.minimum(errors, 0.95 * np.abs(values))  # a bar must not leave a logarithmic axis
    for i in where[seen]:
        axes.errorbar(values[i], i, xerr=[[low[i]], [errors[i]]], fmt="o", color=colours[i],
                      markersize=4, capsize=2, elinewidth=1)  # fmt: skip
    axes.set_xscale("log")
    logarithmic(axes.xaxis)
    for i in where[~seen]:
        axes.annotate("0", (0.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_ylim(-0.6, len(values) - 0.4)
    bare(axes)


_MARKERS = "osD^vP"


@words_as_written
def frontier_plot(record: Mapping[str, Any], path: Path | None = None) -> Figure:
    """Draws perplexity over tokens/s and over tokens an evaluation, as a PNG.

    `record`: that of `evaluation.tuning.tune`. An order is a colour, a block size a marker, hollow
    where the texts are duller than allowed; beside it are its settings. The lines are frontiers,
    the green band what the tolerance allows, the ring the choice. Returns the figure, and writes no
    file where `path` is None.
    """
    figure, panels = new_figure(11, 5.4, columns=2)
    points, settings = record["points"], record["settings"]
    orders = list(dict.fromkeys(one["options"]["sampler"] for one in points))
    sizes = sorted({one["options"]["block_size"] for one in points})
    colours = dict(zip(orders, cycle((*COLOURS, "0.45")), strict=False))
    markers = dict(zip(sizes, cycle(_MARKERS), strict=False))
    base, chosen = points[record["reference"]], points[record["chosen"]]
    most = base["perplexity"]["value"] * (1 + record["tuned"]["tolerance"])
    # What is worse than this is drawn at the edge.
    top = min(4 * most, 1.2 * max(most, *(one["perplexity"]["value"] for one in points)))
    figures = ("tokens_per_second", "tokens/s"), ("tokens_per_nfe", "tokens an evaluation (TPF)")
    for axes, (figure_of, name) in zip(panels, figures, strict=True):
        axes.axhspan(0, most, color=COLOURS[2], alpha=0.08, linewidth=0)
        best = [one for one in points if figure_of in one["frontier"]]
        line = [(one[figure_of], one["perplexity"]["value"]) for one in best]
        axes.plot(*zip(*sorted(line), strict=True), color="0.7", linewidth=1.2, zorder=1)
        for one in points:
            options, value = one["options"], one["perplexity"]["value"]
            colour, above = colours[options["sampler"]], not value < top
            if not above:
                axes.errorbar(one[figure_of], value, one["perplexity"]["stderr"] or 0, fmt="none",
                              ecolor=colour, elinewidth=0.8, alpha=0.6, zorder=2)  # fmt: skip
            axes.plot(one[figure_of], min(value, top), markers[options["block_size"]],
                      color=colour, markerfacecolor=colour if one["lively"] else "white",
                      markersize=6.5, alpha=0.9, zorder=3, clip_on=False)  # fmt: skip
            label = _point_label(options) + (f" ↑ {value:.0f}" if above else "")
            axes.annotate(label, (one[figure_of], min(value, top)), (6, 4),
                          textcoords="offset points", fontsize=7.5, color=colour)  # fmt: skip
        axes.plot(chosen[figure_of], chosen["perplexity"]["value"], "o", markersize=16, zorder=3,
                  markerfacecolor="none", color="black", markeredgewidth=1.3)  # fmt: skip
        axes.set_xlabel(name)
        axes.margins(x=0.1)
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
        least = min(most / 1.5, *(one["perplexity"]["value"] for one in points))
        axes.set_ylim(least / 1.2, top)
    panels[0].set_ylabel(f"perplexity (judge: {settings['judge']})")
    panels[1].tick_params(labelleft=False)
    figure.suptitle(f"{settings['model']} on {names_of(settings['data'])}", x=0.01, ha="left")
    key = [_entry(order.replace("_", " "), "o", colours[order]) for order in orders]
    if len(sizes) > 1:
        key += [_entry(f"L' = {size}", markers[size], "0.35") for size in sizes]
    if not all(one["lively"] for one in points):
        key.append(_entry("duller than allowed", "o", "0.35", markerfacecolor="white"))
    key.append(_entry("chosen", "o", "black", markersize=12, markerfacecolor="none"))
    rows = -(-len(key) // 8)
    figure.legend(handles=key, loc="outside lower center", ncols=-(-len(key) // rows),
                  frameon=False, fontsize=9)  # fmt: skip
    return save_figure(figure, path)


def _entry(label: str, marker: str, colour: str, **style: Any) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label, **style)


def _point_label(options: Mapping[str, Any]) -> str:
    values = [f"{value:g}" for name, value in options.items()
              if name not in ("sampler", "block_size", "temperature")]  # fmt: skip
    return ", ".join(values)


@words_as_written
def temperature_plot(
    records: Mapping[str, Mapping[str, Any]], path: Path | None = None, *, title: str = ""
) -> Figure:
    """Draws generative perplexity against entropy, as a PNG: a curve over temperatures.

    `records`: a name → the record of its `SampleQuality`, as `measure_frontier` orders them; what
    is called "real text" is a point beside the curve. Bars are ± 1 standard error. Returns the
    figure, and writes no file where `path` is None.
    """
    figure, (axes,) = new_figure(6.4, 4.6)
    curve = [name for name in records if name != "real text"]
    for names, colour, style in (
        (curve, COLOURS[0], "o-"),
        (records.keys() - curve, COLOURS[1], "D"),
    ):
        points = [(records[name]["entropy"], records[name]["perplexity"]) for name in names]
        x, y = ([point[i]["value"] for point in points] for i in (0, 1))
        # JSON has no NaN: an error that could not be measured is null there.
        dx, dy = ([point[i]["stderr"] or 0 for point in points] for i in (0, 1))
        axes.errorbar(x, y, xerr=dx, yerr=dy, fmt=style, color=colour, markersize=5, capsize=2,
                      elinewidth=1, linewidth=1.2)  # fmt: skip
        for name, *(across, up) in zip(names, x, y, strict=True):
            axes.annotate(name, (across, up), (6, -11), textcoords="offset points",
                          fontsize=8, color=colour)  # fmt: skip
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("entropy of a sample, nats")
    axes.set_ylabel("generative perplexity")
    axes.set_title(title, loc="left", fontsize=10)
    return save_figure(figure, path)
