"""What is written: JSON that every reader takes, files that are whole or absent, places that exist.

Imports nothing heavy, for the command line's sake.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from blockdiff.errors import InputError, first_line


def to_json(record: object, **options: Any) -> str:
    """`record` as JSON by RFC 8259: null where a figure is NaN or infinite.

    `options` are those of `json.dumps`.
    """
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a file in one go: whatever happens, it is the old one or the new one, and on disk."""
    handle, draft = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, file_mode())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    sync_folder(path.parent)


class staging:
    """A temporary folder inside `folder` whose files move up into it when all went well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=self.folder))
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                share(self.temporary)
                for path in sorted(self.temporary.iterdir()):
                    sync_file(path)
                    os.replace(path, self.folder / path.name)
                sync_folder(self.folder)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)


def file_mode(full: int = 0o666) -> int:
    """The mode new files get: 0666 (folders: 0777) less the umask."""
    mask = os.umask(0)
    os.umask(mask)
    return full & ~mask


def share(folder: Path) -> None:
    """Gives files below `folder` the umask's mode: safetensors and mkstemp make them private."""
    mode = file_mode()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sync_file(path: Path) -> None:
    """Brings a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings a folder's own entries (new names, renames) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def local_path(name: str, value: str | os.PathLike[str]) -> Path:
    """The local path an option names, `~` expanded.

    Raises `InputError` for what can be none: empty, a URL, a NUL byte, no UTF-8, `~` without a
    home. `name` is the option's.
    """
    text = os.fspath(value)
    if not text:
        raise InputError(f"`{name}` is empty; name a file or folder")
    if "://" in text:
        raise InputError(f"`{name}` {text!r} is a URL; name a place on this machine's disks")
    if "\0" in text:
        raise InputError(f"`{name}` {text!r} holds a NUL byte; name another place")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"`{name}` {text!r} is not valid UTF-8; name another place") from None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"`{name}` {text!r}: the home folder is unknown (HOME is not set); write the path out"
        ) from None


def new_file(name: str, value: str | os.PathLike[str]) -> Path:
    """The path of a file an option asks to be written, tried before any work.

    Raises `InputError` where there is something already or nothing can be written. Leaves nothing
    behind.
    """
    path = local_path(name, value)
    try:
        if os.path.lexists(path):
            raise InputError(f"{path} exists; name another file for `{name}`")
        if not path.parent.is_dir():
            raise InputError(f"`{name}` {path}: there is no folder {path.parent}; make it first")
        try_writing(path.parent)
        # A name too long is refused by the file system only when it is used.
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        raise InputError(f"`{name}` {path} cannot be written: {first_line(error)}") from None
    return path


def try_writing(folder: Path) -> None:
    """Makes and removes a file in `folder`; raises `OSError` where that fails.

    A full disk or quota takes an empty file, so a page is written and brought to the disk.
    """
    handle, path = tempfile.mkstemp(prefix=".blockdiff-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        Path(path).unlink(missing_ok=True)


# What the system says when it takes no more, and what can be done about it.
_FAILURES = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or ask for more"),
    errno.EFBIG: ("a file would be larger than is allowed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the disk is read-only", "write to another one"),
    errno.EACCES: ("no permission", "change the mode or use another place"),
    errno.EPERM: ("not permitted", "change the mode or use another place"),
    errno.EIO: ("the disk has an error", "check it or use another one"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
}
# torch's own writer reports a short write without the reason behind it.
_TORCH = ("PytorchStreamWriter failed writing", "enforce fail at inline_container")
_UNKNOWN = (
    "the disk is full, or a quota or file-size limit is reached",
    "free some space or raise the limit",
)


def write_failure(error: BaseException) -> str | None:
    """What is wrong with the disk and what to do, in one line; None when `error` is no such thing.

    Knows Python's own errors, and those of safetensors, tokenizers and torch, which are of classes
    of their own and give the reason in their text or not at all.
    """
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    named = re.search(r"\((?:os error|code:) (\d+)\b|\[Errno (\d+)\]", text)
    if number is None and named:  # Rust's and pyarrow's
        number = int(named[1] or named[2])
    if number in _FAILURES:
        what, advice = _FAILURES[number]
    elif any(part in text for part in _TORCH):
        what, advice = _UNKNOWN
    elif isinstance(error, OSError) and number is not None and error.filename is not None:
        what, advice = error.strerror or os.strerror(number), "check the path"
    else:
        return None
    where = error.filename if isinstance(error, OSError) else None
    return f"{what}{'' if where is None else f' ({os.fsdecode(where)})'}; {advice}"
