"""Weights in 8 bits, for sampling: at one row the time of a step is the time to read the weights.

    w ≈ scale · q,   q in −127…127, one scale a row of w (an output feature): the largest |w| / 127

Activations stay bf16. Made from a model in memory by `quantise`; folders keep full weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear map with `weight` int8 [N, K], `scale` bf16 [N] and an optional bias [N]."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        full = linear.weight.detach().float()
        scale = full.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (full / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)

    def dense(self) -> Tensor:
        """The weight it stands for, bf16 [N, K]."""
        return self.weight.to(torch.bfloat16) * self.scale[:, None]


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K] → bf16 [.., N]."""
    x = x.to(torch.bfloat16)
    if x.device.type == "cpu":
        # torch's own kernel, the one its quantisation libraries end in.
        out = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), weight, scale)
        out = out.unflatten(0, x.shape[:-1])
    else:
        out = F.linear(x, weight.to(x.dtype)) * scale
    return out if bias is None else out + bias


def quantise(model: nn.Module, names: tuple[str, ...]) -> None:
    """Replaces every linear map below `model` whose own name is one of `names`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
