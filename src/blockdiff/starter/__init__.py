"""The small model that comes with the package: `starter` in the place of a model's folder."""

from __future__ import annotations

from pathlib import Path

NAME = "starter"


def packaged(source: str | Path) -> str | Path:
    """This folder, where `source` is the starter's name; a file or folder of that name wins."""
    if str(source) == NAME and not Path(NAME).exists():
        return Path(__file__).parent
    return source
