"""run.json: what a run was told, what became of it, and what a resumed run may be told anew.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.outputs import local_path, to_json, write_text
from blockdiff.registry import Choices
from blockdiff.training.config import TrainConfig, as_typed

# What a resumed run may be told anew: it changes what is watched, where and for how long it runs.
RESUMABLE = frozenset(
    {"out", "steps", "minutes", "resume", "overwrite", "workers", "log_every", "eval_every",
     "eval_windows", "eval_draws", "save_every", "keep_last",
     "keep_every", "report_to", "device"}
)  # fmt: skip

# What decides which text a run never saw.
HELD_OUT = ("data", "format", "data_weights", "split", "subset", "text_column", "detokenizer",
            "validation_data", "validation_split", "validation_fraction", "seed", "bos", "eos",
            "across_documents", "window_marks")  # fmt: skip

CONFIG_FILE = "run.json"

# The key of what run.json tells beside the options: data, versions, commit, command, device, …
RECORD = "run"


def save_config(config: TrainConfig, folder: Path, record: dict[str, Any] | None = None) -> None:
    """Writes run.json: the options as they were resolved and, under `run`, the run's record."""
    options = asdict(config) | {"resume": False, "overwrite": False}  # how it was begun, not what
    text = to_json({**options, RECORD: record or {}}, indent=2)
    write_text(folder / CONFIG_FILE, text + "\n")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not os.path.isfile(path):
        raise InputError(
            f"{folder} holds no run ({CONFIG_FILE} is missing); start one without `resume`"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} does not describe a run: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not describe a run: it holds no JSON object")
    return found


def load_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`; raises `InputError` when there is none.

    So it does where a name is a plugin's: which plugin that was is told, and never imported.
    """
    options = _options(folder)
    for name, choices in checks.choices_of(TrainConfig).items():
        value = options.get(name)
        if isinstance(choices, Choices) and isinstance(value, str) and value not in choices:
            used = load_record(folder).get("plugins") or ["MODULE or FILE.py"]
            raise InputError(
                f"the run in {folder} has the {name} {value!r}, which nothing has registered; give "
                f"`plugin` {' '.join(map(str, used))}"
            )
    return _config(folder, options)


def _options(folder: Path) -> dict[str, Any]:
    options = {name: value for name, value in _read(folder).items() if name != RECORD}
    unknown = options.keys() - {field.name for field in fields(TrainConfig)}
    if unknown:
        raise InputError(
            f"{folder / CONFIG_FILE} does not describe a run: there is no option {min(unknown)!r}"
        )
    return options


def _config(folder: Path, options: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig(**options)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE} does not describe a run: {error}") from None


def load_record(folder: Path) -> dict[str, Any]:
    """What run.json tells of the run beside its options; empty for one of an earlier version."""
    record = _read(folder).get(RECORD)
    return record if isinstance(record, dict) else {}


def held_out(folder: str | Path) -> dict[str, Any] | None:
    """The options that decided which text the run in `folder` held out, by their names.

    None where there is no run, as in a model's folder from elsewhere. Raises `InputError` when its
    run.json is damaged.
    """
    if not os.path.isfile(Path(folder) / CONFIG_FILE):
        return None
    options = _options(Path(folder))
    told = {name: options[name] for name in HELD_OUT if name in options}
    return {name: getattr(_config(Path(folder), told), name) for name in HELD_OUT}


def merge_resumed(asked: TrainConfig, given: Collection[str] | None = None) -> TrainConfig:
    """The stored configuration of the run in `asked.out`, with what may be told anew.

    `given`: the options that were asked for, at their defaults or not; the others are the run's
    own. None, for who has a `TrainConfig` alone: those that differ from their defaults. `minutes`
    count from each start and are not carried over. Raises `InputError` when an option that shapes
    the run was given another value.
    """
    out = local_path("out", asked.out)
    stored, default = load_config(out), TrainConfig()
    changed: dict[str, Any] = {
        "out": str(out), "minutes": asked.minutes, "resume": True, "overwrite": False
    }  # fmt: skip
    for field in fields(TrainConfig):
        name, value, own = field.name, getattr(asked, field.name), getattr(stored, field.name)
        told = value != getattr(default, name) if given is None else name in given
        if not told or value == own or name in changed:
            continue
        if name == "precision" and value == "auto":
            continue  # decided when the run began
        if name not in RESUMABLE:
            raise InputError(
                f"the run in {asked.out} has `{name}` {as_typed(own)}, not {as_typed(value)}; "
                "leave the option out to resume"
            )
        changed[name] = value
    return TrainConfig(**{**asdict(stored), **changed})
