"""Local text files as documents: what is readable, and errors that name the file and the line."""

import codecs
import fnmatch
import glob
import gzip
import io
import json
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blockdiff.data.rows import Rows
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import local_path

_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_KNOWN = f"{', '.join(_FORMATS)}, each also with {' or '.join(_COMPRESSIONS)} behind"

# Text shrinks to a third or a tenth, logs to a fiftieth; what unpacks to more than both of these
# was made to fill a memory.
_LARGEST_RATIO = 200
_ALWAYS_UNPACKED = 2**30  # bytes
_LIMIT_VARIABLE = "BLOCKDIFF_DECOMPRESSED_LIMIT"
_CHUNK = 2**22  # bytes read at a time


def format_of(path: Path) -> tuple[str, str] | None:
    """(format suffix, compression suffix or ""), or None for a file we cannot read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in _FORMATS else None


def find_files(source: str) -> list[Path]:
    """The readable files a file name, folder or glob stands for, sorted; at least one.

    Folders are searched to the bottom, links followed; a file that is reached in several ways
    comes once. What begins with a dot is left out, unless a glob says the dot.

    Raises:
        InputError: there is none, the one named is of an unknown kind, or something on the way
            cannot be read.
    """
    path = local_path("data", source)
    try:
        if path.is_dir():
            found: Iterable[Path] = _below(path, set())
        elif os.path.lexists(path):
            if format_of(path) is None:
                raise InputError(f"{source}: unknown kind of file; known are {_KNOWN}")
            found = [path]
        elif glob.has_magic(source):
            root = Path(path.anchor)
            found = _matching(root, path.parts[len(root.parts) :], set())
        else:
            raise InputError(f"{source}: no such file or folder")
        files = {file_key(file): file for file in sorted(found, reverse=True) if format_of(file)}
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {first_line(error)}") from error
    if not files:
        raise InputError(f"{source}: no text files there; known are {_KNOWN}")
    return sorted(files.values())


def file_key(path: Path) -> object:
    """What is the same for all names of one file, and only for these.

    Raises `InputError` for what is no regular file: a named pipe or a device may never end.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{path} is no regular file but a pipe, a device or a socket")
    # Some network and Windows file systems number no files.
    return (state.st_dev, state.st_ino) if state.st_ino else os.path.realpath(path)


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Everything in a folder and below that is no folder. `seen`: folders already entered."""
    for inner in _folders(folder, seen):
        yield from (entry for entry in _entries(inner) if not entry.is_dir())


def _folders(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """A folder and all below it, each once, though links lead to it in circles."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        yield folder
        waiting += reversed([entry for entry in _entries(folder) if entry.is_dir()])


def _entries(folder: Path, hidden: bool = False) -> list[Path]:
    """What is in a folder, sorted. Unlike `glob`, it raises OSError where it may not look."""
    return sorted(folder / name for name in os.listdir(folder) if hidden or name[0] != ".")


def _matching(folder: Path, pattern: Sequence[str], seen: set[tuple[int, int]]) -> Iterator[Path]:
    """What matches the parts of a glob, no folders."""
    if not pattern:
        if not folder.is_dir():
            yield folder
        return
    part, rest = pattern[0], pattern[1:]
    if part == "**":
        if not rest:
            yield from _below(folder, seen)
        for inner in _folders(folder, set()) if rest else ():
            yield from _matching(inner, rest, seen)
    elif glob.has_magic(part):
        for entry in _entries(folder, hidden=part[0] == "."):
            if fnmatch.fnmatch(entry.name, part) and (not rest or entry.is_dir()):
                yield from _matching(entry, rest, seen)
    elif os.path.lexists(folder / part) and (not rest or (folder / part).is_dir()):
        yield from _matching(folder / part, rest, seen)


def read_file(path: Path, rows: Rows) -> Iterator[str]:
    """The documents of one file that `find_files` found.

    Raises:
        InputError: while iterating, naming the file and the line or row that cannot be read.
    """
    file_format = format_of(path)
    assert file_format is not None
    suffix, compression = file_format
    with _opened(path, compression) as file:
        if suffix == ".txt":
            rows.whole_file(str(path))
            yield _read_text(file, path)
        elif suffix == ".parquet":
            # Parquet is read back and forth; each step back would decompress from the start.
            table = io.BytesIO(file.read()) if compression else file
            yield from _read_parquet(table, path, rows)
        else:
            yield from _read_json_lines(file, path, rows)


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[IO[bytes]]:
    try:
        file_key(path)  # it may have become a pipe since it was found
        if not compression:
            with open(path, "rb") as file:
                yield file
        else:
            with _COMPRESSIONS[compression](path, "rb") as unpacked:
                limited = _Limited(unpacked, path, _limit(path))
                yield io.BufferedReader(limited, 2**17)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error


def _limit(path: Path) -> int:
    """How many bytes this file may unpack to; 0 is any number."""
    text = os.environ.get(_LIMIT_VARIABLE)
    if not text:
        return max(_ALWAYS_UNPACKED, _LARGEST_RATIO * path.stat().st_size)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InputError(f"{_LIMIT_VARIABLE} is {text!r}; it must be a number of bytes, or 0")
    return int(text)


class _Limited(io.RawIOBase):
    """What a compressed file unpacks to; reading on beyond the limit is refused."""

    def __init__(self, source: IO[bytes], path: Path, limit: int) -> None:
        self._source = source
        self._path = path
        self._limit = limit
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self._done += len(data)
        if self._limit and self._done > self._limit:
            raise InputError(
                f"{self._path} unpacks to more than {self._limit:,} bytes; if it is meant to, set "
                f"{_LIMIT_VARIABLE} to a larger number (0: no limit)"
            )
        return len(data)


def _read_text(file: IO[bytes], path: Path) -> str:
    """A whole file as text. It is decoded bit by bit: as bytes and text at once it needs twice."""
    text = io.StringIO(newline="")
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        data = file.read(_CHUNK)
        pending = decoder.getstate()[0]
        try:
            text.write(decoder.decode(data, final=not data))
        except UnicodeDecodeError as error:
            line += (pending + data)[: error.start].count(b"\n")
            raise no_utf8(path, line, error) from error
        line += data.count(b"\n")
        if not data:
            return text.getvalue()


def no_utf8(path: Path | str, line: int, error: UnicodeDecodeError) -> InputError:
    """What a line that is none says."""
    return InputError(
        f"{path}, line {line}: not valid UTF-8 ({error.reason}); convert the file to UTF-8"
    )


def _read_json_lines(file: IO[bytes], path: Path, rows: Rows) -> Iterator[str]:
    for number, row in json_lines(file, path):
        yield rows.document(row, f"{path}, line {number}")


def json_lines(file: IO[bytes], path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, JSON object) of each line of a file that is not blank.

    Raises `InputError` for a line that is none; `path` is what messages call the file.
    """
    for number, data in enumerate(file, start=1):
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise no_utf8(path, number, error) from error
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        row = _json(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield number, row


def _json(line: str, where: str) -> object:
    try:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise
        except ValueError:  # more digits than Python makes an int of; they are not the text
            return json.loads(line, parse_int=float)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg}); the file must hold one JSON object a line"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: lists or objects nested too deeply; flatten them") from error


def _read_parquet(file: IO[bytes], path: Path, rows: Rows) -> Iterator[str]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        # Asking for a missing column gives rows without it, which could not be explained.
        columns = rows.columns(table.schema_arrow.names, str(path))
        batches = table.iter_batches(columns=columns, batch_size=1024)
        found = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(found, start=1):
            yield rows.document(row, f"{path}, row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as parquet: {first_line(error)}") from error
