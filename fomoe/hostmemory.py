"""The process's memory on the host: freed memory is kept, or given back; the peak is read."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGE = 2**20  # bytes of a buffer that is mapped for itself, so that it can be given back


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed buffers to the kernel; returns whether it did.

    A step frees and allocates the same large buffers over and over. By default glibc maps each one
    again, and the time in which the kernel clears its pages is a fifth of an expert layer on CPU
    (docs/performance.md). Other C libraries are not changed.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> bool:
    """Have glibc return freed buffers to the kernel at once; returns whether it will.

    Where ranks share a model, each layer's parameters are put together, used and freed. By default
    glibc soon keeps buffers of such a size, and cannot give an aligned buffer the place of an equal
    one that was freed: a rank of two then took as much memory as a site of one.
    """
    return _set({_M_MMAP_THRESHOLD: _LARGE})


def _set(options: dict[int, int]) -> bool:
    """Whether the C library is glibc and took all of its options."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in options.items())


def resident_peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux a program inherits the peak that `getrusage` reports from the process that starts it,
    so a small program would report the peak of a large one. The kernel's status file has no such
    fault.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
