"""The process's memory on the host: what a step frees is kept for the next; the peak is read."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

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


def resident_peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux hands the peak that `getrusage` reports on to the programs that a process starts, so
    that a small one started by a large one reports the large one's; the kernel's status file does
    not.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
