"""Where a `DiT` with prediction "shift" reads what predicts a token.

What predicts token i stands at i − 1: of a block's first token in the clean stream, of the others
in the noised one. Position 0, which nothing comes before, has what predicts token 1. Only these
places go through the last layer's MLP.

Shapes: B batch, R draws, L positions, P chosen tokens, Q tokens that the clean stream predicts too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Context
from blockdiff.models.layers import Chosen

if TYPE_CHECKING:
    from blockdiff.models.dit import DiT


class Given(NamedTuple):
    """What a pass is given: noised copies [R·B, L], and the clean text [B, L] or its context."""

    x_t: Tensor
    x_0: Tensor | None
    layout: BlockLayout
    context: Context | None
    backend: str


def predicting(model: DiT, given: Given, at: Tensor | None, clean_at: Tensor | None) -> Tensor:
    """The residual stream [P + Q, E], or [R·B, L, E], that predicts the tokens wanted.

    `at` bool [R·B, L], all where left out; `clean_at` bool [B, L]: those of the clean stream.
    """
    x_t, x_0, layout, context, backend = given
    (rows, length), size = x_t.shape, layout.block_size
    condition, alone = model.condition(), x_0 is None and context is None
    if layout.blocks == 1 and size > 1 and backend != "dense" and clean_at is None:
        x_0 = context = None  # no block has one before it to look back on
    token = torch.arange(rows * length, device=x_t.device) if at is None else _places(at)
    row, column = token // length, token % length
    before = (column - 1).clamp(min=0)
    first = (column % size == 0) & ((column > 0) | (size == 1)) & (not alone)
    ahead = token[:0] if clean_at is None else _places(clean_at) - 1
    if x_0 is not None and size > 1 and (len(x_0) == rows or backend == "dense"):
        own = row * 2 * length + torch.where(first, before, length + before)
        index = torch.cat([own, ahead + ahead // length * length])
        chosen = Chosen(index, torch.Size((rows, 2 * length)))
        found = model.two_streams(x_t, x_0, condition, layout, backend, chosen)
    elif x_0 is not None and size == 1:  # the clean stream predicts all
        index = torch.cat([row % len(x_0) * length + before, ahead])
        chosen = Chosen(index, x_0.shape)
        found = model.one_stream(x_0, layout, None, condition, backend, chosen)
    else:
        if x_0 is not None:
            context = model.encode(x_0, layout, backend=backend)
        if size > 1 or context is None:
            chosen = Chosen(row * length + before, x_t.shape)
            found = model.one_stream(x_t, layout, context, condition, backend, chosen)
        if context is not None:
            clean = context.hidden
            assert clean is not None
            own, clean = clean[row % len(clean), before], clean.flatten(0, 1)
            found = own if size == 1 else torch.where(first[:, None], own, found)
            found = torch.cat([found, clean[ahead]])
    return found if at is not None else found.unflatten(0, (rows, length))


def _places(at: Tensor) -> Tensor:
    """Where bool [B, L] is true, position t of row i as i·L + t."""
    return at.flatten().nonzero().squeeze(-1)
