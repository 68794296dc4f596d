"""A table of n-grams to draft with: which tokens followed the last two before, and how often.

    q(v | a b) = (n_abv + κ q(v | b)) / (n_ab + κ)
    q(v | b)   = (n_bv + κ q(v)) / (n_b + κ),    q(v) = (n_v + 1/V) / (n + 1)

It costs no network evaluation. Its counts are those of a text, such as the one a model was trained
on, and those of the row's own prompt and text so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from blockdiff.categorical import Array
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import staging

FILE = "draft_table.safetensors"

KAPPA = 3.0  # how many counts the shorter context is worth


class Table:
    """Counts n_abv of a text, sorted by (b, a).

    Example:
        >>> import numpy as np
        >>> from blockdiff.models.ngrams import Table
        >>> table = Table.of(np.array([1, 2, 3, 1, 2, 3, 1, 2]), vocab_size=5)
        >>> int(table.distribution(1, 2).argmax()), round(table.distribution(1, 2).sum(), 6)
        (3, 1.0)
    """

    def __init__(self, vocab_size: int, key: Array, following: Array, count: Array) -> None:
        """`key` int64 [U], ascending: b·V + a; `following` and `count` [U] beside it."""
        self.vocab_size, self.key = vocab_size, key
        self.following, self.count = following, count
        self.others: Sequence[Table] = ()
        self.single = np.bincount(following, count, vocab_size)

    @classmethod
    def of(cls, tokens: Array, vocab_size: int) -> Table:
        """The table of one text, int64 [N]."""
        return cls.of_all([tokens], vocab_size)

    @classmethod
    def of_all(cls, texts: Iterable[Array], vocab_size: int) -> Table:
        """The table of several, none of which goes on into the next."""
        triples = [
            (text[1:-1] * vocab_size + text[:-2]) * vocab_size + text[2:]
            for text in texts
            if len(text) > 2
        ]
        every = np.concatenate(triples) if triples else np.empty(0, np.int64)
        whole, count = np.unique(every, return_counts=True)
        return cls(vocab_size, whole // vocab_size, whole % vocab_size, count)

    def save(self, folder: Path) -> None:
        """Writes it into a model's folder; `read` takes it from there."""
        tensors = {
            "key": self.key,
            "following": self.following.astype(np.int32),
            "count": self.count.astype(np.int32),
        }
        with staging(folder) as temporary:
            save_file(tensors, temporary / FILE, {"vocab_size": str(self.vocab_size)})

    @classmethod
    def read(cls, folder: Path, vocab_size: int) -> Table | None:
        """That of a folder, None where it has none; `InputError` for one of another vocabulary."""
        if not (folder / FILE).is_file():
            return None
        try:
            key, *beside = map(load_file(folder / FILE).__getitem__, ("key", "following", "count"))
            following, count = (part.astype(np.int64) for part in beside)
        except Exception as error:
            raise InputError(f"{folder / FILE} is no draft table: {first_line(error)}") from None
        sorted_keys = bool((np.diff(key) >= 0).all()) and len(key) == len(following) == len(count)
        ids = np.concatenate([following, key // vocab_size, [0]])
        if not sorted_keys or ids.min() < 0 or ids.max() >= vocab_size:
            raise InputError(f"{folder / FILE} is no table of this model's {vocab_size} tokens")
        return cls(vocab_size, key, following, count)

    def counts(self, a: int, b: int) -> tuple[Array, Array]:
        """n_bv and n_abv, each [V]."""
        size = self.vocab_size
        lower = [b * size, b * size + a, b * size + a + 1, (b + 1) * size]
        one, two, three, four = self.key.searchsorted(lower)
        return tuple(  # type: ignore[return-value]
            np.bincount(self.following[i:j], self.count[i:j], size)
            for i, j in ((one, four), (two, three))
        )

    def distribution(self, a: int, b: int) -> Array:
        """q(· | a b), float64 [V], of this table and the `others` with it."""
        tables = [self, *self.others]
        single: Array = np.sum([table.single for table in tables], 0) + 1 / self.vocab_size
        q: Array = single / single.sum()
        pairs = [table.counts(a, b) for table in tables]
        for counts in (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)):
            q = (counts + KAPPA * q) / (np.sum(counts) + KAPPA)
        return q


def table_of(model: Any, text: Array) -> Table:
    """The table of a row's own text, with that of the model where it has one."""
    own = Table.of(text, model.config.vocab_size)
    given = getattr(model, "draft_table", None)
    own.others = () if given is None else (given,)
    return own
