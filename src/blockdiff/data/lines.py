"""Files of which each line is worked on by itself: what a line holds, its id, its seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdiff.data.files import json_lines, no_utf8
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import local_path, to_json

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Line:
    """A line that is worked on. `where`: what messages call it."""

    id: int | str
    number: int
    where: str
    row: dict[str, Any]


class Lines:
    """A file's lines, read anew each time, so that they need not fit into memory.

    JSON lines where the name ends in .jsonl, else a text a line. Raises `InputError` where a line
    is none, here and while iterating.
    """

    def __init__(self, option: str, name: str, json: bool = False) -> None:
        """`option`: what names the file; `json`: whether it is JSON lines whatever its name."""
        if name == "-":
            raise InputError(f"`{option}` is -: with `out` it must be a file, which is read again")
        self.path = local_path(option, name)
        self.json = json or self.path.suffix in JSON_LINES
        try:
            with self.path.open("rb") as file:
                self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {first_line(error)}") from None

    def __iter__(self) -> Iterator[Line]:
        with self.path.open("rb") as file:
            rows = json_lines(file, self.path) if self.json else _texts(file, self.path)
            for number, row in rows:
                yield _line(number, row, f"{self.path}, line {number}")


def _texts(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, data in enumerate(file, start=1):
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise no_utf8(path, number, error) from error
        text = text.removesuffix("\n").removesuffix("\r")
        if text.strip():
            yield number, {"prompt": text}


def _line(number: int, row: dict[str, Any], where: str) -> Line:
    key = row.get("id", number)
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise InputError(f"{where}: the id is {key!r}; it must be text or a whole number")
    try:
        to_json(row).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half a surrogate pair in the text; repair or drop it") from None
    return Line(key, number, where, row)


def seed_of(seed: int, key: int | str) -> int:
    """The seed of a line by the job's seed and its id, 32 bits.

    No two different numbers below 2³² have the same, so that equal prompts get different texts.
    """
    if isinstance(key, int) and 0 <= key < 2**32:
        return _mixed((_mixed(key ^ _mixed(seed)) + _mixed(~seed)) % 2**32)
    told = hashlib.sha256(f"{seed}:{json.dumps(key)}".encode())
    return int.from_bytes(told.digest()[:4], "big")


def _mixed(x: int) -> int:
    """MurmurHash3's finaliser (Appleby 2011), which is one-to-one on 32 bits."""
    x %= 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16
