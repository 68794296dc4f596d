"""What a folder becomes: a configuration, where its stored tensors go, and conventions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from blockdiff.data.tokenizers import read_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.tensors import Files, Piece

# Where a stored tensor goes: (our name, the piece), or nothing.
Place = Callable[[str], list[tuple[str, Piece]]]


def first(*values: Any) -> Any:
    """The first that is not None; None where all are."""
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True)
class Found:
    """A released folder, and what the caller says of it."""

    folder: Path
    raw: Mapping[str, Any]
    files: Files
    mask_token_id: int | None = None
    block_size: int | None = None

    def mask(self, default: int | None = None) -> int:
        """The id of the mask token: said, stored, the family's own, or the tokenizer's."""
        said = self.raw.get("mask_token_id") if self.mask_token_id is None else self.mask_token_id
        if said is not None:
            return int(said)
        if default is not None and default < self.vocab_size:
            return default
        if (self.folder / "tokenizer_config.json").is_file():
            own = read_tokenizer(self.folder).mask_token_id
            if own is not None:
                return int(own)
        raise InputError("it does not say which token is the mask; give `mask_token_id`")

    def block(self, stored: str | None, default: int) -> int:
        """The block size trained for: stored in a field of config.json, said, or the usual."""
        known = None if stored is None else self.raw.get(stored)
        return int(first(known, self.block_size, default))

    @property
    def vocab_size(self) -> int:
        return int(first(self.raw.get("embedding_size"), self.raw.get("vocab_size")))


@dataclass(frozen=True)
class Recipe:
    """What a folder becomes.

    `config`: a `DiTConfig`, or the configuration of a class of `transformers`, and then
    `conventions` are fields of `AdaptedConfig`. `place`: where each stored tensor goes.
    `names_mask`: whether the mask token is known, else the tokenizer says which it is.
    """

    config: PreTrainedConfig
    place: Place
    conventions: dict[str, Any] | None = None
    names_mask: bool = True

    def pieces(self, names: Iterable[str]) -> dict[str, list[Piece]]:
        """Our tensors, each with the pieces it is made of."""
        found: dict[str, list[Piece]] = {}
        for name in names:
            for target, piece in self.place(name):
                found.setdefault(target, []).append(piece)
        return found


# Buffers that are no weights: rotary tables and masks are computed, the clip of a run that searched
# for one goes into the configuration.
CLIP = ("sampling_eps_min", "sampling_eps_max")
_COMPUTED = ("rotary_emb.inv_freq", "static_attention_mask", *CLIP)


def renamed(rules: Iterable[tuple[str, str]]) -> Place:
    """Whole tensors under other names; buffers that are no weights are left out."""
    compiled = [(re.compile(pattern), into) for pattern, into in rules]

    def place(name: str) -> list[tuple[str, Piece]]:
        target = name
        for pattern, into in compiled:
            target = pattern.sub(into, target)
        return [] if target.endswith(_COMPUTED) else [(target, Piece(name))]

    return place


def require(raw: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    """Raises `InputError` for a field whose value asks for what the class here does not do."""
    for name, values in allowed.items():
        if name in raw and raw[name] not in values:
            raise InputError(f"{name} {raw[name]!r} is not supported")
