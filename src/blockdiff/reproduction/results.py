"""Reading a reproduction's results, and comparing models on the same windows.

Perplexity's interval is exp(nats ± 1.96 s.e.), the error over test windows. Two models are compared
window by window, which takes the text's own noise out: difference ± s.e. of nats per token.
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

from blockdiff.reproduction.plan import Scale, plan
from blockdiff.reproduction.work import result_path

Z = 1.96


@dataclass(frozen=True)
class Nats:
    """Nats and counted tokens of each test window under a model [B]; the mean of several seeds'."""

    nats: np.ndarray
    tokens: np.ndarray
    seeds: int

    @property
    def mean(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def stderr(self) -> float:
        return _ratio_error(self.nats, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the perplexity, over windows."""
        return math.exp(self.mean - Z * self.stderr), math.exp(self.mean + Z * self.stderr)

    def minus(self, other: Nats) -> tuple[float, float]:
        """Difference of nats per token and its standard error, window by window."""
        gap = self.nats - other.nats
        return float(gap.sum() / self.tokens.sum()), _ratio_error(gap, self.tokens)


def _ratio_error(nats: np.ndarray, tokens: np.ndarray) -> float:
    count = len(nats)
    if count < 2:
        return math.nan
    residual = nats - nats.sum() / tokens.sum() * tokens
    return float(math.sqrt((residual**2).sum() * count / (count - 1)) / tokens.sum())


class Results:
    """What the folder holds."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.jobs = {job.name: job for job in plan(scale)}
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The result of a job."""
        if name not in self._read:
            text = result_path(self.folder, name).read_text(encoding="utf-8")
            self._read[name] = json.loads(text)
        found: dict[str, Any] = self._read[name]
        return found

    def seeds(self, model: str) -> list[int]:
        """The seeds a model was trained with."""
        return [s for s in range(self.scale.seeds) if f"s{s}-{model}" in self.jobs]

    def nats(self, model: str, *seeds: int) -> Nats:
        """The mean of these seeds, or of all."""
        found = [self[f"s{s}-{model}/likelihood"] for s in seeds or self.seeds(model)]
        nats = np.mean([np.array(x["nats"]) for x in found], axis=0)
        return Nats(nats, np.array(found[0]["tokens"], dtype=float), len(found))

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


def apart(models: Sequence[Nats]) -> list[bool]:
    """Whether each model's 95 % interval lies wholly below the next one's."""
    return [a.interval[1] < b.interval[0] for a, b in pairwise(models)]
