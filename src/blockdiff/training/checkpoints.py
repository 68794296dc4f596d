"""Checkpoints that say of themselves whether they are whole.

The file `complete` is written last and holds the size and the SHA-256 of every other file. A
checkpoint without it was interrupted; one whose files differ from it was damaged, and is never
resumed from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from blockdiff.errors import InputError
from blockdiff.outputs import share, sync_file, sync_folder, to_json, write_text

COMPLETE = "complete"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(folder: Path) -> int:
    """The step a checkpoint was written after."""
    found = _NAME.fullmatch(folder.name)
    if found is None:
        raise InputError(f"{folder} is no checkpoint: its name is not checkpoint-NUMBER")
    return int(found[1])


def checkpoints(run: Path) -> list[Path]:
    """The folders named checkpoint-NUMBER of a run, the newest first; any other is not ours."""
    folders = [
        folder
        for folder in (run / "checkpoints").glob("checkpoint-*")
        if _NAME.fullmatch(folder.name) and folder.is_dir()
    ]
    return sorted(folders, key=checkpoint_step, reverse=True)


def seal(folder: Path) -> None:
    """Marks a checkpoint as whole, once all of it is on the disk."""
    share(folder)
    files = {}
    for path in _files(folder):
        sync_file(path)
        files[path.relative_to(folder).as_posix()] = _facts(path)
    sync_folder(folder)
    write_text(folder / COMPLETE, to_json({"files": files}, indent=1))
    sync_folder(folder.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed checkpoint; None when every file is as it was written."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["size"] or _facts(path) != facts:
                return f"{name} is not what was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{COMPLETE} cannot be read"
    return None


def newest_checkpoint(run: Path, *, say: bool = False) -> Path | None:
    """The newest checkpoint of a run that is whole, None when it has none; the run may go on.

    `say`: name on standard error those passed over because they are damaged. Raises `InputError`
    when every one is.
    """
    damaged: list[str] = []
    for folder in checkpoints(run):
        if not (folder / COMPLETE).exists():
            continue
        reason = damage(folder)
        if reason is None:
            if damaged and say:
                print(f"{'; '.join(damaged)}: going on from {folder.name}", file=sys.stderr)
            return folder
        damaged.append(f"{folder.name} is damaged ({reason})")
    if damaged:
        raise InputError(
            f"{run} has no whole checkpoint left: {'; '.join(damaged)}; start the run again with "
            "`overwrite`"
        )
    return None


def prune(newest: Path, keep_last: int, keep_every: int, save_every: int) -> None:
    """Removes a run's checkpoints but the last `keep_last`, counted with the `newest`.

    Of those older, the first at or after each multiple of `keep_every` (0: none) stays.
    """
    older = [folder for folder in checkpoints(newest.parents[1]) if folder != newest]
    for folder in older[keep_last - 1 :]:
        step = checkpoint_step(folder)
        if not (0 < keep_every <= step and step % keep_every < save_every):
            shutil.rmtree(folder)


def remove_unfinished(run: Path) -> None:
    """Removes the checkpoints whose writing was interrupted."""
    for folder in checkpoints(run):
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != COMPLETE)


def _facts(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
