"""The README's first commands work, one after the other; `make docs-check` runs them in a clone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import fomoe, trained, write_texts
from try_readme import first_lines

ROOT = Path(__file__).parent.parent
# The quickstart's own model, on a text of the test's.
SHORT = ["rounds=1", "local_steps=1", "data.seq_len=32", "data.held_out_sequences=4"]


def test_from_a_clone_to_a_model_are_few_commands() -> None:
    lines = [shlex.split(line, comments=True) for line in first_lines()]
    assert len(lines) <= 7  # eight with the clone
    make, activate, install = lines[:3]
    assert (make, activate) == (["make", "quickstart"], [".", ".venv/bin/activate"])
    assert install[:3] == ["pip", "install", "-e"]
    dry = ["make", "--dry-run", "--always-make", *make[1:]]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    trains = next(line for line in done.splitlines() if " train " in line)
    assert shlex.split(trains)[-3:] == ["train", "configs/quickstart.yaml", "--next-free"]


def test_the_commands_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    source = f"data.source={write_texts(tmp_path / 'texts')}"
    trained(ROOT / "configs/quickstart.yaml", *SHORT, source)
    printed = []
    for line in first_lines()[3:]:
        program, *words = shlex.split(line, comments=True)
        if program == "fomoe":
            outcome = fomoe(*words)
            assert outcome.status == 0, outcome.err
            printed.append(outcome.out)
        else:
            assert program == "python"
            own = {**os.environ, "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, *words]
            printed.append(subprocess.check_output(command, text=True, env=own))
    assert printed[0].startswith("def main(")
    assert re.search(r"<svg ", Path("report.html").read_text(encoding="utf-8"))
    assert re.match(r"\w+ForCausalLM\(", printed[-1])
