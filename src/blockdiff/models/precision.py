"""Number formats: which one a device is made for, and a model's weights put into one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from blockdiff.checks import one_of
from blockdiff.models.int8 import Int8Linear
from blockdiff.models.packed import PackedLinear, can_pack

# float32, bf16, and int8: weights of the large linear maps in 8 bits, everything else bf16.
WEIGHTS = ("auto", "float32", "bf16", "int8")
_LARGE = ("qkv", "attention_out", "mlp_in", "mlp_out", "linear")


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" stands for on a device: bf16 where its processor has the instructions, else
    float32; any other name is kept.

    A fact of the hardware, never a measurement: the same machine always decides the same. Raises
    `InputError` for a name that is none of `WEIGHTS`.
    """
    if one_of("precision", precision, WEIGHTS) != "auto":
        return precision
    return "bf16" if _has_bf16(device) else "float32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Without these instructions oneDNN computes bf16 by way of float32, slower than float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def convert(
    model: nn.Module, precision: str, device: torch.device, *, few_tokens: bool = False
) -> None:
    """Puts a model's weights into a precision of `WEIGHTS`, in place, for inference.

    "auto": bf16 where the processor is made for it, else float32. Raises `InputError` for a name
    that is none of these. `few_tokens`: for the few tokens of a sampler's step, bf16 weights are
    repacked into the processor's own memory layout; such a model samples, but has no `nll`.
    """
    precision = resolve_precision(precision, device)
    if precision == "int8":
        _replace(model, Int8Linear)
    if precision != "float32":
        model.to(dtype=torch.bfloat16)
        if precision != "int8" and few_tokens and can_pack(device):
            _replace(model, PackedLinear)


def _replace(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Makes every large linear map one of another kind."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in _LARGE and isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))
