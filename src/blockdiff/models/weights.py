"""Number formats: which one a device is made for, and a linear map that holds its weight in one.

    plain   weight [N, K] as it was trained, or bf16
    packed  bf16 in the memory layout of the processor's library, oneDNN. `F.linear` converts plain
            bf16 to it at every call: a third of the time of a sampler's step, which has few tokens.
    int8    w ≈ scale · q, q in −127…127, one scale per row of w: its largest |w| / 127. The step of
            a sampler with one row takes as long as reading the weights, half of bf16's bytes.
            Activations stay bf16.

Packed and int8 are for inference, of a model in memory: folders keep full weights.

Shapes: K input and N output features.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdiff.checks import one_of

# float32, bf16, and int8: weights of the large linear maps in 8 bits, everything else bf16.
WEIGHTS = ("auto", "float32", "bf16", "int8")


class Linear(nn.Linear):
    """A linear map [.., K] → [.., N] in the precision of its weight, or of autocast."""

    format: Literal["plain", "packed", "int8"] = "plain"
    stored: Tensor  # where it is not plain, in place of `weight`
    scale: Tensor

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """The map of x; `gelu`: with tanh-GELU after it, in one operator where that exists."""
        if self.format == "packed":
            # The operators are those torch's own compiler calls for frozen weights.
            name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x.to(torch.bfloat16), self.stored, self.bias, name, [], algorithm
            )
            return out
        if self.format == "int8":
            out = _int8_product(x.to(torch.bfloat16), self.stored, self.scale)
            out = out if self.bias is None else out + self.bias
        else:
            out = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return F.gelu(out, approximate="tanh") if gelu else out

    def dense(self) -> Tensor:
        """The weight [N, K] it stands for."""
        if self.format == "packed":
            return self.stored.to_dense()
        if self.format == "int8":
            return self.stored.to(torch.bfloat16) * self.scale[:, None]
        return self.weight

    def store(self, kind: Literal["packed", "int8"]) -> None:
        """Puts a plain weight into another format, for good."""
        weight = self.weight.detach()
        if kind == "packed":
            weight = weight.to(torch.bfloat16).contiguous()
            self.stored = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        else:
            weight = weight.float()
            scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            self.register_buffer("stored", (weight / scale[:, None]).round().to(torch.int8))
            self.register_buffer("scale", scale.to(torch.bfloat16))
        self.weight = None  # type: ignore[assignment]
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().to(torch.bfloat16), requires_grad=False)
        self.format = kind


def _int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x bf16 [.., K] times (scale · weight)ᵀ, bf16 [.., N]."""
    if x.device.type == "cpu" and x.shape[-1] % 64 == 0:
        # torch's own kernel, the one its quantisation libraries end in; it crashes the process on
        # some widths that are no multiple of its vectors.
        out = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), weight, scale)
        return out.unflatten(0, x.shape[:-1])
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled_product()(x, weight, scale)
    return _widened_product(x, weight, scale)


def _widened_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale


@lru_cache(maxsize=1)
def _compiled_product(backend: str = "inductor") -> Any:
    """`_widened_product` as one kernel, which reads each weight as 8 bits (docs/performance.md).

    torch's own kernel on CUDA reads a weight once for each row of x, which is slower than bf16.
    """
    fused = "max-autotune-no-cudagraphs" if backend == "inductor" else None
    return torch.compile(
        _widened_product, fullgraph=True, dynamic=True, mode=fused, backend=backend
    )


@lru_cache(maxsize=1)
def _processor_packs() -> bool:
    """Found by trying: only oneDNN knows which instructions it needs (AVX-512, AVX-NE-CONVERT)."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), 8)
        return hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except (AttributeError, RuntimeError):
        return False


def can_pack(device: torch.device) -> bool:
    """Whether torch and the processor have oneDNN's packed bf16 linear maps."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and _processor_packs()


def fingerprint(model: Any) -> str:
    """Changes where the weights do: a checksum of a thousand numbers of each."""
    found = 0
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach()
        flat = (tensor.to_dense() if tensor.is_mkldnn else tensor).flatten()
        taken = flat[:: max(1, len(flat) // 1024)].float().cpu().contiguous()
        found = zlib.crc32(taken.numpy().tobytes(), zlib.crc32(name.encode(), found))
    return f"{found:08x}"


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
    packed where the processor can; such a model unpacks its output map whenever it gives `nll`.
    """
    precision = resolve_precision(precision, device)
    if precision == "float32":
        return
    maps = [module for module in model.modules() if isinstance(module, Linear)]
    if precision == "int8":
        for linear in maps:
            linear.store("int8")
    for parameter in model.parameters():
        # Buffers stay: a rotary frequency in bf16 is off by 0.4%, some radians at position 1,000.
        parameter.data = parameter.data.to(torch.bfloat16)
    if precision == "bf16" and few_tokens and can_pack(device):
        for linear in maps:
            linear.store("packed")
