"""The windows of a packed corpus: a folder of memory-mapped files, complete or absent."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

    Attributes:
        length: tokens in a window.
        tokens: tokens of the corpus in all windows; padding is not counted.
        corpus_tokens: tokens of the whole corpus, BOS and EOS included, with the tail that fills
            no window.
        bytes: UTF-8 bytes of the whole corpus, so `bytes / corpus_tokens` is bytes per token.
        key: what the cache entry is called: a hash of the text, the tokenizer and the settings.
    """

    length: int
    tokens: int
    corpus_tokens: int
    bytes: int
    key: str

    def __init__(self, folder: Path) -> None:
        """Open an entry; see `open_windows`, which looks whether it is whole."""
        self.folder = folder.resolve()
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.length = meta["length"]
        self.tokens = meta["tokens"]
        self.corpus_tokens = meta["corpus_tokens"]
        self.bytes = meta["bytes"]
        self.key = meta["key"]
        self._count: int = meta["windows"]
        self._dtype: str = meta["dtype"]
        self._padded: bool = meta["padded"]
        self._map()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"x_0": torch.from_numpy(self._ids[index].astype(np.int64))}
        if self._real is not None:
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
        self._real = (
            np.memmap(self.folder / _REAL, "<u4", "r", shape=(self._count,))
            if self._padded
            else None
        )


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
    entry: Path,
    encoded: Iterable[tuple[np.ndarray, bool]],
    padding: int | None,
    meta: dict[str, Any],
    name: str = "the corpus",
) -> Windows:
    """Write an entry beside its place and move it there in one step.

    Args:
        entry: its folder; the name is the key.
        encoded: the ids of documents, piece by piece (see `encode_pieces`).
        padding: id that fills each document's last window; None lets windows cross documents.
        meta: `key`, `length`, `dtype` and `bytes`, and what else `meta.json` shall tell.
        name: what the corpus is called in messages.

    Raises:
        InputError: the documents do not fill a window.
        OSError: the entry cannot be written. Like any other error, it leaves nothing behind.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{entry.name[:16]}-", dir=entry.parent))
    try:
        counts = _write(draft, encoded, padding, meta["length"], meta["dtype"])
        _require_windows(counts, meta["length"], name)
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


def _write(
    folder: Path,
    encoded: Iterable[tuple[np.ndarray, bool]],
    padding: int | None,
    length: int,
    dtype: str,
) -> dict[str, Any]:
    """Stream the windows to disk; returns their counts for `meta.json`."""
    written = corpus_tokens = of_document = 0
    with (folder / _IDS).open("wb") as ids_file, (folder / _REAL).open("wb") as real_file:
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
    tokens = corpus_tokens if padding is not None else windows * length
    return {
        "windows": windows,
        "tokens": tokens,
        "corpus_tokens": corpus_tokens,
        "padded": padding is not None,
    }


def _require_windows(counts: dict[str, Any], length: int, name: str) -> None:
    if counts["windows"] == 0:
        tokens = counts["corpus_tokens"]
        raise InputError(
            f"{name} has {tokens} tokens, less than one window of {length}; give more text or a "
            f"`length` of at most {tokens}"
            if tokens
            else f"{name} has no tokens; give documents that are not empty"
        )


def stack(windows: Any, count: int) -> dict[str, Tensor]:
    """Up to `count` windows (0: all), evenly spread, as tensors [B, L]."""
    total = len(windows)
    count = min(count, total) if count else total
    items = [windows[i * total // count] for i in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
