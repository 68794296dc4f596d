"""Where text comes from: local files, Hugging Face data sets, and the embedded corpus `pydoc`."""

import glob
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from blockdiff import checks
from blockdiff.data.files import file_key, find_files, format_of, read_file
from blockdiff.data.hub_sets import HubUnreachable, hub_or_copies, quiet_libraries
from blockdiff.data.pydoc import pydoc_documents
from blockdiff.data.rows import Rows
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import local_path
from blockdiff.progress import track

# Below this many documents a choice of whole ones cannot come near a fraction such as 0.05.
_FEW_DOCUMENTS = 10
# A document taken for validation may carry it past its share by this factor, never further:
# one book among short notes would otherwise leave the training side without it.
_LARGEST_OVERSHOOT = 1.5
_LINE_OR_SENTENCE_END = re.compile(r"\n+|[.!?][\"')\]]*\s+")
_FURTHEST_END = 2000  # characters
_VISIBLE = re.compile(r"\S")
CHANGED = "the corpus changed while it was read: let nothing write to it and start again"


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again.

    Iterating yields `str` documents; those without a visible character are left out.

    Attributes:
        name: what the corpus was asked for as, for messages and logs.
        readers: each gives the documents of one file or data set, opened anew at every call.
        shared: iterating gives only the share of this process and DataLoader worker.
    """

    name: str
    readers: tuple[Callable[[], Iterable[str]], ...]
    shared: bool = False

    def __iter__(self) -> Iterator[str]:
        for read in self.readers:
            # No variable here: a document may be as large as the memory that is left.
            yield from filter(_has_text, read())


def _has_text(document: str) -> bool:
    return bool(document) and not document.isspace()


def load_corpus(
    source: str | os.PathLike[str] | Sequence[str],
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    subset: str | None = None,
    process: tuple[int, int] = (0, 1),
    format: str = "text",
) -> Corpus:
    """Open a corpus; its text is read when it is iterated, file by file.

    Args:
        source: `pydoc` (the documentation of the running Python), a file, a folder, a glob or
            several of these, or the id of a data set on the Hugging Face hub. Files are `.txt`
            (one document each), `.jsonl`/`.json` (one JSON object a line) or `.parquet`, each
            also compressed (`.gz`, `.xz`; to at most $BLOCKDIFF_DECOMPRESSED_LIMIT bytes, 0 for any
            number, else 200 times its size and at least 1 GiB); a folder written by
            `Dataset.save_to_disk` works too. What is named in several ways, by a folder and a file
            in it for example, is read once.
        split: split of a data set; local files have none.
        text_column: the column (JSON key) that holds the text.
        streaming: read a hub data set over the network as it is used instead of downloading it.
            Each process, and each DataLoader worker in it, then gets documents of its own.
        subset: configuration of a hub data set.
        process: (number, count) of this process among those that share a stream.
        format: what a document is: text, or of rows a chat or a prompt with its response, which
            are documents of JSON (see `data.rows`).

    Raises:
        InputError: nothing is there, it cannot be reached or read, or it holds no text. Faults
            further inside a file are raised when the iteration comes to them.
    """
    sources, rows = _names(source), Rows(format, text_column)
    name = ", ".join(sources)
    readers: list[Callable[[], Iterable[str]]] = []
    # Local documents of a stream are dealt out together, across files; else the order stays.
    to_share: list[Callable[[], Iterable[str]]] = []
    local_readers = to_share if streaming else readers
    read: set[object] = set()
    for one in sources:
        local, kind = kind_of(one)
        if kind == "hub":
            stream = process if streaming else None
            readers.append(_hub_data_set(one, subset, split, stream, rows))
            continue
        if kind == "saved":
            local_readers.append(_saved_data_set(local, split, rows))
        elif split != "train" or subset is not None:
            raise InputError(
                f"{one} is not a data set and has no splits or subsets "
                f"(split={split!r}, subset={subset!r}): leave both out"
            )
        elif kind == "pydoc":
            rows.whole_file("pydoc")
            local_readers.append(pydoc_documents)
        else:
            files = {file_key(path): path for path in find_files(one)}
            local_readers += [
                partial(read_file, path, rows) for key, path in files.items() if key not in read
            ]
            read |= files.keys()
    if to_share:
        readers.append(partial(_share, to_share, process))
    corpus = Corpus(name, tuple(readers), shared=streaming)
    if next(iter(corpus), None) is None:
        raise InputError(f"the corpus {name} holds no text: all its documents are empty")
    return corpus


def _names(source: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """The sources asked for, each once, in their order."""
    sources = [source] if isinstance(source, str | os.PathLike) else source
    try:
        names = [os.fspath(one) for one in sources]
    except TypeError:
        names = [""]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError("no corpus given: name a file, a folder, a data set or 'pydoc'")
    return list(dict.fromkeys(names))


def kind_of(source: str) -> tuple[Path, str]:
    """(the path it would be, `pydoc`, `saved`, `file` or `hub`); `InputError` for a URL."""
    if source == "pydoc":
        return Path(source), "pydoc"
    local = local_path("data", source)
    try:
        if any((local / f"dataset_{kind}.json").is_file() for kind in ("info", "dict")):
            return local, "saved"
        there = os.path.lexists(local)
    except OSError:  # a name too long, a folder that must not be searched: find_files says which
        there = True
    return local, "file" if there or looks_like_path(source) else "hub"


def looks_like_path(source: str) -> bool:
    """Whether a name that is not on disk was meant as a local path, not as a hub id[@revision]."""
    source = source.partition("@")[0]
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or glob.has_magic(source)
        or format_of(Path(source)) is not None
    )


class Part(Iterable[str]):
    """One side of a split of a corpus, read from it as it is asked for, again and again."""

    def __init__(
        self,
        documents: Iterable[str],
        cuts: Sequence[int],
        lengths: Sequence[int],
        validation: bool,
    ) -> None:
        """`cuts`, `lengths` [documents]: where each one's validation tail begins, and its end."""
        self._documents = documents
        self._cuts = cuts
        self._lengths = lengths
        self._validation = validation

    def __len__(self) -> int:
        return sum(
            bool(cut < length if self._validation else cut or not length)
            for cut, length in zip(self._cuts, self._lengths, strict=True)
        )

    def __iter__(self) -> Iterator[str]:
        count = 0
        for document in self._documents:
            if count == len(self._lengths) or len(document) != self._lengths[count]:
                raise InputError(CHANGED)
            cut = self._cuts[count]
            count += 1
            wanted = cut < len(document) if self._validation else cut or not document
            # A slice of the whole text is no copy; of another, the whole is not kept beside it.
            part = document[cut:] if self._validation else document[:cut]
            del document
            if wanted:
                yield part
        if count != len(self._lengths):
            raise InputError(CHANGED)


def split_documents(
    documents: Iterable[str],
    validation_fraction: float = 0.05,
    seed: int = 0,
    *,
    progress: bool = False,
    whole: bool = False,
) -> tuple[Iterable[str], Iterable[str]]:
    """Split a corpus by document into training and validation text.

    Whole documents are drawn for validation until they hold `validation_fraction` of the
    characters; with fewer than 10 documents, each gives up its tail instead, cut at the end of
    a line or sentence. Both sides keep the order of the corpus. The same documents and seed give
    the same split on any machine.

    Args:
        documents: the texts. A corpus is read here to measure it, and again by each side; only
            one document at a time is held. Of a list or an iterator the sides are lists.
        validation_fraction: share of the characters that is held out, inside (0, 1).
        seed: of the draw.
        progress: show a progress bar on stderr.
        whole: never cut a document, however few there are.

    Returns:
        (training documents, validation documents), neither empty.

    Raises:
        InputError: the fraction is not inside (0, 1), or there is too little text to split; while
            a side is iterated, the corpus has changed.
    """
    if isinstance(validation_fraction, bool) or not (
        isinstance(validation_fraction, Real) and 0 < validation_fraction < 1
    ):
        raise InputError(
            f"`validation_fraction` is {validation_fraction!r}; give a number between 0 and 1"
        )
    seed = checks.seed("seed", seed)
    if iter(documents) is documents:
        documents = list(documents)
    lengths, cuts = array("Q"), array("Q")
    few = 2 if whole else _FEW_DOCUMENTS
    for document in track(documents, "Measuring documents") if progress else documents:
        lengths.append(len(document))
        if len(lengths) < few:
            cuts.append(_cut_point(document, validation_fraction))
    if len(lengths) >= few:
        held_out = _drawn(lengths, validation_fraction, seed)
        cuts = array("Q", (0 if i in held_out else size for i, size in enumerate(lengths)))
    elif whole or cuts == lengths:
        raise InputError("the corpus is too small to split: give more text")
    training, validation = (Part(documents, cuts, lengths, side) for side in (False, True))
    if isinstance(documents, list | tuple):
        return list(training), list(validation)
    return training, validation


def _drawn(lengths: Sequence[int], fraction: float, seed: int) -> set[int]:
    """Which documents are held out, of these lengths."""
    # Of all `random` draws, only random() is documented to stay the same in later Pythons.
    draw = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda _: draw.random())
    target = fraction * sum(lengths)
    chosen: set[int] = set()
    held = 0
    for index in order:
        if held >= target or len(chosen) == len(lengths) - 1:
            break
        if held + lengths[index] <= _LARGEST_OVERSHOOT * target:
            chosen.add(index)
            held += lengths[index]
    return chosen or {min(order, key=lambda index: lengths[index])}


def _cut_point(text: str, fraction: float) -> int:
    """Where the validation tail begins; `len(text)` when there is nothing to give up."""
    place = round(len(text) * (1 - fraction))
    reach = min(_FURTHEST_END, int(len(text) * min(fraction, 1 - fraction) / 2))
    ends = _LINE_OR_SENTENCE_END.finditer(text, max(0, place - reach), place + reach)
    cut = min((end.end() for end in ends), key=lambda end: abs(end - place), default=place)
    worthwhile = _VISIBLE.search(text, 0, cut) and _VISIBLE.search(text, cut)
    return cut if worthwhile else len(text)


def _saved_data_set(folder: Path, split: str, rows: Rows) -> Callable[[], Iterable[str]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"cannot read the data set in {folder}: {first_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise InputError(f"{folder}: no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    elif split != "train":
        raise InputError(f"{folder}: no split {split!r}; it has no splits, leave split out")
    return partial(_read_rows, data, rows, str(folder))


def _hub_data_set(
    name: str, subset: str | None, split: str, stream: tuple[int, int] | None, rows: Rows
) -> Callable[[], Iterable[str]]:
    """`name` may end in @revision. `stream`: read as it is used, by this process of so many."""
    import datasets

    where, _, revision = name.partition("@")
    # The hub's converted copies have no named subsets: each is a folder.
    folder = {"data_dir": subset} if revision == "refs/convert/parquet" and subset else {}
    with quiet_libraries(), hub_or_copies(name) as fault:
        try:
            data = datasets.load_dataset(
                where, None if folder else subset, split=split, revision=revision or None,
                streaming=stream is not None, **folder,
            )  # fmt: skip
        # The hub's clients raise everything from OSError to bare HTTP errors of their transport.
        except Exception as error:
            if fault is not None and isinstance(error, ConnectionError):
                raise HubUnreachable(name, subset, split, fault) from error
            raise InputError(
                f"{name!r} is no local file, and the Hugging Face hub did not give it (subset "
                f"{subset!r}, split {split!r}): {first_line(error)}; check the name and the network"
            ) from error
    if stream is not None:
        from datasets.distributed import split_dataset_by_node

        # Its files are dealt out where there are enough, else its rows; workers it sees to itself.
        data = split_dataset_by_node(data, *stream)
    return partial(_read_rows, data, rows, name)


def _share(
    readers: Sequence[Callable[[], Iterable[str]]], process: tuple[int, int]
) -> Iterator[str]:
    """Every n-th document of all readers, n counting processes and their DataLoader workers."""
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    number, processes = process
    documents = (document for read in readers for document in read())
    yield from islice(documents, number * workers + own, None, processes * workers)


def _read_rows(data: Any, rows: Rows, name: str) -> Iterator[str]:
    if data.column_names is not None:  # a streamed data set may not know its columns yet
        data = data.select_columns(rows.columns(data.column_names, name))
    try:
        for number, row in enumerate(data, start=1):
            yield rows.document(row, f"{name}, row {number}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"reading {name} stopped: {first_line(error)}") from error
