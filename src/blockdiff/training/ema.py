"""The moving average of the weights, by torch's own `AveragedModel`.

    ema ← d·ema + (1 − d)·weights,  d = min(decay, (1 + n)/(10 + n)) after n updates

The warm-up of d lets short runs profit: a constant 0.9999 would still be mostly the initial
weights after 5,000 steps.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it; call `update_parameters` after every step."""

    def average(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, updates)

    return AveragedModel(model, multi_avg_fn=average)


def update_ema(ema: AveragedModel, model: nn.Module) -> None:
    """One update; every process keeps the whole average, of a sharded (FSDP2) model too."""
    ema.update_parameters(_Whole(model))  # type: ignore[arg-type]


class _Whole:
    """A model's parameters, each gathered from the processes that hold a part of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def parameters(self) -> Iterator[Tensor]:
        for tensor in self.model.parameters():
            yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def buffers(self) -> Iterator[Tensor]:
        return self.model.buffers()
