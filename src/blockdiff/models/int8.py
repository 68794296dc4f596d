"""Weights in 8 bits, for sampling: at one row the time of a step is the time to read the weights.

    w ≈ scale · q,   q in −127…127, one scale a row of w (an output feature): the largest |w| / 127

Activations stay bf16. `precision.convert` makes them from a model in memory; folders keep full
weights.
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
        x = x.to(torch.bfloat16)
        if x.device.type == "cpu" and x.shape[-1] % 64 == 0:
            # torch's own kernel, the one its quantisation libraries end in; it crashes the process
            # on some widths that are no multiple of its vectors.
            flat = x.flatten(0, -2)
            out = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
            out = out.unflatten(0, x.shape[:-1])
        else:
            out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias

    def dense(self) -> Tensor:
        """The weight it stands for, bf16 [N, K]."""
        return self.weight.to(torch.bfloat16) * self.scale[:, None]
