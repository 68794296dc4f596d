"""The windows of a packed corpus: a folder of memory-mapped files, complete or absent."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blockdiff.errors import InputError
from blockdiff.outputs import file_mode, sync_file, sync_folder, to_json, write_text

_IDS, _REAL, _META = "ids.bin", "real.bin", "meta.json"
# What opening an absent or damaged entry raises.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of a packed corpus, read from its memory-mapped cache folder.

    Item `i` is `{"x_0": int64 [length]}`. When windows do not cross documents it also has
    `"documents": int64 [length]`, 0 at the document's tokens and -1 at the padding behind them.
    Windows of conversations (data/conversations.py) have several documents, 0, 1, … and padding -1,
    and `"maskable": bool [length]`, the tokens of responses.

    Attributes:
        length: tokens in a window.
        tokens: tokens of the corpus in all windows; padding is not counted.
        corpus_tokens: tokens of the whole corpus, BOS and EOS included, with the tail that fills
            no window.
        bytes: UTF-8 bytes of the whole corpus, so `bytes / corpus_tokens` is bytes per token.
        key: what the cache entry is called: a hash of the text, the tokenizer and the settings.
        conversations: of conversations, what became of them (see `pack_conversations`); else empty.
    """

    length: int
    tokens: int
    corpus_tokens: int
    bytes: int
    key: str
    conversations: dict[str, int]

    def __init__(self, folder: Path) -> None:
        """Open an entry; see `open_windows`, which looks whether it is whole."""
        self.folder = folder.resolve()
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.length = meta["length"]
        self.tokens = meta["tokens"]
        self.corpus_tokens = meta["corpus_tokens"]
        self.bytes = meta["bytes"]
        self.key = meta["key"]
        self.conversations = meta.get("conversations", {})
        self._count: int = meta["windows"]
        self._dtype: str = meta["dtype"]
        self._padded: bool = meta["padded"]
        self._map()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"x_0": torch.from_numpy(self._ids[index].astype(np.int64))}
        if self._real is not None and self.conversations:
            marks = torch.from_numpy(self._real[index].astype(np.int64))
            item |= {"documents": marks >> 1, "maskable": (marks & 1).bool()}
        elif self._real is not None:
            is_padding = torch.arange(self.length) >= int(self._real[index])
            item["documents"] = -is_padding.long()
        return item

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy the corpus into every DataLoader worker.
        return {key: value for key, value in vars(self).items() if key not in ("_ids", "_real")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def _map(self) -> None:
        shape = (self._count, self.length)
        self._ids = np.memmap(self.folder / _IDS, self._dtype, "r", shape=shape)
        # Of each window how many tokens are no padding, or of conversations each token's mark.
        kind, own = ("<i4", shape) if self.conversations else ("<u4", shape[:1])
        self._real = np.memmap(self.folder / _REAL, kind, "r", shape=own) if self._padded else None


def open_windows(entry: Path) -> Windows | None:
    """The entry in this folder, or None when it is absent or not what was written.

    Everything is read once to see that: a lost write or a flipped bit would else go into every
    later run's figures.
    """
    try:
        meta = json.loads((entry / _META).read_text(encoding="utf-8"))
        if meta.pop("checksum") != _checksum(meta) or meta["key"] != entry.name:
            return None
        if any(_hash(entry / name) != meta["files"][name] for name in (_IDS, _REAL)):
            return None
        return Windows(entry)
    except _DAMAGE:
        return None


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_windows(
    entry: Path, write: Callable[[BinaryIO, BinaryIO], dict[str, Any]], meta: dict[str, Any]
) -> Windows:
    """Write an entry beside its place and move it there in one step.

    Args:
        entry: its folder; the name is the key.
        write: writes the windows' ids, in `meta["dtype"]`, and what is real of each into two files,
            and returns what `meta.json` tells of them (see `write_windows`).
        meta: `key`, `length` and `dtype`, and what else `meta.json` shall tell.

    Raises:
        InputError: what `write` raises, where the documents do not fill a window.
        OSError: the entry cannot be written. Like any other error, it leaves nothing behind.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{entry.name[:16]}-", dir=entry.parent))
    try:
        with (draft / _IDS).open("wb") as ids_file, (draft / _REAL).open("wb") as real_file:
            counts = write(ids_file, real_file)
        meta = meta | counts | {"files": {name: _hash(draft / name) for name in (_IDS, _REAL)}}
        for name in (_IDS, _REAL):
            sync_file(draft / name)
        write_text(draft / _META, to_json(meta | {"checksum": _checksum(meta)}, indent=2))
        draft.chmod(file_mode(0o777))  # mkdtemp's is private
        try:
            draft.rename(entry)
        except OSError:
            return _settle(draft, entry)
        sync_folder(entry.parent)
        return Windows(entry)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _settle(draft: Path, entry: Path) -> Windows:
    """The place is taken: by another process that was faster, or by a damaged entry."""
    theirs = open_windows(entry)
    if theirs is not None:
        return theirs
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
    draft.rename(entry)
    sync_folder(entry.parent)
    return Windows(entry)


def write_windows(
    ids_file: BinaryIO,
    real_file: BinaryIO,
    *,
    encoded: Iterable[tuple[np.ndarray, bool]],
    padding: int | None,
    length: int,
    dtype: str,
    name: str,
) -> dict[str, Any]:
    """Stream the windows of documents to disk; returns their counts for `meta.json`.

    Args:
        ids_file: gets the ids, in `dtype`.
        real_file: gets of each window how many tokens are no padding.
        encoded: the ids of documents, piece by piece (see `encode_pieces`).
        padding: id that fills each document's last window; None lets windows cross documents.
        length: tokens in a window.
        dtype: numpy's name of it.
        name: what the corpus is called in messages.

    Raises:
        InputError: the documents do not fill a window.
    """
    written = corpus_tokens = of_document = 0
    for ids, ends_document in encoded:
        corpus_tokens += len(ids)
        of_document += len(ids)
        if ends_document:
            if padding is not None:
                windows = -(-of_document // length)
                missing = windows * length - of_document
                real = np.full(windows, length)
                real[-1:] -= missing
                real_file.write(real.astype("<u4").tobytes())
                ids = np.pad(ids, (0, missing), constant_values=padding)
            of_document = 0
        ids_file.write(ids.astype(dtype).tobytes())
        written += len(ids)
    windows = written // length
    ids_file.truncate(windows * length * np.dtype(dtype).itemsize)
    if windows == 0:
        raise InputError(
            f"{name} has {corpus_tokens} tokens, less than one window of {length}; give more text "
            f"or a `length` of at most {corpus_tokens}"
            if corpus_tokens
            else f"{name} has no tokens; give documents that are not empty"
        )
    tokens = corpus_tokens if padding is not None else windows * length
    return {
        "windows": windows,
        "tokens": tokens,
        "corpus_tokens": corpus_tokens,
        "padded": padding is not None,
    }


def stack(windows: Any, count: int) -> dict[str, Tensor]:
    """Up to `count` windows (0: all), evenly spread, as tensors [B, L]."""
    total = len(windows)
    count = min(count, total) if count else total
    items = [windows[i * total // count] for i in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
