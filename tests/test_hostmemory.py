"""The peak of a process is its own."""

from __future__ import annotations

import subprocess
import sys

from fomoe.hostmemory import resident_peak_bytes

CHILD = "from fomoe.hostmemory import resident_peak_bytes; print(resident_peak_bytes())"


def test_a_small_program_does_not_report_the_peak_of_the_large_one_that_started_it() -> None:
    held = b"1" * 100_000_000
    assert resident_peak_bytes() > len(held)
    child = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True
    )
    assert 0 < int(child.stdout) < len(held)
