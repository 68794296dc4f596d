"""The figures of docs/theory.md, drawn from the code they explain.

`python -m blockdiff.apps.illustrations FOLDER` draws them all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from blockdiff.estimators import make_estimator
from blockdiff.layout import BlockLayout
from blockdiff.noising import stratified_noise
from blockdiff.plots import COLOURS, new_figure, save_figure
from blockdiff.schedules import SCHEDULES


def draw_all(folder: Path) -> list[Path]:
    """Every figure, as PNGs in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for draw in (two_stream_mask, schedules, total_weights, clip_bias):
        path = folder / f"{draw.__name__}.png"
        draw(path)
        drawn.append(path)
    return drawn


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)


def two_stream_mask(path: Path, length: int = 12, block_size: int = 4) -> Figure:
    """Which of the 2L tokens x_0 ⊕ x_t may attend to which, by the predicates of `layout`."""
    layout = BlockLayout(length, block_size)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    nothing = torch.zeros(length, length, dtype=torch.long)
    clean = torch.cat([layout.m_bc(query, key).long() * 1, nothing], -1)
    before, own = layout.m_obc(query, key).long(), layout.m_bd(query, key).long()
    noised = torch.cat([before * 2, own * 3], -1)
    grid = torch.cat([clean, noised])
    figure = Figure(figsize=(5.6, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    colours = ["#f2f2f2", COLOURS[0], COLOURS[4], COLOURS[1]]
    axes.imshow(grid.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=3)
    axes.set_xticks(np.arange(2 * length + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(2 * length + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    middle = [length / 2 - 0.5, 1.5 * length - 0.5]
    axes.set_xticks(middle, ["keys of x_0", "keys of x_t"])
    axes.set_yticks(middle, ["queries of x_0", "queries of x_t"], rotation=90, va="center")
    for edge in np.arange(block_size, 2 * length, block_size) - 0.5:
        wide = 1.6 if edge == length - 0.5 else 0.6
        axes.axvline(edge, color="black", linewidth=wide)
        axes.axhline(edge, color="black", linewidth=wide)
    names = ("M_BC: clean, this block and before", "M_OBC: clean, blocks before",
             "M_BD: noised, this block")  # fmt: skip
    axes.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(colours[1:], names, strict=True)],
        loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=1, frameon=False, fontsize=8,
    )  # fmt: skip
    _title(axes, f"L = {length}, L' = {block_size}")
    return save_figure(figure, path)


def schedules(path: Path) -> Figure:
    """Mask rate and NELBO weight over time."""
    figure, (left, right) = new_figure(9, 3.6, 2)
    time = torch.linspace(0.01, 1, 300, dtype=torch.float64)
    for i, (name, schedule) in enumerate(SCHEDULES.items()):
        left.plot(time, schedule.mask_rate(time), color=COLOURS[i], label=name.replace("_", " "))
        right.plot(time, schedule.weight(time), color=COLOURS[i])
    _title(left, "Mask rate 1 − α_t")
    _title(right, "Weight −α'_t/(1 − α_t)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("t")
    left.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def block_weights(
    name: str, size: int, clip: tuple[float, float] | None = None, blocks: int = 200_000
) -> np.ndarray:
    """What the masked tokens of a block weigh together, over L' [blocks]."""
    layout = BlockLayout(size, size)
    x_0 = torch.zeros(blocks, size, dtype=torch.long)
    noise = stratified_noise(blocks, layout, torch.Generator().manual_seed(0))
    maskable = torch.ones_like(x_0, dtype=torch.bool)
    draw = make_estimator(name, clip=clip)(x_0, layout, noise, maskable, 1)
    return np.asarray(draw.weight.sum(-1) / size)


def total_weights(path: Path, size: int = 4) -> Figure:
    """The total weight of a block under three estimators: where Bernoulli's variance comes from."""
    figure, (axes,) = new_figure(7.5, 3.6)
    bins = np.linspace(0, 4, 81).tolist()
    for i, (name, clip) in enumerate((("bernoulli", None), ("clipped", (0.45, 0.95)))):
        weights = block_weights(name, size, clip)
        label = f"{name} U[{clip[0]}, {clip[1]}]" if clip else name
        label += f": mean {weights.mean():.2f}, variance {weights.var():.2f}"
        axes.hist(np.minimum(weights, 4), bins=bins, density=True, histtype="step",
                  color=COLOURS[i], label=label)  # fmt: skip
    exact = block_weights("exact_k", size)
    label = f"exact_k: always {exact.mean():.0f}, variance {exact.var():.0f}"
    axes.axvline(1, color=COLOURS[2], linewidth=2, label=label)
    _title(axes, f"Total weight of a block of {size} tokens, over {size} (last bin: 4 and more)")
    axes.set_yscale("log")
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def weight_of_k(beta: float, omega: float, size: int) -> np.ndarray:
    """How much the mean cross entropy with k of L' tokens masked counts, k = 1…L' [L'].

    E over rate ~ U[β, ω] of P(k | rate) · k/(L' · rate): 1/L' for every k on [0, 1].
    """
    rate = (np.arange(20_000) + 0.5) / 20_000 * (omega - beta) + beta
    k = np.arange(1, size + 1)[:, None]
    log_choose = torch.lgamma(torch.tensor([size + 1.0])) - torch.lgamma(torch.tensor(k + 1.0))
    log_choose = log_choose - torch.lgamma(torch.tensor(size - k + 1.0))
    mass = np.exp(log_choose.numpy()) * rate**k * (1 - rate) ** (size - k)
    return np.asarray((mass * k / (size * rate)).mean(-1))


def clip_bias(path: Path, size: int = 8) -> Figure:
    """Why a clipped draw bounds nothing: it leaves out the cases the bound counts equally."""
    figure, (axes,) = new_figure(7.5, 3.6)
    k = np.arange(1, size + 1)
    clips = ((0.0, 1.0, "U[0, 1] and exact_k"), (0.45, 0.95, "U[0.45, 0.95]"),
             (0.3, 0.8, "U[0.3, 0.8]"), (1.0, 1.0, "all masked"))  # fmt: skip
    for i, (beta, omega, label) in enumerate(clips):
        weight = weight_of_k(beta, omega, size)
        axes.plot(k, weight, "o-", color=COLOURS[i], label=f"{label}: {weight.sum():.2f} in all")
    _title(axes, f"What the cross entropy with k of {size} tokens masked counts for")
    axes.set_xlabel("k")
    axes.set_ylim(0, 0.5)
    axes.annotate("all masked: 1 at k = 8", (size, 0.5), ha="right", va="top", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


if __name__ == "__main__":
    for figure_path in draw_all(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/theory")):
        print(figure_path)
