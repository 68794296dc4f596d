"""Which device computes, and tensors that are kept from one use to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, TypeVar

import torch

from blockdiff.errors import InputError

Result = TypeVar("Result")

SHAPES = 512  # one for each layout, kind and shape of attention
KEPT_BYTES = 2**28  # of cached tensors, by function: masks of 8,192 positions are that large


def cached(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps what a function of hashable arguments made, the last used `KEPT_BYTES` of it.

    What a sampler makes inside `inference_mode` may never take part in a backward pass, so a cached
    tensor is made outside it, whoever asks first. `cache_clear()` of the result frees all.
    """
    kept: OrderedDict[tuple[Any, ...], tuple[Result, int]] = OrderedDict()
    lock = Lock()

    @wraps(function)
    def find(*arguments: Any) -> Result:
        with lock:
            if arguments in kept:
                kept.move_to_end(arguments)
                return kept[arguments][0]
        with torch.inference_mode(False):
            made = function(*arguments)
        with lock:
            kept[arguments] = made, _bytes(made)
            while len(kept) > 1 and sum(size for _, size in kept.values()) > KEPT_BYTES:
                kept.popitem(last=False)
        return made

    find.cache_clear = kept.clear  # type: ignore[attr-defined]
    return find


def _bytes(made: object) -> int:
    """Of the tensors in it: a tensor, a list or tuple of some, or an object that holds some."""
    if isinstance(made, torch.Tensor):
        return made.nbytes
    inner = made if isinstance(made, list | tuple) else getattr(made, "__dict__", {}).values()
    return sum(map(_bytes, inner))


def compile_every_shape() -> None:
    """Has torch compile a function for up to `SHAPES` kinds of input.

    By default it does for 8, and then, with a line in its log, runs it uncompiled.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, SHAPES)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * SHAPES)


def rounded_up(count: int) -> int:
    """The next power of two, 0 for 0: what a compiler or a graph meets in few sizes."""
    return 1 << (count - 1).bit_length() if count else 0


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
