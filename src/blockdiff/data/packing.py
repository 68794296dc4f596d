"""Windows of token ids: packed once into a memory-mapped cache, or on the fly from a stream."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from blockdiff.checks import whole_number
from blockdiff.data.corpora import CHANGED, Corpus
from blockdiff.data.encoding import encode_pieces, mark_windows, utf8
from blockdiff.data.tokenizers import eos_id, fingerprint
from blockdiff.data.windows import Windows, build_windows, open_windows, write_windows
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import local_path
from blockdiff.progress import track

_FORMAT_VERSION = 2  # part of every key: raise it when the files or the encoding change


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    bos: bool = False,
    eos: bool = True,
    across_documents: bool = True,
    window_marks: bool = False,
    cache_dir: Path | None = None,
    progress: bool = False,
    name: str = "the corpus",
) -> Windows:
    """Cut a corpus into windows of `length` tokens, or find them in the cache.

    The entry is complete or absent whatever happens to this process, and several processes may
    pack the same corpus at once.

    Args:
        documents: the texts; read twice (an iterator is first gathered into a list).
        tokenizer: encodes the texts, without the special tokens it would add by itself.
        length: tokens in a window, at least 1.
        bos: begin each document with the tokenizer's BOS (or CLS, or EOS).
        eos: end each document with the tokenizer's EOS (or SEP).
        across_documents: True cuts the concatenated documents and drops the tail that fills no
            window; False begins each document in a new window and pads its last one.
        window_marks: begin every window with BOS and end it with EOS, `length` − 2 tokens between.
        cache_dir: where entries are kept; by default $BLOCKDIFF_CACHE, else ~/.cache/blockdiff.
        progress: tell on stderr how far it is (see `blockdiff.progress.track`).
        name: what the corpus is called in messages.

    Raises:
        InputError: `length` below 1; a BOS, EOS or padding token is needed and missing; the
            corpus is empty, shorter than one window, or not the same when it is read again; a
            text encodes to the mask token; the cache cannot be written.
    """
    whole_number("length", length)
    cache = _default_cache() if cache_dir is None else cache_dir
    documents, text = read_once(documents, progress, name)
    # Before the key, so that what cannot be packed is refused whether cached or not.
    encoded = encode_pieces(
        read_again(documents, text), tokenizer, bos=bos, eos=eos,
        progress_to=text.characters if progress else None,
    )  # fmt: skip
    if window_marks:
        if not across_documents:
            raise InputError("`window_marks` needs `across_documents`: padded windows have none")
        encoded = mark_windows(encoded, tokenizer, length)
    padding = None if across_documents else _padding_id(tokenizer)
    settings = {
        "length": length,
        "bos": bos,
        "eos": eos,
        "across_documents": across_documents,
    } | ({"window_marks": True} if window_marks else {})
    write = partial(write_windows, encoded=encoded, padding=padding, length=length, name=name)
    return find_or_build(cache, text, tokenizer, settings, write)


def find_or_build(
    cache: Path | None,
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    write: Callable[..., dict[str, Any]],
) -> Windows:
    """The windows of a text, from the cache or written by `write` (see `build_windows`).

    `text`: read to its end. `settings`: `length`, and all else that decides what the windows hold.
    Raises `InputError` where the cache cannot be written, and what `write` does.
    """
    cache = _default_cache() if cache is None else cache
    settings = {
        "format": _FORMAT_VERSION,
        "text": text.hash(),
        "tokenizer": fingerprint(tokenizer),
        **settings,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    entry = cache / key
    cached = open_windows(entry)
    if cached is not None:
        return cached
    # Not len(tokenizer): some vocabularies have gaps, and ids beyond their size.
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4"
    meta = {
        "key": key, "length": settings["length"], "dtype": dtype, "bytes": text.bytes,
        "settings": settings,
    }  # fmt: skip
    try:
        return build_windows(entry, partial(write, dtype=dtype), meta)
    except OSError as error:
        raise InputError(
            f"cannot pack into {cache}: {first_line(error)}; make room or name another "
            "folder in the environment variable BLOCKDIFF_CACHE"
        ) from error


class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """Windows packed across documents while a corpus is read; nothing is cached.

    Arguments and windows are those of `pack` across documents. Raises `InputError` for a `length`
    below 1, or BOS or EOS asked of a tokenizer without; while iterating, for a stream shorter than
    one window or a text that encodes to the mask token.

    Yields `{"x_0": int64 [length]}`. Each DataLoader worker takes its share of the documents (a
    `Corpus` may deal them out itself, else every n-th of n workers) and drops its own tail, or, if
    `endless`, reads them again and again. A worker for which no document is left yields nothing.

    Attributes:
        length: tokens in a window.
    """

    def __init__(
        self,
        documents: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        bos: bool = False,
        eos: bool = True,
        endless: bool = False,
        window_marks: bool = False,
    ) -> None:
        whole_number("length", length)
        encode_pieces((), tokenizer, bos=bos, eos=eos)  # a missing token is refused here
        self.length = length
        self.endless = endless
        self.window_marks = window_marks
        if window_marks:
            mark_windows((), tokenizer, length)  # a missing token is refused here
        self._documents = documents
        self._tokenizer = tokenizer
        self._marks = {"bos": bos, "eos": eos}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        shard, shards = (worker.id, worker.num_workers) if worker else (0, 1)
        carry = np.empty(0, np.int32)
        while True:
            documents = self._documents
            if not (isinstance(documents, Corpus) and documents.shared):
                documents = islice(documents, shard, None, shards)
            found = False
            pieces = encode_pieces(documents, self._tokenizer, **self._marks)
            if self.window_marks:
                pieces = mark_windows(pieces, self._tokenizer, self.length)
            for ids, _ in pieces:
                tokens = np.concatenate([carry, ids])
                full = len(tokens) // self.length * self.length
                for window in tokens[:full].reshape(-1, self.length):
                    found = True
                    yield {"x_0": torch.from_numpy(window.astype(np.int64))}
                carry = tokens[full:]
            if not found and shard > 0 and len(carry) == 0:
                return
            if not found:
                raise InputError(
                    f"the stream (part {shard + 1} of {shards}) ended after {len(carry)} tokens, "
                    f"before one window of {self.length}: give more text, a smaller length or "
                    "fewer workers; a generator can be read only once"
                )
            if not self.endless:
                return


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (eos_id(tokenizer), tokenizer.pad_token_id):
        if token is not None:
            return token
    raise InputError(
        "`across_documents` false pads, but the tokenizer has no EOS or padding token; use a "
        "tokenizer that has one"
    )


def read_once(documents: Iterable[str], progress: bool, name: str) -> tuple[Iterable[str], Text]:
    """(documents that can be read again, what they are) of documents, which are read here.

    Raises `InputError` where they hold nothing.
    """
    if iter(documents) is documents:
        documents = list(documents)
    text = Text(track(documents, "Reading documents") if progress else documents)
    deque(text, maxlen=0)  # a loop's variable would keep the last document
    if text.bytes == 0:
        raise InputError(f"{name} is empty; give documents that are not empty")
    return documents, text


class Text:
    """Documents passed on, and what has been passed on.

    Attributes:
        bytes: UTF-8 bytes of the text.
        characters: of the text; each document counts as one more.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._source = documents
        self._digest = hashlib.sha256()
        self.bytes = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._source:
            size = 0
            for data in utf8(document):
                self._digest.update(data)
                size += len(data)
            # Behind the text, where it is known: read backwards it says where documents end.
            self._digest.update(size.to_bytes(8, "little"))
            self.bytes += size
            self.characters += len(document) + 1
            yield document

    def hash(self) -> str:
        """SHA-256 (hex) of the text and where its documents end."""
        return self._digest.hexdigest()


def read_again(documents: Iterable[str], first: Text) -> Iterator[str]:
    """The documents read again; raises `InputError` at their end when they are others now."""
    again = Text(documents)
    yield from again
    if again.hash() != first.hash():
        raise InputError(CHANGED)


def require_cache() -> None:
    """Raises `InputError` where there is no place for packed corpora, before other work is done."""
    _default_cache()


def _default_cache() -> Path:
    named = os.environ.get("BLOCKDIFF_CACHE")
    if named:
        return local_path("BLOCKDIFF_CACHE", named)
    try:
        return Path("~/.cache/blockdiff").expanduser()
    except RuntimeError:
        raise InputError(
            "there is no home folder for the cache of packed text (HOME is not set); name a folder "
            "in the environment variable BLOCKDIFF_CACHE"
        ) from None
