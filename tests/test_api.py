"""What `import fomoe` offers, and the examples of docs/python.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cli import snapshot, words, write_config

import fomoe
from fomoe.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_the_names_are_those_of_the_stub() -> None:
    """And no module takes one of them: importing it would hide what is offered."""
    tree = ast.parse((ROOT / "fomoe" / "__init__.pyi").read_text())
    stub = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stub == fomoe._OFFERED  # type: ignore[attr-defined]
    for name in stub:
        assert not list((ROOT / "fomoe").glob(f"{name}.py*"))
        assert not (ROOT / "fomoe" / name).exists()
        assert callable(getattr(fomoe, name))
    assert set(stub) <= set(dir(fomoe))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fomoe.trian  # type: ignore[attr-defined]  # noqa: B018


def test_planning_from_python_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, fomoe\n"
        f"config = fomoe.load_config({str(write_config(tmp_path))!r})\n"
        "assert fomoe.plan(config).payload_per_round(0) > 0\n"
        "answer = fomoe.project(fomoe.Ask(model='dbrx', sites=8), method='diloco')\n"
        "assert answer['days'] > 0\n"
        "print('torch' in sys.modules)\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "False\n"


def test_a_run_from_python(tmp_path: Path) -> None:
    config = fomoe.load_config(write_config(tmp_path), ["rounds=1"])
    summary = fomoe.train(config, show=False)
    assert summary["rounds"] == 1
    assert fomoe.merge(summary["run_dir"]) == tmp_path / "run" / "merged" / "model.safetensors"


def test_a_run_needs_a_folder(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(re.sub(r"^run:\n  dir: .*", "run:", path.read_text(), flags=re.M))
    before = snapshot(tmp_path)
    config = fomoe.load_config(path, ["rounds=1"])
    with pytest.raises(ConfigError, match=r"run\.dir null must be set"):
        fomoe.train(config, show=False)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        ({"model": "dbrx", "sites": 0}, "--sites 0"),
        ({}, "--model neither is given"),
        ({"model": "dbrx", "capacity": "1", "replication": 2}, "contradicts --capacity"),
    ],
)
def test_a_question_is_checked_as_on_the_command_line(ask: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        fomoe.project(fomoe.Ask(**ask))  # type: ignore[arg-type]


EXAMPLES = re.findall(
    r"## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S
)


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_the_examples_of_the_page_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(words(3000, 0))
    exec(compile(code, "docs/python.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) > 1
