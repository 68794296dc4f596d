"""MAUVE (Pillutla et al., NeurIPS 2021): how close generated texts are to real ones, from 0 to 1.

A text is the judge's last hidden state of its last token. k-means cuts the space of both sets into
a tenth as many buckets as there are texts, and MAUVE is the area under

    (e^{−c KL(q ‖ r)}, e^{−c KL(p ‖ r)}),  r = w p + (1 − w) q, 0 < w < 1, c = 5

of the two sets' shares p and q of the buckets. It depends on the features, the number of texts and
their lengths: compare like with like. The buckets are mauve-text's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockdiff.errors import InputError, need

NOTE = "not comparable with published MAUVE (GPT-2 large features)"
# Under this the buckets hold too few texts for the value to mean much.
FEW_TEXTS = 100
FEWEST_TEXTS = 10
CLUSTERINGS = 5
RESAMPLED = 200
_SCALE = 5.0
_WEIGHTS = np.linspace(1e-6, 1 - 1e-6, 25)


@dataclass(frozen=True)
class Mauve:
    """MAUVE and its 95% interval.

    `value` is the mean over `CLUSTERINGS` runs of k-means. `low`, `high`: by the bootstrap over
    texts within each, around the value (the basic interval, which undoes the bias that resampling
    adds). `texts`: in the smaller set; `features`: whose. `note`: what it may be compared with.
    """

    value: float
    low: float
    high: float
    texts: int
    features: str
    note: str = NOTE


def require_mauve() -> Any:
    """The module of mauve-text; raises `InputError` where it is not installed."""
    with _quiet():
        return need("mauve", extra="eval", what="MAUVE").compute_mauve


def mauve(p: np.ndarray, q: np.ndarray, *, features: str = "", seed: int = 0) -> Mauve:
    """MAUVE of two sets of features [n, E] and [m, E]; raises `InputError` for fewer than 10."""
    compute, fewest = require_mauve(), min(len(p), len(q))
    if fewest < FEWEST_TEXTS:
        raise InputError(f"MAUVE of {fewest} texts says nothing; give at least {FEWEST_TEXTS}")
    rng = np.random.default_rng(seed)
    values, shifts = [], []
    for run in range(CLUSTERINGS):
        with _quiet():
            found = compute(p_features=p, q_features=q, seed=(seed + run) % 2**31, verbose=False)
        value = area(found.p_hist, found.q_hist)
        values.append(value)
        # Texts drawn anew fall into the buckets as these did: a multinomial of their shares.
        drawn = zip(
            rng.multinomial(len(p), found.p_hist, RESAMPLED) / len(p),
            rng.multinomial(len(q), found.q_hist, RESAMPLED) / len(q),
            strict=True,
        )
        shifts += [area(*pair) - value for pair in drawn]
    middle = float(np.mean(values))
    # The k-means runs differ, too: their spread is added to that of the texts.
    off = np.array(shifts) + rng.choice(np.array(values) - middle, len(shifts))
    low, high = middle - np.quantile(off, [0.975, 0.025])
    low, high = (float(end) for end in np.clip([low, high], 0, 1))
    return Mauve(middle, low, high, fewest, features)


def area(p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two histograms that sum to 1.

    Example:
        >>> import numpy as np
        >>> from blockdiff.evaluation.mauve import area
        >>> p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
        >>> area(p, p), round(area(p, q), 3)
        (1.0, 0.004)
    """
    r = _WEIGHTS[:, None] * p + (1 - _WEIGHTS[:, None]) * q
    # The curve from (0, 1) to (1, 0): w from 1 to 0, with the ends where a divergence is infinite.
    x = np.array([0.0, *np.exp(-_SCALE * _divergence(q, r))[::-1], 1.0])
    y = np.array([1.0, *np.exp(-_SCALE * _divergence(p, r))[::-1], 0.0])
    return float(np.trapezoid(y, x))


def _divergence(p: np.ndarray, r: np.ndarray) -> np.ndarray:
    """KL(p ‖ r) of each row of r [w, k], which is above 0 wherever p is."""
    seen = p > 0
    return np.asarray((p[seen] * np.log(p[seen] / r[:, seen])).sum(-1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what k-means prints past Python: that it would like more texts in each bucket."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
