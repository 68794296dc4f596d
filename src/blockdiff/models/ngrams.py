"""N-grams to draft with: which tokens followed the last two before, and how often.

    q(v | a b) = (n_abv + 4 u_ab q(v | b)) / (n_ab + 4 u_ab)
    q(v | b)   = (n_bv + u_b q(v)) / (n_b + u_b),    q(v) = (n_v + 1/V) / (n + 1)

where u is the number of different tokens that followed (Witten and Bell 1991, with a weight). They
cost no network evaluation. Counts are those of a table, of the text a model was trained on say, and
those of the row's own prompt and text so far. In logits, up to a constant,

    log q(v | a b) = log q(v) + log(1 + n_bv / u_b q(v)) + log(1 + n_abv / 4 u_ab q(v | b))

where the last two differ from 0 only at tokens that were seen there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from blockdiff.categorical import Array
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import staging

FILE = "draft_table.safetensors"

# How many counts each different follower of b, and of a b, is worth to the shorter context, and
# how many of a table's one in the row's own text is: the best of those tried (docs/decoding.md).
KAPPA = 1.0, 4.0
OWN = 64


class Table:
    """Counts n_abv of a text, sorted by (b, a).

    Example:
        >>> import numpy as np
        >>> from blockdiff.models.ngrams import Table
        >>> table = Table.of(np.array([1, 2, 3, 1, 2, 3, 1, 2]), vocab_size=5)
        >>> [counts.astype(int).tolist() for counts in table.counts(1, 2)]
        [[0, 0, 0, 2, 0], [0, 0, 0, 2, 0]]
    """

    def __init__(self, vocab_size: int, key: Array, following: Array, count: Array) -> None:
        """`key` int64 [U], ascending: b·V + a; `following` and `count` [U] beside it."""
        self.vocab_size, self.key = vocab_size, key
        self.following, self.count = following, count
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

    def common(self, least: int) -> Table:
        """Without the triples that occur less often than `least`."""
        kept = self.count >= least
        return Table(self.vocab_size, self.key[kept], self.following[kept], self.count[kept])

    def save(self, folder: Path) -> None:
        """Writes it into a model's folder; `read` takes it from there."""
        parts = {"key": self.key, "following": self.following, "count": self.count}
        # In the smallest whole numbers that hold them.
        tensors = {
            name: part.astype(np.min_scalar_type(int(part.max(initial=0))))
            for name, part in parts.items()
        }
        with staging(folder) as temporary:
            save_file(tensors, temporary / FILE, {"vocab_size": str(self.vocab_size)})

    @classmethod
    def read(cls, folder: Path, vocab_size: int) -> Table | None:
        """That of a folder, None where it has none; `InputError` for one of another vocabulary."""
        if not (folder / FILE).is_file():
            return None
        try:
            stored = map(load_file(folder / FILE).__getitem__, ("key", "following", "count"))
            key, following, count = (part.astype(np.int64) for part in stored)
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


class Grams:
    """The n-grams of a text, int64 [N], and of a `table` beside it.

    Example:
        >>> import numpy as np
        >>> from blockdiff.models.ngrams import Grams
        >>> grams = Grams(np.array([1, 2, 3, 1, 2, 3, 1, 2]), vocab_size=5)
        >>> index, value = grams.seen(1, 2)
        >>> index.tolist(), bool((value > 0).all())
        ([3, 3], True)
    """

    def __init__(self, text: Array, vocab_size: int, table: Table | None = None) -> None:
        self.text, self.vocab_size, self.table = text, vocab_size, table
        single = np.bincount(text[2:], minlength=vocab_size) + 1 / vocab_size
        if table is not None:
            single = single + table.single
        self.single: Array = single / single.sum()

    def counts(self, a: int, b: int) -> tuple[Array, Array]:
        """n_bv and n_abv, each [V]."""
        place = (self.text[1:-1] == b).nonzero()[0]
        both = place[self.text[place] == a]
        own = [np.bincount(self.text[i + 2], minlength=self.vocab_size) for i in (place, both)]
        if self.table is not None:
            own = [OWN * x + y for x, y in zip(own, self.table.counts(a, b), strict=True)]
        return own[0], own[1]

    def seen(
        self, a: int, b: int, weights: tuple[float, float] = (1.0, 1.0)
    ) -> tuple[Array, Array]:
        """What the two last terms add to logits: where, int64 [P], and how much [P].

        A token may be named twice. `weights`: what the terms are multiplied by.
        """
        after_b, after_ab = self.counts(a, b)
        i, j = after_b.nonzero()[0], after_ab.nonzero()[0]
        k_b, k_ab = (k * max(len(seen), 1) for k, seen in zip(KAPPA, (i, j), strict=True))
        q = (after_b[j] + k_b * self.single[j]) / (after_b.sum() + k_b)
        gains = np.log1p(after_b[i] / (k_b * self.single[i])), np.log1p(after_ab[j] / (k_ab * q))
        return np.concatenate([i, j]), np.concatenate(
            [weight * gain for weight, gain in zip(weights, gains, strict=True)]
        )
