"""Keeping freed memory: on a CPU a training step asks for the same large blocks every time.

glibc gives blocks above 32 MiB (gradients, activations) back to the system when they are freed, and
each new one comes as untouched pages that fault in 4 KiB at a time. Told not to, it reuses them: a
step of the paper's `small` network takes 3.2 s instead of 4.4 s.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Lets this process reuse large blocks; whether that worked (Linux with glibc only).

    The process's memory then stays at its peak until it ends. Call it before the first step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
