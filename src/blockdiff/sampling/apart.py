"""Rows that fail alone: what an order, a guide or a rule gets wrong takes no other row with it.

Rows with equal options are asked about together. Where that raises, each is asked about alone,
which gives what it would have given among the others; one that raises again is the culprit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from blockdiff.categorical import Array
from blockdiff.sampling.orders.base import Order, RowState
from blockdiff.sampling.rows import Rows

T = TypeVar("T")
View = tuple[Array, Order, RowState]  # places among the rows of an evaluation, and what is asked


def each(
    rows: Rows, names: Array, views: Sequence[View], ask: Callable[[Array, Order, RowState], T]
) -> Iterator[tuple[View, T]]:
    """Every view with `ask` of it; one that raises in parts, without the rows that fail.

    `names` [n]: which of `rows` are in the evaluation. Raises where rows do not fail alone.
    """
    for place, order, view in views:
        try:
            found = ask(place, order, view)
        except Exception as error:
            if len(place) == 1:
                rows.fail(int(names[place[0]]), error)
                continue
            if rows.failed is None:
                raise
            alone = [(place[[i]], order, view.of(np.array([i]))) for i in range(len(place))]
            yield from each(rows, names, alone, ask)
        else:
            yield (place, order, view), found
