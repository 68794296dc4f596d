"""Numbers and names from outside, checked at both ends in one place.

A message names an option by its Python name in backticks: "`block_size` is 0; it must be at least
1". The command line shows what stands in backticks as it is typed there: --block-size.

Imports nothing heavy, for the command line's sake.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from blockdiff.errors import InputError
from blockdiff.registry import Choices

# What a 64-bit integer holds, and numpy's and torch's generators take between them.
LARGEST_SIZE = 2**31 - 1
SEEDS = (0, 2**32 - 1)
# The BPE trainer makes room for all of a vocabulary at once, and ends the process without it.
LARGEST_VOCABULARY = 2**21
# Tokens of a text, steps, texts: more is a slip of the finger, refused before memory is asked for.
LARGEST_TEXT = 10**7
# Below this a rate is no longer one in float32 arithmetic: as good as 0, and not said to be.
SMALLEST = 1e-12
TOP_P_RULES = ("nucleus", "paper")

# option → the least and the most it can be, both included
Whole = Mapping[str, tuple[int, int]]
# option → the ends of its range, and whether each end itself is left out
Reals = Mapping[str, tuple[float, float, bool, bool]]

# What the functions and commands that measure can be told, the same wherever the name is used.
WHOLE_NUMBERS: Whole = {
    "batch_size": (1, LARGEST_SIZE),
    "budget": (1, LARGEST_SIZE),
    "batches": (2, LARGEST_SIZE),
    "block_size": (1, LARGEST_SIZE),
    "draws": (1, LARGEST_TEXT),
    "length": (1, LARGEST_SIZE),
    "samples": (1, LARGEST_TEXT),
    "seed": SEEDS,
    "split_seed": SEEDS,
    "timesteps": (1, LARGEST_SIZE),
    "top_k": (1, LARGEST_SIZE),
    "vocab_size": (1, LARGEST_VOCABULARY),
    "window": (2, LARGEST_SIZE),
    "windows": (0, LARGEST_SIZE),
    "words": (1, LARGEST_SIZE),
    "workers": (1, 1024),
}
REAL_NUMBERS: Reals = {
    "delay": (0, 3600, False, False),
    "minutes": (SMALLEST, 1e9, False, False),
    "temperature": (0, 1e30, False, False),
    "top_p": (0, 1, True, False),
    "validation_fraction": (SMALLEST, 1, False, True),
}
MEANINGS = {
    "temperature": " (0 is greedy)",
    "top_k": "; leave it out to keep every token",
    "window": ": of one token nothing is predicted",
    "windows": " (0 is all)",
}


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
        raise InputError(f"`{name}` is {_shown(number)}; it must be {end}{meaning}")
    return number


def whole_numbers(name: str, value: object, low: int = 1) -> tuple[int, ...]:
    """Whole numbers of at least `low`, none twice: one, several, or a text such as "1,4,16".

    Raises `InputError` for anything else.
    """
    parts: Any = value if isinstance(value, list | tuple) else [value]
    if isinstance(value, str):
        try:
            parts = [int(part) for part in value.split(",")]
        except ValueError:
            raise InputError(
                f"`{name}` is {value!r}; it must be a whole number, or several like 1,4,16"
            ) from None
    found = tuple(whole_number(name, part, low) for part in parts)
    if not found or len(set(found)) < len(found):
        raise InputError(f"`{name}` is {value!r}; it must be different numbers like 1,4,16")
    return found


def real_numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers in a text such as "0.5,0.9", none twice; raises `InputError` for another."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise InputError(f"`{name}` is {text!r}; it must be different numbers like 0.5,0.9")
    return found


def shares(name: str, value: str | None, count: int, of: str) -> list[float]:
    """Shares, with sum 1, of a text of `count` weights above 0; equal ones for None.

    `of`: what each is for, in the refusal (`InputError`) of a text that is something else.
    """
    if value is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in value.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(SMALLEST <= w <= 1 / SMALLEST for w in weights):
        raise InputError(
            f"`{name}` {value!r} must be {count} numbers above 0, one for each {of}, for example "
            "0.7,0.3"
        )
    return [weight / sum(weights) for weight in weights]


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
    try:
        number = float(value)
    except OverflowError:  # of an integer
        raise InputError(f"`{name}` is {_shown(value)}; it must be a finite number") from None
    if not math.isfinite(number):
        raise InputError(f"`{name}` is {value}; it must be a finite number")
    if number < low or (above and number == low):
        raise InputError(f"`{name}` is {value}; it must be {_low(low, above)}{meaning}")
    if number > high or (below and number == high):
        end = f"below {high:g}" if below else f"at most {high:g}"
        raise InputError(f"`{name}` is {value}; it must be {end}{meaning}")
    return number


def _shown(number: Any) -> str:
    """A number as written; Python refuses to write out one of thousands of digits."""
    return str(number) if abs(number) <= 10**30 else f"{'-' * (number < 0)}10^30 or more"


def _low(low: float, above: bool) -> str:
    return f"above {low:g}" if above else f"at least {low:g}"


def choices_in(hint: Any) -> Collection[str] | None:
    """The choices that a type names by `Literal` or by `Annotated[str, Choices]`; None for none."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) is Annotated:
        return next((one for one in hint.__metadata__ if isinstance(one, Collection)), None)
    found = (choices_in(part) for part in get_args(hint))
    return next((choices for choices in found if choices is not None), None)


@cache
def choices_of(kind: Any) -> dict[str, Collection[str]]:
    """Field → its choices, of the fields of a dataclass that have any."""
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: choices_in(hints[field.name]) for field in fields(kind)}
    return {name: choices for name, choices in found.items() if choices is not None}


def one_of(name: str, value: Any, choices: Collection[str]) -> Any:
    """`value` when it is one of the names, or an object that stands for one.

    Raises `InputError` with the names there are.
    """
    if isinstance(value, str) and value in choices:
        return value
    if isinstance(choices, Choices) and choices.takes(value):
        return value
    raise InputError(f"`{name}` {value!r} is unknown; choose one of {', '.join(choices)}")


def numbers(**given: object) -> None:
    """Checks what `WHOLE_NUMBERS` and `REAL_NUMBERS` know by name; None is what was left out."""
    for name, value in given.items():
        if value is not None:
            _number(name, value, WHOLE_NUMBERS, REAL_NUMBERS)


def _number(name: str, value: object, whole: Whole, real: Reals) -> float:
    if name in whole:
        return whole_number(name, value, *whole[name], MEANINGS.get(name, ""))
    low, high, above, below = real[name]
    meaning = MEANINGS.get(name, "")
    return real_number(name, value, low, high, above=above, below=below, meaning=meaning)


def options(
    given: Any,
    whole: Whole,
    real: Reals,
    *,
    smallest: float = 0.0,
    own: Collection[str] = (),
) -> None:
    """Checks every field of a frozen dataclass; its numbers become Python's own (numpy's, say).

    `whole` and `real` come before the tables here; what is neither a number nor one of a few
    choices (see `choices_in`) is a truth value or text. A number above 0 and under `smallest` is
    refused. `own`: fields that the dataclass checks by itself. None is good where the field's type
    says so. Raises `InputError`.
    """
    whole, real = {**WHOLE_NUMBERS, **whole}, {**REAL_NUMBERS, **real}
    dataclass: Any = type(given)
    choices = choices_of(dataclass)
    for field in fields(given):
        name, value, kind = field.name, getattr(given, field.name), str(field.type)
        if name in own or (value is None and "None" in kind):
            continue
        if name in choices:
            one_of(name, value, choices[name])
        elif (name in whole or name in real) and not (isinstance(value, str) and "str" in kind):
            number = _number(name, value, whole, real)
            if 0 < number < smallest:
                raise InputError(f"`{name}` is {value}; it must be at least {smallest:g}")
            object.__setattr__(given, name, number)
        elif kind.startswith("bool"):
            if not isinstance(value, bool):
                raise InputError(f"`{name}` is {value!r}; it must be true or false")
        elif "list" in kind and isinstance(value, list | tuple):
            if not (value and all(isinstance(one, str) for one in value)):
                raise InputError(f"`{name}` is {value!r}; it must be text, or a list of texts")
            object.__setattr__(given, name, list(value))
        elif not isinstance(value, str):
            raise InputError(f"`{name}` is {value!r}; it must be text")


def clip(beta: float, omega: float) -> tuple[float, float]:
    """(β, ω) when 0 ≤ β ≤ ω ≤ 1 and ω > 0; else `InputError`."""
    if not (0 <= beta <= omega <= 1 and omega > 0):
        raise InputError(f"`clip` {beta},{omega} must satisfy 0 <= β <= ω <= 1, ω > 0")
    return beta, omega


def warp(temperature: object, top_k: object, top_p: object, top_p_rule: object) -> None:
    """Raises `InputError` when a value is out of its range; see `categorical.warp`."""
    numbers(temperature=temperature, top_k=top_k, top_p=top_p)
    one_of("top_p_rule", top_p_rule, TOP_P_RULES)
