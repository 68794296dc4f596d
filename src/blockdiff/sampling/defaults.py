"""How a model's folder asks to be sampled: the key `blockdiff` of its generation_config.json.

    {"do_sample": true, "temperature": 0.6,
     "blockdiff": {"sampler": "threshold", "threshold": 0.7, "block_size": 8}}

What stands under the key are fields of `SamplingOptions`, and whatever writes text takes them where
its caller leaves them out. The words beside it are transformers', for `model.generate` alone; there
the key comes before them. An order and its settings are one choice: who names another order, or a
setting that the folder's does not read, gets none of the folder's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from blockdiff.errors import InputError
from blockdiff.models.tensors import read_json
from blockdiff.outputs import write_text
from blockdiff.registry import ORDERS
from blockdiff.sampling.options import (
    CONSTRAINTS,
    SETTINGS,
    SamplingOptions,
    given_settings,
)

KEY = "blockdiff"
FILE = "generation_config.json"
ORDERING = frozenset({"sampler", *SETTINGS})
_ONE_OF = {"steps", "tokens_per_step"}  # which exclude each other
LENGTHS = {"max_length", "max_new_tokens"}

Kind = TypeVar("Kind", bound=SamplingOptions)


def options_for(
    model: Any,
    told: Mapping[str, Any],
    kind: type[Kind] = SamplingOptions,  # type: ignore[assignment]
) -> Kind:
    """What the caller `told`, else what the model's folder says, else the defaults of `kind`.

    Raises `InputError` for what cannot be meant, with the file's name where it stands there.

    Example:
        >>> import blockdiff
        >>> from blockdiff.sampling.defaults import options_for
        >>> model, tokenizer = blockdiff.load("starter")
        >>> model.generation_config.blockdiff = {"sampler": "threshold", "threshold": 0.7}
        >>> options_for(model, {"seed": 1}).threshold, options_for(model, {"steps": 2}).threshold
        (0.7, 0.7)
        >>> options_for(model, {"margin": 0.5}).sampler
        'margin'
    """
    where = str(Path(getattr(model, "name_or_path", "")) / FILE)
    config = getattr(model, "generation_config", None)
    stored = {} if config is None else stored_options(config, where)
    try:
        left = without(stored, told)
        if isinstance(name := left.get("sampler", "auto"), str) and name not in [*ORDERS, "auto"]:
            raise InputError(
                f"the sampler {name!r} is not registered; choose another `sampler`, or name the "
                "module or file that registers it as `plugin`"
            )
        return kind(**{**left, **told})
    except InputError as error:
        kind(**told)  # what is wrong with the caller's own words is said as it is
        raise InputError(f"{where}: {error}") from None


def filled(model: Any, options: Kind, told: Collection[str] | None) -> Kind:
    """`options`, of which only the fields `told` were said (None: all of them), as `options_for`.

    What else they have are the defaults of their class.
    """
    if told is None:
        return options
    said = {field.name for field in fields(options)} & set(told)
    return options_for(model, {name: getattr(options, name) for name in said}, type(options))


def stored_options(config: Any, where: str = FILE) -> dict[str, Any]:
    """What a GenerationConfig has under the key; raises `InputError` for what is no option."""
    found = getattr(config, KEY, None)
    if found is None:
        return {}
    known = [field.name for field in fields(SamplingOptions)]
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: `{KEY}` is {found!r}; it must hold sampling options")
    for name in found.keys() - known:
        raise InputError(f"{where}: `{KEY}` has {name!r}, which is none of {', '.join(known)}")
    return dict(found)


def without(stored: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What of `stored` still holds where something is `told`."""
    gone, given = set(told), given_settings(told)
    sampler = stored.get("sampler", "auto")
    if sampler == "auto" and (own := given_settings(stored)):
        sampler = next((name for name in ORDERS if own <= set(ORDERS.words("reads", name))), "")
    chosen = told.get("sampler")
    same = chosen is None or getattr(chosen, "name", chosen) == sampler
    reads = ORDERS.words("reads", sampler) if isinstance(sampler, str) else ()
    if not (same and given <= set(reads)):
        gone |= ORDERING
    said = {name for name, value in told.items() if value is not None}
    for exclude in (_ONE_OF, LENGTHS, set(CONSTRAINTS)):
        if said & exclude:
            gone |= exclude
    return {name: value for name, value in stored.items() if name not in gone}


def store_options(folder: Path, chosen: Mapping[str, Any], described: Mapping[str, Any]) -> Path:
    """Writes an order's options under the key in a folder's file, in the place of another order's.

    `described`: what else the file says, where there is none yet. Returns the file.
    """
    path = folder / FILE
    raw = read_json(path) if path.exists() else dict(described)
    before = raw.get(KEY)
    kept = before if isinstance(before, dict) else {}
    kept = {name: value for name, value in kept.items() if name not in ORDERING}
    write_text(path, json.dumps(raw | {KEY: kept | dict(chosen)}, indent=2) + "\n")
    return path
