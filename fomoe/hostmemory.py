"""Memory that a training step frees on the host stays with the process for the next step."""

from __future__ import annotations

import ctypes
import sys

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Stop glibc from handing freed buffers back to the kernel; returns whether it did.

    A step frees and allocates the same large buffers over and over. By default glibc maps each one
    anew, and the kernel's clearing of its pages costs a fifth of an expert layer on CPU
    (docs/performance.md). Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
