"""All positions the network is sure of at once (Fast-dLLM, Wu et al. 2025).

    fixed: those whose token has p_θ ≥ threshold, and the surest of each row in any case

Not exact: tokens fixed together are drawn as if independent of one another. The threshold is what
that is bought with. A position's token is always drawn with the same random number, so that rare
tokens, which are seldom sure when they are first drawn, stay as likely as they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.registry import register_order
from blockdiff.sampling.orders.base import Array, Order, RowState


@dataclass(frozen=True)
class Threshold(Order):
    """`threshold`: the probability, before temperature and cuts, from which a token is fixed."""

    threshold: float = 0.9
    name = "threshold"

    def choose(self, logits: Tensor, wanted: Array, rows: RowState) -> tuple[Tensor | None, Tensor]:
        tokens = rows.draw(logits.clone(), wanted)
        confidence = logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        row = torch.from_numpy(wanted.nonzero()[0]).to(logits.device, non_blocking=True)
        best = confidence.new_zeros(len(wanted)).scatter_reduce_(0, row, confidence, "amax")
        return (confidence >= self.threshold) | (confidence >= best[row]), tokens


register_order(Threshold())
