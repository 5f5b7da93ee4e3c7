"""Optional packages and services: one line where they fail, and no folder is taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers_cli import fomoe, write_config


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


PACKAGES = {
    "tensorboard": (["run.tensorboard=true"], "pip install 'fomoe[tensorboard]', or take run.tens"),
    "datasets": (["data.source=hf:a/b"], "data source hf:a/b needs the datasets library: pip"),
    "megablocks": (["model.experts.backend=megablocks"], "model.experts.backend megablocks"),
    "transformers": (["data.tokenizer=folder"], "pip install 'fomoe[transformers]'"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_installed_takes_no_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    overrides, reason = PACKAGES[package]
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    outcome = fomoe("train", tiny, *overrides, "model.vocab_size=300")
    assert outcome.status != 0
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err
    assert not (tmp_path / "run").exists()
