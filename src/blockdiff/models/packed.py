"""bf16 weights in the processor library's own order, for sampling on a CPU.

`F.linear` in bf16 brings the weight into oneDNN's order at every call; for the few tokens of a
sampler's step that is a third of the time. Here it is done once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@lru_cache(maxsize=1)
def _processor_packs() -> bool:
    """Tries it: which instructions oneDNN needs (AVX-512 or AVX-NE-CONVERT) it alone knows."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), 8)
        return hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except (AttributeError, RuntimeError):
        return False


def can_pack(device: torch.device) -> bool:
    """Whether torch and the processor have oneDNN's packed bf16 linear maps."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and _processor_packs()


class PackedLinear(nn.Module):
    """A linear map [.., K] → bf16 [.., N] for inference; `gelu`: with tanh-GELU after it."""

    # The operators are those torch's own compiler calls for frozen weights.

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16).contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        bias = linear.bias
        self._bias = None if bias is None else bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        x = x.to(torch.bfloat16)
        name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, name, [], algorithm
        )
        return out


def expand(linear: nn.Module, x: Tensor) -> Tensor:
    """tanh-GELU of a linear map, in one operator where the weight is packed."""
    if isinstance(linear, PackedLinear):
        return linear(x, gelu=True)
    if isinstance(linear, nn.Linear):
        x = x.to(linear.weight.dtype)
    return F.gelu(linear(x), approximate="tanh")
