"""What the report's parts share: names and verdicts."""

from __future__ import annotations

NAMES = {"ar": "AR", "mdlm": "MDLM", "sedd": "SEDD"}


def label(model: str) -> str:
    """A model's name in the report, how it was started left out."""
    return NAMES.get(model, f"L' = {model[1:].partition('-')[0]}")


def verdict(*gaps: tuple[float, float]) -> str:
    """Of (difference, standard error) pairs, one a seed: yes where all are above 0, no where all
    are below, by 1.96 standard errors; unclear otherwise."""
    if all(gap > 1.96 * error for gap, error in gaps):
        return "**yes**"
    return "**no**" if all(gap < -1.96 * error for gap, error in gaps) else "**unclear**"
