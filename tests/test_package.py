"""What the package says of itself; `make package` builds and tries it."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import fomoe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def metadata() -> Any:
    pytest.importorskip("setuptools")  # it brings distutils where Python has none
    core = import_module("distutils.core")
    before, arguments = os.getcwd(), sys.argv
    os.chdir(ROOT)
    try:
        return core.run_setup("setup.py", stop_after="init")
    finally:
        os.chdir(before)
        sys.argv = arguments


def test_versions_agree(metadata: Any) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metadata.get_version() == citation["version"] == fomoe.__version__
    assert f"## {fomoe.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_it_has_a_licence_and_a_readme(metadata: Any) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metadata.get_license() == citation["license"] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text()
    assert metadata.get_long_description().startswith("# FoMoE")


def test_everything_that_is_not_code_is_packaged(metadata: Any) -> None:
    shipped = set()
    for package, patterns in metadata.package_data.items():
        folder = ROOT / metadata.package_dir.get(package, package.replace(".", "/"))
        shipped |= {path for pattern in patterns for path in folder.glob(pattern)}
    kept = {p for top in ("fomoe", "sim", "configs") for p in (ROOT / top).rglob("*")}
    needed = {p for p in kept if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert shipped == needed
    assert {p.parent.name for p in needed if p.name == "py.typed"} == {"fomoe", "sim"}


def test_what_a_run_can_do_without_is_an_extra(metadata: Any) -> None:
    """Every package that a message names is in an extra of the same name."""
    required = {re.split(r"[<>=]", line)[0] for line in metadata.install_requires}
    heavy = {"wandb", "tensorboard", "matplotlib", "datasets", "transformers", "megablocks"}
    assert not required & heavy
    extras = {name for name in metadata.extras_require if ":" not in name}
    for path in [
        *(ROOT / "fomoe").rglob("*.py"),
        *(ROOT / "sim").rglob("*.py"),
        ROOT / "README.md",
    ]:
        named = re.findall(r"(?:fomoe|install -e '\.)\[(\w+)\]", path.read_text())
        assert set(named) <= extras, path
