"""Which number format is faster here: measured once, not looked up in a list of processors."""

from __future__ import annotations

import time
from functools import lru_cache

import torch


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
