"""The paper's control at L' = 1: AR that learns from as many tokens as the linear schedule masks.

At L' = 1 the linear schedule masks each token with probability 1/2, whatever the others do, so
half of a batch teaches nothing. The control takes that half from AR's loss, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockdiff.categorical import fold_seed
from blockdiff.training.trainer import BlockDiffusionTrainer

SHARE = 0.5


class HalfCounted(BlockDiffusionTrainer):
    """AR whose loss is the mean over a random half of the tokens, drawn anew from (seed, step).

    For unpadded windows, one process and one micro-batch a step. What is measured is AR as it is.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        tokens = self.counted(inputs["x_0"]).sum()
        return super().compute_loss(model, inputs, return_outputs, tokens)

    def counted(self, x_0: Tensor, documents: Tensor | None = None) -> Tensor:
        """bool [B, L]: the tokens that this step's loss counts; never position 0."""
        seed = fold_seed(self.run.seed, self.state.global_step)
        generator = torch.Generator(x_0.device).manual_seed(seed)
        chance = torch.rand(x_0.shape, device=x_0.device, generator=generator)
        return super().counted(x_0, documents) & (chance < SHARE)
