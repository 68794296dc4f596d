"""Local text files as documents: what is readable, and errors that name the file and the line."""

import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blockdiff.errors import InputError

_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_KNOWN = f"{', '.join(_FORMATS)}, each also with {' or '.join(_COMPRESSIONS)} behind"


def format_of(path: Path) -> tuple[str, str] | None:
    """(format suffix, compression suffix or ""), or None for a file we cannot read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in _FORMATS else None


def find_files(source: str) -> list[Path]:
    """The readable files a file name, folder or glob stands for, sorted; at least one.

    Raises:
        InputError: there is none, or the one named is of an unknown kind.
    """
    path = Path(os.path.expanduser(source))
    if path.is_file():
        if format_of(path) is None:
            raise InputError(f"{source}: unknown kind of file; known are {_KNOWN}")
        return [path]
    if path.is_dir():
        found = (Path(name) for name in glob.iglob(f"{glob.escape(str(path))}/**", recursive=True))
    elif glob.has_magic(source):
        found = (Path(name) for name in glob.iglob(str(path), recursive=True))
    else:
        raise InputError(f"{source}: no such file or folder")
    files = sorted(file for file in found if file.is_file() and format_of(file))
    if not files:
        raise InputError(f"{source}: no text files there; known are {_KNOWN}")
    return files


def read_file(path: Path, text_column: str) -> Iterator[str]:
    """The documents of one file that `find_files` found.

    Raises:
        InputError: while iterating, naming the file and the line or row that cannot be read.
    """
    file_format = format_of(path)
    assert file_format is not None
    suffix, compression = file_format
    with _opened(path, compression) as file:
        if suffix == ".txt":
            yield _decode(file.read(), path, line=1)
        elif suffix == ".parquet":
            # Parquet is read back and forth; each step back would decompress from the start.
            table = io.BytesIO(file.read()) if compression else file
            yield from _read_parquet(table, path, text_column)
        else:
            yield from _read_json_lines(file, path, text_column)


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[IO[bytes]]:
    try:
        with _COMPRESSIONS.get(compression, open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error


def _decode(data: bytes, path: Path, *, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise InputError(
            f"{path}, line {line}: not valid UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from error


def _read_json_lines(file: IO[bytes], path: Path, text_column: str) -> Iterator[str]:
    for number, data in enumerate(file, start=1):
        line = _decode(data, path, line=number)
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not JSON ({error.msg}); the file must hold one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield text_of(row, text_column, where)


def _read_parquet(file: IO[bytes], path: Path, text_column: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        # Asking for a missing column gives rows without it, which text_of could not explain.
        require_column(table.schema_arrow.names, text_column, str(path))
        batches = table.iter_batches(columns=[text_column], batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield text_of(row, text_column, f"{path}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as parquet: {first_line(error)}") from error


def require_column(columns: Iterable[str], text_column: str, where: str) -> None:
    """Raise `InputError` naming the columns there are, unless `text_column` is one of them."""
    if text_column not in columns:
        has = ", ".join(map(repr, columns)) or "none"
        raise InputError(f"{where}: no column {text_column!r}; it has {has} (set text_column)")


def text_of(row: Mapping[str, Any], text_column: str, where: str) -> str:
    """The text of one row, "" for a null; `InputError` when it has none that is Unicode."""
    require_column(row, text_column, where)
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise InputError(f"{where}: column {text_column!r} holds {kind}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half a surrogate pair in the text; repair or drop it"
        ) from error
    return text


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a one-line message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
