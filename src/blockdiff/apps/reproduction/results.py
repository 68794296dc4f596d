"""Reading a reproduction's results, and comparing models on the same windows.

Perplexity's interval is exp(nats ± 1.96 s.e.), the error over test windows; over seeds it is
Student's t of the seeds' own nats. Two models are compared window by window, which takes the text's
own noise out: difference ± s.e. of nats per token.

`Results` reads the folder of a reproduction, whose per-window arrays the plots and the comparisons
need; `Summary` reads what is left of it in results.json, and is all that the report's text is
written from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from blockdiff.apps.reproduction.plan import Scale, plan
from blockdiff.apps.reproduction.work import result_path
from blockdiff.evaluation.statistics import mean_error, ratio_error

Z = 1.96
# Student's t at 97.5 % for 1, 2, … degrees of freedom; beyond, the last is a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Rate:
    """Nats per token of a model, or of the mean over its seeds, and the error over windows."""

    mean: float
    stderr: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the perplexity, over windows."""
        return math.exp(self.mean - Z * self.stderr), math.exp(self.mean + Z * self.stderr)


@dataclass(frozen=True)
class Nats:
    """Nats and counted tokens of each test window under a model [B]; the mean of several seeds'."""

    nats: np.ndarray
    tokens: np.ndarray
    seeds: int

    @property
    def rate(self) -> Rate:
        mean = float(self.nats.sum() / self.tokens.sum())
        return Rate(mean, ratio_error(self.nats, self.tokens))

    def minus(self, other: Nats) -> tuple[float, float]:
        """Difference of nats per token and its standard error, window by window."""
        gap = self.nats - other.nats
        return float(gap.sum() / self.tokens.sum()), ratio_error(gap, self.tokens)


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of seeds' figures, by Student's t; None for one seed.

    Of two seeds it is t = 12.7 standard errors wide to each side.
    """
    if len(values) < 2:
        return None
    half = T[min(len(values) - 1, len(T)) - 1] * mean_error(np.array(values))
    mean = float(np.mean(values))
    return mean - half, mean + half


class _Jobs:
    """What is known of jobs without their arrays."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.jobs = {job.name: job for job in plan(scale)}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The result of a job."""
        raise NotImplementedError

    def seeds(self, model: str) -> list[int]:
        """The seeds a model was trained with."""
        return [s for s in range(self.scale.seeds) if f"s{s}-{model}" in self.jobs]

    def estimators(self, size: int) -> list[dict[str, Any]]:
        """The noise of every estimator at a block size; NaN where JSON has null."""
        found: list[dict[str, Any]] = []
        for record in self[f"variance-L{size}"]["estimators"]:
            parts = {
                kind: {k: math.nan if v is None else v for k, v in record[kind].items()}
                for kind in ("loss", "gradient")
            }
            found.append({**record, **parts})
        return found

    def rate(self, model: str, seed: int) -> Rate:
        """One seed's."""
        found = self[f"s{seed}-{model}/likelihood"]
        return Rate(found["nats_per_token"], found["stderr"])

    def seconds(self, model: str) -> float:
        """Processor seconds of training, of what it starts from too; the mean of all seeds."""
        total = 0.0
        for seed in self.seeds(model):
            name = f"s{seed}-{model}"
            while name:
                total += self[name]["processor_seconds"]
                before = self.jobs[name].settings
                name = before.get("continues") or before.get("init_from") or ""
        return total / len(self.seeds(model))

    def shares(self, model: str) -> list[float]:
        """Of the gap from MDLM to AR, in perplexity, what each seed of a model closes."""
        found = []
        for seed in self.seeds(model):
            high, own, low = (self.rate(m, seed).perplexity for m in ("mdlm", model, "ar"))
            found.append((high - own) / (high - low))
        return found


class Results(_Jobs):
    """What the folder holds."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        super().__init__(scale)
        self.folder = folder
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            text = result_path(self.folder, name).read_text(encoding="utf-8")
            self._read[name] = json.loads(text)
        found: dict[str, Any] = self._read[name]
        return found

    def nats(self, model: str, *seeds: int) -> Nats:
        """The mean of these seeds, or of all."""
        found = [self[f"s{s}-{model}/likelihood"] for s in seeds or self.seeds(model)]
        nats = np.mean([np.array(x["nats"]) for x in found], axis=0)
        return Nats(nats, np.array(found[0]["tokens"], dtype=float), len(found))

    def gap_closed(self, model: str, *seeds: int) -> tuple[float, float, float]:
        """(share, low, high) of the gap from MDLM to AR, in perplexity; 95 % by bootstrap."""
        parts = [self.nats(name, *seeds) for name in ("mdlm", model, "ar")]
        tokens = parts[0].tokens
        rng = np.random.default_rng(0)
        draws = rng.integers(len(tokens), size=(2000, len(tokens)))

        def share(rows: np.ndarray) -> np.ndarray:
            count = tokens[rows].sum(-1)
            high, own, low = (np.exp(p.nats[rows].sum(-1) / count) for p in parts)
            return (high - own) / (high - low)

        low, high = np.quantile(share(draws), [0.025, 0.975])
        return float(share(np.arange(len(tokens)))), float(low), float(high)


class Summary(_Jobs):
    """What results.json holds."""

    def __init__(self, record: dict[str, Any]) -> None:
        variance: tuple[int, int, int] = tuple(record["scale"]["variance"])
        super().__init__(Scale(**{**record["scale"], "variance": variance}))
        self.record = record
        # Of an earlier plan, before samples at lower temperatures were in it.
        self.jobs = {name: job for name, job in self.jobs.items() if name in record["jobs"]}

    def __getitem__(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.record["jobs"][name]
        return found

    def mean(self, model: str) -> Rate:
        """The mean of all seeds."""
        found = self.record["over_seeds"][model]
        return Rate(found["nats_per_token"], found["stderr"])

    def above(self, model: str, reference: str) -> list[tuple[float, float]]:
        """Nats per token above another model's, ± s.e. over windows, for each seed both have."""
        return [
            (gap, error) for gap, error in self.record["nats_above"][f"{model} above {reference}"]
        ]


def apart(models: Sequence[Rate]) -> list[bool]:
    """Whether each model's 95 % interval lies wholly below the next one's."""
    return [a.interval[1] < b.interval[0] for a, b in pairwise(models)]
