"""Output folders: one writer at a time, and nothing replaced that is not this package's own.

    with claim("runs/a", overwrite=True) as folder:   # checked, made, tried, locked
        ...                                           # hours of preparation
        clear(folder)                                 # what our commands wrote there goes
        ...                                           # and only now the new one is written

A folder's contents are replaced, never the folder: `.`, a link to another disk and a mount point
are as good as any. Imports nothing heavy, for the command line's sake.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blockdiff.errors import InputError, first_line
from blockdiff.outputs import file_mode, local_path, try_writing

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

# In a README.md that was written here. Whoever takes it out, has changed the card and keeps it.
CARD_MARK = "<!-- written by blockdiff, anew at each saving; without this line it is kept -->"

# What our commands write: a pattern of names → None for a file, text for a file that has it, `...`
# for a folder with whatever is in it, or what the folder holds.
Tree = dict[str, Any]
TOKENIZER: Tree = {
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json": None,
    r"vocab\.txt|merges\.txt|chat_template\.jinja": None,
    r"(spiece|tokenizer|sentencepiece\.bpe)\.model": None,
}
TUNING: Tree = {r"tuning\.(json|png)": None}
MODEL: Tree = TOKENIZER | {
    r"tuning": TUNING,
    r"(generation_)?config\.json|modeling_blockdiff\.py": None,
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?": None,
    r"README\.md": CARD_MARK,
}
RUN: Tree = MODEL | {
    r"run\.json|metrics\.jsonl|loss\.png": None,
    r"adapter": {r"adapter_(config\.json|model\.safetensors)|mask_row\.safetensors": None},
    r"checkpoints": {r"checkpoint-\d+": ...},
    r"tensorboard": {r"events\.out\.tfevents\..*": None},
}
DEMO: Tree = {
    r"ar|bd3lm": RUN,
    r"report\.md|metrics\.jsonl|loss\.png|denoising\.html": None,
}
REPRODUCTION: Tree = {
    r"plan\.json": None,
    r"data": {r"(train|test)\.jsonl": None},
    r"tokenizer": TOKENIZER,
    r"models": {r"\.?s\d+-[\w.-]+": RUN},
    r"results": {r"[\w.-]+\.(json|tmp)": None},
    r"report": {r"report\.md|results\.json|\w+\.png": None},
}
# The file that says which kind a folder is of; config.json and weights stand in any model's folder.
KINDS: dict[str, tuple[str, Tree]] = {
    "run": ("run.json", RUN),
    "reproduction": ("plan.json", REPRODUCTION),
    "demo": ("ar/run.json", DEMO),
    "model": ("config.json", MODEL),
    "tokenizer": ("tokenizer_config.json", TOKENIZER),
    "tuning": ("tuning.json", TUNING),
}
# What one of these finds of another's in its place, `overwrite` replaces as well.
RUNS = ("run", "reproduction", "demo")
# A killed command's drafts: `tempfile`'s names behind ours.
_DRAFTS: Tree = {
    r"\.(saving|writing|blockdiff)-[a-z0-9_]{8}": ...,
    r"\.run\.json\.tmp|metrics\.tmp": None,
}
# No command of ours wrote them, and they are in nobody's way: they stay.
_IGNORED = re.compile(r"lost\+found|\.nfs\w+|" + re.escape(LOCK))


@contextmanager
def claim(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    go_on: bool = False,
    can_resume: bool = False,
    kinds: tuple[str, ...] = RUNS,
) -> Iterator[Path]:
    """The output folder, checked, made where it was not, and locked until the end of the block.

    A folder must be empty or new. `overwrite`: it may hold a run of one of `kinds`, and nothing
    else, which `clear` then removes. `go_on`: whatever it holds is looked at by the caller.
    `can_resume`: whether the command has `resume`, for its advice. A folder made here and still
    empty at the end is gone again. Death releases the lock.

    Raises `InputError` where nothing can be written, another process is at work in the folder, or
    it holds something it must not hold.
    """
    folder = local_path("out", out)
    made: list[Path] = []
    lock: int | None = None
    try:
        try:
            if os.path.lexists(folder) and not folder.is_dir():
                what = "a link to nothing" if folder.is_symlink() else "a file"
                raise InputError(f"{folder} is {what}; choose another `out`")
            _check_free(folder)
            if not go_on:  # a first look, so that a refused folder is not touched at all
                _check_contents(folder, overwrite, can_resume, kinds)
            made = _make(folder)
            lock = _lock(folder)
            for draft in folder.glob(".blockdiff-????????"):  # of one that was killed in its trial
                draft.unlink(missing_ok=True)
            if not go_on:
                _check_contents(folder, overwrite, can_resume, kinds)
            try_writing(folder)
        except OSError as error:
            raise InputError(
                f"`out` {str(folder)!r} cannot be written: {first_line(error)}; choose another"
            ) from None
        yield folder
    finally:
        _release(folder, lock)
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break


def clear(folder: Path, kinds: tuple[str, ...] = RUNS) -> None:
    """Removes from a claimed folder what our commands wrote there; whatever else is there stays.

    Links and mounts among the folders in it are emptied and stay, too. What says of which kind the
    folder is goes last, so that one that was interrupted here can be cleared again.
    """
    kind = _kind(folder, kinds)
    if kind is not None:
        mark, tree = KINDS[kind]
        _clear(folder, tree, mark)


def _clear(folder: Path, tree: Tree, mark: str = "") -> None:
    last, _, rest = mark.partition("/")
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
        known, inner = _known(path, tree)
        if not known or _IGNORED.fullmatch(path.name):
            continue
        if isinstance(inner, dict):
            lock = _lock(path) if (path / LOCK).exists() else None
            try:
                _clear(path, inner, rest if path.name == last else "")
            finally:
                _release(path, lock)
            with suppress(OSError):  # a link, a mount, or something of somebody else's in it
                path.rmdir()
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _kind(folder: Path, kinds: tuple[str, ...]) -> str | None:
    return next((kind for kind in kinds if (folder / KINDS[kind][0]).is_file()), None)


def _foreign(folder: Path, tree: Tree) -> str | None:
    """The first thing in the folder that the tree does not have, as a path within it.

    Raises `InputError` where another process is at work in a folder of the tree.
    """
    for path in sorted(folder.iterdir()):
        known, inner = _known(path, tree)
        if _IGNORED.fullmatch(path.name):
            continue
        if not known:
            return path.name
        if isinstance(inner, dict):
            _check_free(path)
            within = _foreign(path, inner)
            if within is not None:
                return f"{path.name}/{within}"
    return None


def is_empty(folder: Path) -> bool:
    """Whether a folder is absent or holds nothing but a lock, drafts and the file system's own."""
    return not folder.is_dir() or _first_content(folder) is None


def _first_content(folder: Path) -> str | None:
    names = (path.name for path in folder.iterdir()
             if not _IGNORED.fullmatch(path.name) and not _known(path, {})[0]
             # What a command that was killed at its beginning left of a folder within this one.
             and not ((path / LOCK).is_file() and is_empty(path)))  # fmt: skip
    return min(names, default=None)


def _known(path: Path, tree: Tree) -> tuple[bool, Any]:
    """(whether the tree has it, what it may hold)."""
    for patterns in (tree, _DRAFTS):
        for pattern, inner in patterns.items():
            if re.fullmatch(pattern, path.name):
                if inner is ...:
                    return True, inner
                if isinstance(inner, str):
                    return is_marked(path, inner), None
                if path.is_dir() == isinstance(inner, dict):
                    return True, inner
    return False, None


def is_marked(path: Path, mark: str = CARD_MARK) -> bool:
    """Whether a file says that it was written here."""
    return path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")


def _check_contents(
    folder: Path, overwrite: bool, can_resume: bool, kinds: tuple[str, ...]
) -> None:
    what = _first_content(folder) if folder.is_dir() else None
    if what is None:
        return
    kind = _kind(folder, kinds)
    if kind is None:
        raise InputError(
            f"{folder} is not empty ({what}) and holds no {kinds[0]} of ours; choose another `out`"
        )
    other = _foreign(folder, KINDS[kind][1])
    if not overwrite:
        ways = ["continue it with `resume`"] if can_resume and kind == "run" else []
        ways += ["replace it with `overwrite`"] if other is None else []
        last = "or choose another `out`" if ways else "choose another `out`"
        raise InputError(f"{folder} already holds a {kind}; {', '.join([*ways, last])}")
    if other is not None:
        raise InputError(
            f"{folder} holds {other}, which is no part of the {kind} there and is not replaced; "
            "move it away or choose another `out`"
        )


def _make(folder: Path) -> list[Path]:
    """Makes the folder and those above it; those it made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        for path in made:
            path.rmdir()
        raise
    return made


# Descriptors of the locks this process holds. A forked child, such as a data loading worker, would
# hold them beyond its parent's death.
_held: set[int] = set()


def _forget_in_child() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _lock(folder: Path) -> int | None:
    """An exclusive lock on `folder/.lock`; None where the file system has none.

    Raises `InputError` when another process, or another claim of this one, holds it.
    """
    if fcntl is None:
        _warn(folder, "this system has no flock")
        return None
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode())
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between our opening and locking it.
            if _is_same(handle, path):
                _held.add(handle)
                return handle
        except (BlockingIOError, PermissionError):
            os.close(handle)
            raise _in_use(folder) from None
        except OSError as error:
            os.close(handle)
            path.unlink(missing_ok=True)
            _warn(folder, first_line(error))
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _check_free(folder: Path) -> None:
    """Raises `InputError` when somebody holds a lock on the folder; leaves no trace."""
    if fcntl is None or not (folder / LOCK).is_file():
        return
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder) from None
    except OSError:
        pass  # no locks here: `_lock` says so
    finally:
        os.close(handle)


def _in_use(folder: Path) -> InputError:
    return InputError(f"a run is going on in {folder}; wait for its end or choose another `out`")


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _release(folder: Path, lock: int | None) -> None:
    if lock is None or lock not in _held:  # none, or a forked child's way out
        return
    try:
        # Only while it is held: who opened it meanwhile sees that it is another file by then.
        if _is_same(lock, folder / LOCK):
            (folder / LOCK).unlink()
    except OSError:
        pass  # a disk that became read-only keeps the file; it locks nothing
    finally:
        _held.discard(lock)
        os.close(lock)


def _warn(folder: Path, reason: str) -> None:
    print(
        f"blockdiff: {folder} cannot be locked ({reason}): see to it that no other run uses it",
        file=sys.stderr,
    )
