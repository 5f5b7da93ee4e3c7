"""The patches of docs/extending.md apply to today's code and do what the page says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()


def blocks(section: str) -> dict[str, str]:
    """The text of each fence, by its language."""
    return dict(re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S))


SECTIONS = {part.partition("\n")[0]: blocks(part) for part in PAGE.split("\n### ")[1:]}
EXAMPLES = {name: found for name, found in SECTIONS.items() if "diff" in found}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the code, to be patched."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("fomoe", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=skip)
    return tmp_path / "source"


def run(words: list[str], folder: Path, source: Path, given: str | None = None) -> str:
    """Its output, whether or not it succeeds; the patched code is imported."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        words, cwd=folder, env=environment, input=given, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_page_has_three_worked_patches() -> None:
    assert len(EXAMPLES) == PAGE.count("```diff") == 3
    assert all(set(found) == {"diff", "python", "bash"} for found in EXAMPLES.values())


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches")
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_patch_applies_and_works(name: str, source: Path, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    run(["git", "apply", "-p0", "-"], source, source, given=example["diff"])
    where = "import fomoe; print(fomoe.__file__)"
    assert Path(run([sys.executable, "-c", where], tmp_path, source)).is_relative_to(source)
    assert run([sys.executable, "-c", example["python"]], tmp_path, source)
    (line,) = example["bash"].splitlines()
    program, *words = shlex.split(line)
    assert program == "fomoe"
    assert run([sys.executable, "-m", "fomoe", *words], tmp_path, source)
