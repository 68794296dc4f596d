"""Numbers and names from outside, checked at both ends in one place.

A message names an option by its Python name in backticks: "`block_size` is 0; it must be at least
1". The command line shows what stands in backticks as it is typed there: --block-size.

Imports nothing heavy, for the command line's sake.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

from blockdiff.errors import InputError

# What a 64-bit integer holds, and numpy's and torch's generators take between them.
LARGEST_SIZE = 2**31 - 1
SEEDS = (0, 2**32 - 1)


def whole_number(
    name: str, value: object, low: int = 1, high: int = LARGEST_SIZE, meaning: str = ""
) -> int:
    """`value` as an int of [low, high]; `meaning` is put behind a refusal.

    Raises `InputError` for anything else: another type (a bool too), a number outside.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"`{name}` is {value!r}; it must be a whole number")
    number = int(value)
    if not low <= number <= high:
        end = f"at least {low}" if number < low else f"at most {high}"
        raise InputError(f"`{name}` is {number}; it must be {end}{meaning}")
    return number


def seed(name: str, value: object) -> int:
    """A seed: 0 to 2³² − 1, what every generator takes."""
    return whole_number(name, value, *SEEDS)


def real_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    meaning: str = "",
) -> float:
    """`value` as a finite float of [low, high]; `above` and `below` leave out an end.

    Raises `InputError` for anything else: another type, infinite, not a number, outside.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"`{name}` is {value!r}; it must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise InputError(f"`{name}` is {value}; it must be a finite number")
    if number < low or (above and number == low):
        raise InputError(f"`{name}` is {value}; it must be {_low(low, above)}{meaning}")
    if number > high or (below and number == high):
        end = f"below {high:g}" if below else f"at most {high:g}"
        raise InputError(f"`{name}` is {value}; it must be {end}{meaning}")
    return number


def _low(low: float, above: bool) -> str:
    return f"above {low:g}" if above else f"at least {low:g}"


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    """`value` when it is one of the names; else `InputError` with the names there are."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"`{name}` {value!r} is unknown; choose one of {', '.join(choices)}")
    return value
