"""Runs as files, which come with the package: `owt/bd3lm-4` in the place of a --config file."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path

from blockdiff.errors import InputError

HERE = Path(__file__).parent
SETS = ("lm1b", "owt", "starter")  # the other folders are for accelerate and lm_eval


def recipes() -> dict[str, Path]:
    """Name → file, by name.

    Example:
        >>> from blockdiff.recipes import recipes
        >>> recipes()["owt/bd3lm-4"].name
        'bd3lm-4.yaml'
    """
    files = sorted(file.with_suffix("") for name in SETS for file in HERE.glob(f"{name}/*.yaml"))
    return {f"{file.parent.name}/{file.name}": file.with_suffix(".yaml") for file in files}


def recipe_or_file(path: Path) -> Path:
    """The recipe that `path` names, with or without `recipes/` and `.yaml`; a file there wins.

    Raises `InputError` with the names there are where it is neither.
    """
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in recipes() and (os.path.isdir(path) or not os.path.exists(path)):
        return recipes()[name]
    if not os.path.exists(path):
        raise InputError(f"--config {path}: no such file or recipe; recipes are {_listing()}")
    return path


def _listing() -> str:
    """All names in one line: those of folders that hold the same ones together."""
    names = [(name, [one.partition("/")[2] for one in recipes() if one.startswith(f"{name}/")])
             for name in SETS]  # fmt: skip
    return "; ".join(
        f"in {' and '.join(f'{name}/' for name, _ in alike)}: {', '.join(stems)}"
        for stems, alike in groupby(names, key=lambda one: one[1])
    )
