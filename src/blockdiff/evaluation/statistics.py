"""Standard errors, written once."""

from __future__ import annotations

import math

import numpy as np


def ratio_error(totals: np.ndarray, counts: np.ndarray) -> float:
    """The standard error of Σ totals / Σ counts over independent units [n]; NaN for one unit.

    By the delta method: that of the residuals totals − ratio · counts.

    Example:
        >>> import numpy as np
        >>> ratio_error(np.array([1.0, 3.0]), np.array([1, 1]))
        1.0
    """
    units, count = len(totals), max(counts.sum(), 1)
    if units < 2:
        return math.nan
    residual = totals - totals.sum() / count * counts
    return float(math.sqrt((residual**2).sum() * units / (units - 1)) / count)


def mean_error(values: np.ndarray) -> float:
    """The standard error of the mean of independent values [n]; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def paired_error(
    totals: np.ndarray, counts: np.ndarray, other_totals: np.ndarray, other_counts: np.ndarray
) -> float:
    """The standard error of Σ totals / Σ counts − the same of others, unit by unit [n].

    By the delta method, as `ratio_error`; what the two have in common cancels.

    Example:
        >>> import numpy as np
        >>> one = np.array([1.0, 3.0])
        >>> paired_error(one + 1, np.ones(2), one, np.ones(2))
        0.0
    """
    units = len(totals)
    if units < 2:
        return math.nan
    residual = np.zeros(units)
    for sign, total, count in ((1, totals, counts), (-1, other_totals, other_counts)):
        whole = max(count.sum(), 1)
        residual += sign * (total - total.sum() / whole * count) / whole
    return float(math.sqrt((residual**2).sum() * units / (units - 1)))
