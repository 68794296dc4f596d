"""What the report's parts share: names, verdicts and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NAMES = {"ar": "AR", "mdlm": "MDLM", "sedd": "SEDD"}


def label(model: str) -> str:
    """A model's name in the report, how it was started left out."""
    return NAMES.get(model, f"L' = {model[1:].partition('-')[0]}")


def verdict(holds: bool) -> str:
    return "**yes**" if holds else "**no**"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
