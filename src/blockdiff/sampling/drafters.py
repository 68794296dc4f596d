"""Drafts from a table of n-grams: which tokens followed the last two before, and how often.

    q(v | a b) = (n_abv + κ q(v | b)) / (n_ab + κ)
    q(v | b)   = (n_bv + κ q(v)) / (n_b + κ),    q(v) = (n_v + 1/V) / (n + 1)

It costs no network evaluation. Its counts are those of a text, such as the one a model was trained
on, and those of the row's own prompt and text so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blockdiff.categorical import Array

KAPPA = 3.0  # how many counts the shorter context is worth


class Table:
    """Counts n_abv of a text, sorted by (b, a).

    Example:
        >>> import numpy as np
        >>> from blockdiff.sampling.drafters import Table
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
        if len(tokens) < 3:
            none = np.empty(0, np.int64)
            return cls(vocab_size, none, none, none)
        a, b, c = tokens[:-2], tokens[1:-1], tokens[2:]
        whole, count = np.unique((b * vocab_size + a) * vocab_size + c, return_counts=True)
        return cls(vocab_size, whole // vocab_size, whole % vocab_size, count)

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
