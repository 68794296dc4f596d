"""How a gated drafter learns: the share of its drafts that are accepted, over training tokens.

    blockdiff adapt MODEL drafter --draft 32
    blockdiff train --data TEXT --init-from drafter --objective draft --out first …
    blockdiff train --data TEXT --init-from first --objective draft --out second …
    python benchmarks/drafter.py first second

The runs' own records, one after the other, go into benchmarks/results/drafter.json: "accepted" on
the training text, which is read once, as the mean of every ten records with its standard error;
and beside it what their checkpoints (the averaged weights) have on 8 windows of each of their
texts that were held out, at fully masked blocks of the run's size. A plot of both is
docs/drafter.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import blockdiff
from blockdiff.drafting import draft
from blockdiff.estimators import make_estimator
from blockdiff.evaluation.corpus import open_sequences
from blockdiff.noising import stratified_noise
from blockdiff.objectives import maskable_positions
from blockdiff.plots import COLOURS, new_figure, save_figure

HOME = Path(__file__).parents[1]
KEPT = ("block_size", "length", "batch_size", "steps", "lr", "lr_schedule", "precision", "seed")
MEAN_OF, WINDOWS = 10, 8


@torch.no_grad()
def checkpoints(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, the held-out share by text, its standard error over windows) of each checkpoint."""
    model, tokenizer = blockdiff.load(folder, device="cpu")
    layout = model.config.layout_of(settings["length"], int(settings["block_size"]))
    draws = make_estimator("clipped", clip=(1.0, 1.0))
    how = {"part": "validation", "length": settings["length"], "windows": WINDOWS, "apart": True}
    how |= {name: settings[name] for name in ("validation_fraction", "bos", "eos")}
    windows = {
        Path(text).name.split(".")[0]: open_sequences(
            model, tokenizer, text, split_seed=settings["seed"], **how
        )[1]["x_0"]
        for text in settings["data"]
    }
    places = sorted((folder / "checkpoints").iterdir(), key=lambda one: int(one.name.split("-")[1]))
    for place in places:
        weights = load_file(place / "ema.safetensors")
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        assert weights and not unknown, unknown
        point: dict[str, Any] = {}
        for text, x_0 in windows.items():
            counted = maskable_positions(x_0, True)
            noise = stratified_noise(len(x_0), layout, torch.Generator().manual_seed(0))
            draw = draws(x_0, layout, noise, counted, model.config.mask_token_id)
            shares = draft(model, x_0, draw, layout)["accepted"].sum(1) / counted.sum(1)
            point[text] = float(shares.mean())
            point[f"{text}_stderr"] = float(shares.std() / len(shares) ** 0.5)
        yield int(place.name.split("-")[1]), point


def curve(folder: Path, before: int) -> dict[str, Any]:
    """One run's points; `before`: tokens of the runs it goes on from."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    settings = run.get("config", run)
    step = settings["batch_size"] * settings["length"]
    held_out = [
        {"tokens": before + number * step, **point}
        for number, point in checkpoints(folder, settings)
    ]
    trained = [one for one in lines if "part_accepted" in one]
    means = []
    for some in (trained[i : i + MEAN_OF] for i in range(0, len(trained), MEAN_OF)):
        if len(some) == MEAN_OF:
            own = np.array([one["part_accepted"] for one in some])
            means.append({"tokens": before + some[-1]["tokens"], "accepted": own.mean(),
                          "stderr": own.std(ddof=1) / len(own) ** 0.5})  # fmt: skip
    return {
        "settings": {name: settings.get(name) for name in KEPT},
        "held_out": held_out,
        "training": means,
        "tokens": before + lines[-1]["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    found: list[dict[str, Any]] = []
    for folder in parser.parse_args().runs:
        found.append(curve(folder, found[-1]["tokens"] if found else 0))
    path = HOME / "benchmarks" / "results" / "drafter.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure, (axes,) = new_figure(7.5, 4.2)
    points = [point for run in found for point in run["training"]]
    lines = [("training text, read once", points, "accepted", "stderr")]
    points = [point for run in found for point in run["held_out"]]
    texts = [name for name in points[0] if name != "tokens" and not name.endswith("_stderr")]
    lines += [(f"held out: {text}", points, text, f"{text}_stderr") for text in texts]
    for i, (label, points, value, error) in enumerate(lines):
        axes.errorbar([p["tokens"] for p in points], [p[value] for p in points],
                      yerr=[p[error] for p in points], fmt="o-", markersize=4, capsize=2,
                      color=COLOURS[i], label=label)  # fmt: skip
    axes.set_xlabel("tokens of training")
    axes.set_ylabel("share of drafted tokens accepted")
    axes.set_ylim(0, None)
    axes.set_title("A gated drafter on SmolLM2-135M", loc="left")
    axes.legend(frameon=False)
    save_figure(figure, HOME / "docs" / "drafter.png")
    for run in found:
        print(run["settings"], run["held_out"])


if __name__ == "__main__":
    main()
