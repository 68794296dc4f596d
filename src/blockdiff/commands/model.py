"""The model a command opens, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelOptions:
    """A model.

    Attributes:
        model: Model folder or hub id; starter is the one that comes with the package.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
    """

    model: str
    device: str = "auto"
