"""Which device computes."""

from __future__ import annotations

import torch

from blockdiff.errors import InputError


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
