"""Our attention in the layers of a `transformers` model, through its attention interface.

A pass through the layers has an object that answers for attention in each of them: `Streams` for a
clean stream and noised ones side by side, `Cached` for tokens after a cached prefix. It travels
with the pass as a keyword, which most families hand down to their attention.

Shapes: b rows, T tokens, H heads, H_kv key/value heads, D head width, S cached tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from blockdiff.attention import Mask, attend, make_mask, repeat
from blockdiff.cache import BlockCache
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Context


class Unsuitable(InputError):
    """A model that cannot be adapted, and why."""


class Pass(Protocol):
    """What attention does in one pass through the layers."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: int | None, **score: Any
    ) -> Tensor: ...


_CURRENT: ContextVar[Pass | None] = ContextVar("blockdiff_pass", default=None)


@contextmanager
def running(current: Pass | None) -> Iterator[None]:
    """While entered, this pass answers for attention that was not told which one is its own."""
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def noised_from() -> int | None:
    """The first column that is noised in the pass that is under way; None where none is."""
    return getattr(_CURRENT.get(), "noised_from", None)


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's `checkpoint`: a layer that runs again does so in its own pass."""
    return nullcontext(), running(_CURRENT.get())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    blockdiff_pass: Pass | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q [b, H, T, D], k and v [b, H_kv, T, D] → [b, T, H, D].

    Without dropout of attention weights, whatever the model's configuration says.
    """
    # A few families drop keywords they do not know.
    current = blockdiff_pass or _CURRENT.get()
    if current is None:
        raise InputError("this model attends by blocks: call the adapted model, not its parts")
    if attention_mask is not None or other.get("position_bias") is not None:
        raise Unsuitable("its attention has a mask or a bias of its own")
    # Under autocast rotary positions leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = current(
        module.layer_idx, query, key, value, sliding_window,  # type: ignore[arg-type]
        scale=scaling, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out.transpose(1, 2), None


INTERFACE = "blockdiff"
AttentionInterface.register(INTERFACE, _attention)


@dataclass
class Streams:
    """B clean rows and then R·B noised ones, either of which may be none.

    `layout`: of both. `context`: the clean stream's keys and values where it ran before, else they
    are collected here, by layer. `noised`: the kind of mask of the noised rows. `noised_from`: 0
    where all rows are noised (see `models.gated`).
    """

    layout: BlockLayout
    clean_rows: int
    backend: str
    context: Context | None = None
    noised: str = "noised"
    noised_from: int | None = None
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[tuple[str, int | None, torch.device], Mask] = field(default_factory=dict)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: int | None, **score: Any
    ) -> Tensor:
        split, out = self.clean_rows, []
        if split:
            self.kept[layer] = k[:split], v[:split]
            mask = self._mask("clean", sliding, q[:split])
            out.append(attend(q[:split], k[:split], v[:split], mask, **score))
        if len(q) > split:
            q, k, v = q[split:], k[split:], v[split:]
            if self.noised == "noised":
                keys, values = self._clean(layer)
                k = torch.cat([repeat(keys, len(k)), k], dim=2)
                v = torch.cat([repeat(values, len(v)), v], dim=2)
            out.append(attend(q, k, v, self._mask(self.noised, sliding, q), **score))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _clean(self, layer: int) -> tuple[Tensor, Tensor]:
        if self.context is None:
            return self.kept[layer]
        return self.context.keys[layer], self.context.values[layer]

    def _mask(self, kind: str, sliding: int | None, q: Tensor) -> Mask:
        """The mask of the layers with one sliding window, made once a pass."""
        if sliding is not None and sliding >= self.layout.length:
            sliding = None
        key = kind, sliding, q.device  # layers may be on several devices
        if key not in self.masks:
            layout = replace(self.layout, sliding=sliding)
            rows, width = len(q), q.shape[-1]
            made = make_mask(layout, kind, self.backend, q.device, rows=rows, head_dim=width)
            self.masks[key] = made
        return self.masks[key]


@dataclass
class Cached:
    """T tokens [n, T] at `positions` after their cached prefixes; `seen` bool [n, 1, T, T + S].

    `noised_from`: how many columns of clean tokens come before the noised ones.
    """

    cache: BlockCache
    positions: Tensor
    seen: Tensor | None
    noised_from: int | None = None
    within: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: int | None, **score: Any
    ) -> Tensor:
        k, v = (x.to(q.device) for x in self.cache.stage(layer, k, v))
        seen = self.seen if sliding is None else self._within(sliding)
        if seen is None:
            seen = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
        return attend(q, k, v, Mask("dense", seen.to(q.device)), **score)

    def _within(self, sliding: int) -> Tensor:
        """`seen` without what is a sliding window or more before the query."""
        if sliding not in self.within:
            keys = torch.cat([self.positions, self.cache.key_positions()], dim=1)
            near = self.positions[:, :, None] - keys[:, None, :] < sliding
            self.within[sliding] = near[:, None] if self.seen is None else near[:, None] & self.seen
        return self.within[sliding]
