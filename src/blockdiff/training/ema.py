"""The moving average of the weights, by torch's own `AveragedModel`.

    ema ← d·ema + (1 − d)·weights,  d = min(decay, (1 + n)/(10 + n)) after n updates

The warm-up of d lets short runs profit: a constant 0.9999 would still be mostly the initial
weights after 5,000 steps.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it; call `update_parameters` after every step.

    Where the model is sharded, shard `module` like it first (`parallel.shard_like`): then no step
    gathers anything. `n_averaged`, the count of updates, stays on the host: asked on a GPU it would
    be waited for.
    """

    def average(averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        n = int(ema.n_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n)

    ema = AveragedModel(model, multi_avg_fn=average)
    ema.n_averaged = ema.n_averaged.cpu()
    ema.requires_grad_(False)
    return ema
