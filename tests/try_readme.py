"""Run the README's first commands in a fresh clone, as a reader would: `make docs-check`.

They install from the package index and train the quickstart, which takes minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "fomoe"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        parts = [
            f'echo "$ "{shlex.quote(line)}\n{line}\necho "== $SECONDS s"' for line in first_lines()
        ]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        script = "\n".join(["set -e", *parts])
        subprocess.run(["bash", "-c", script], cwd=clone, env=own, check=True)


def first_lines() -> list[str]:
    """The commands from a clone to a model, as they stand in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## From a clone to a model\n.*?^```bash\n(.*?)^```", text, re.M | re.S)
    assert found is not None
    return found[1].splitlines()


if __name__ == "__main__":
    main()
