"""pip's options for the build of torch that suits this machine: `make install` runs this first.

The package index has torch with CUDA's libraries, several GB. A machine without an accelerator is
better off with the small build, which is on an index of its own. Where that one cannot be reached
pip would try again for minutes, so it is asked for a page first.
"""

from __future__ import annotations

import sys
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

SMALL_BUILDS = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = "constraints-cpu.txt"  # make runs beside it
# A driver makes these: NVIDIA's, AMD's, and Windows' for the Linux inside it.
DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
WAIT_S = 5.0


def main() -> None:
    """Print the options; what was chosen and why goes to stderr."""
    cpu = sys.argv[1] if len(sys.argv) > 1 else "auto"
    if cpu not in ("auto", "1", "0", ""):
        sys.exit(f"CPU={cpu} is not known: 1 is torch's small build, 0 the package index's")
    small = not has_accelerator() if cpu == "auto" else cpu == "1"
    options, line = pip_options(small=small, reachable=small and answers(f"{SMALL_BUILDS}/torch/"))
    print(*options)
    if line:
        print(line, file=sys.stderr)


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether a driver of an accelerator has made a device."""
    return any(any(devices.glob(name)) for name in DEVICES)


def answers(url: str, wait_s: float = WAIT_S) -> bool:
    """Whether a page can be fetched in that time, the look-up of its host included."""
    found = []

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=wait_s):
                found.append(url)
        except (OSError, HTTPException):  # those of urllib are OSErrors
            pass

    # No timeout of urllib's covers the look-up; an abandoned one ends with this process.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(wait_s)
    return bool(found)


def pip_options(*, small: bool, reachable: bool) -> tuple[list[str], str]:
    """Options for `pip install`, and a line for the person who waits for it, or an empty one."""
    if not small:
        return [], ""
    options = ["--constraint", CONSTRAINTS]
    if reachable:
        return [*options, "--extra-index-url", SMALL_BUILDS], ""
    return options, (
        f"{SMALL_BUILDS} does not answer: torch comes from pip's own index, with CUDA's libraries "
        "(several GB) unless a +cpu build is there"
    )


if __name__ == "__main__":
    main()
