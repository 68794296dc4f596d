"""Which device computes, and tensors that are kept from one use to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch

from blockdiff.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(size: int) -> Callable[[Function], Function]:
    """`lru_cache` for functions that make tensors.

    What a sampler makes inside `inference_mode` may never take part in a backward pass, so a cached
    tensor is made outside it, whoever asks first.
    """

    def decorate(function: Function) -> Function:
        return lru_cache(maxsize=size)(torch.inference_mode(False)(function))  # type: ignore[return-value]

    return decorate


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name` (cpu, cuda, cuda:1, mps); None or "auto": CUDA, else MPS, else CPU.

    Raises `InputError` for a name that is none, or a device this machine does not have.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"`device` {str(name)!r} cannot be used here: {reason}") from None
    return device
