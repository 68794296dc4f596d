"""Tokens of the current block may be revised when more of it is known.

In every evaluation of a block x, for its positions i in turn with logits of x as it stands, and v_i
the token drawn from them (at temperature 0 the most likely):

    i masked             x_i ← v_i   where `threshold` fixes it
    i holds a new token  x_i ← v_i   where p(x_i) < edit_threshold and p(v_i) > p(x_i)

A position is revised once at most, and a block of K is final, and cached, with the first evaluation
that leaves it as it is or after which all its tokens are revised: after 2K + 1 evaluations at most.
What stops a row is asked of final blocks only. The token that the clean stream predicts, the first
of a block under prediction "shift", stays.

The idea is that of LLaDA2.1 (2026) and of JointThreshold in SGLang. They write over a token where
the most likely one is another with p > τ, until nothing changes or for so many steps; here the
limit is on the token that is there: one that is likely enough stays. p(x_i) is what the network
gives for a position whose token it sees. Only networks that were trained on wrong tokens have
learnt that; of others it says little, and the order need not be better than `threshold`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockdiff.registry import register_order
from blockdiff.sampling.orders.base import Array, RowState
from blockdiff.sampling.orders.confidence import Threshold


class Editing(Threshold):
    """`threshold`, and tokens of the block that have become improbable are written over."""

    name = "editing"
    reads = (*Threshold.reads, "edit_threshold")
    tunes = None  # for networks that were trained for it
    edits = True

    def wanted(self, rows: RowState) -> Array:
        return rows.masked | rows.revisable

    def choose(self, logits: Tensor, wanted: Array, rows: RowState) -> tuple[Tensor | None, Tensor]:
        given = rows.options.edit_threshold
        tokens, probability = rows.draw(logits, wanted), logits.softmax(-1)
        held, there = (
            torch.from_numpy(found[wanted]).to(logits.device, non_blocking=True)
            for found in (rows.revisable, rows.tokens * rows.revisable)
        )
        new, old = (
            probability.gather(-1, x[:, None]).squeeze(-1) for x in (tokens.clamp(min=0), there)
        )
        improbable = held & (old < (0.2 if given is None else given)) & (new > old)
        surest = self.surest(new.masked_fill(held, -torch.inf), wanted, rows)
        return torch.where(held, improbable, surest), tokens


register_order(Editing())
