"""Number formats: which is faster here, measured once, and a model's weights put into one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from blockdiff.errors import InputError
from blockdiff.models.int8 import Int8Linear
from blockdiff.models.packed import PackedLinear, can_pack

# float32, bf16, and int8: weights of the large linear maps in 8 bits, everything else bf16.
WEIGHTS = ("auto", "float32", "bf16", "int8")
_LARGE = ("qkv", "attention_out", "mlp_in", "mlp_out", "linear")


@lru_cache(maxsize=1)
def cpu_bf16_is_faster() -> bool:
    """Times one matrix product in both formats; about 0.1 s."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(768, 768, dtype=dtype)
        a @ a
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - begin)
        best[dtype] = min(seconds)
    # Autocast adds conversions, so bf16 has to be clearly faster, not just equal.
    return best[torch.bfloat16] < 0.6 * best[torch.float32]


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run under bf16 autocast: as told, or for "auto" where it is faster."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and cpu_bf16_is_faster()


def convert(
    model: nn.Module, precision: str, device: torch.device, *, few_tokens: bool = False
) -> None:
    """Puts a model's weights into a precision of `WEIGHTS`, in place, for inference.

    "auto": bf16 where it is faster on the device, else float32. Raises `InputError` for a name
    that is none of these. `few_tokens`: for a sampler's steps, bf16 weights are kept in the order
    the processor reads them in; such a model no longer gives `nll`.
    """
    if precision not in WEIGHTS:
        raise InputError(f"no precision {precision!r}; choose one of {', '.join(WEIGHTS)}")
    if precision == "int8":
        _replace(model, Int8Linear)
    if precision == "int8" or use_bf16(precision, device):
        model.to(dtype=torch.bfloat16)
        if precision != "int8" and few_tokens and can_pack(device):
            _replace(model, PackedLinear)


def _replace(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Makes every large linear map one of another kind."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in _LARGE and isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))
