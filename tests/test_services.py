"""Optional packages and services: one line where they fail, and no folder is taken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import over_gloo, tiny_config
from helpers_cli import fomoe, snapshot, trained, write_config

from fomoe.errors import FomoeError
from fomoe.services import open_log


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


class ServiceFailure(Exception):
    """wandb's own errors are plain exceptions too."""


def fails(text: str) -> Callable[..., Any]:
    def call(*_: Any, **options: Any) -> None:
        raise ServiceFailure(text)

    return call


def opens_and_fails(**options: Any) -> None:
    """As the library does: it writes its files, then finds no network."""
    folder = Path(options["dir"]) / "wandb" / "run-1"
    folder.mkdir(parents=True)
    (folder.parent / "latest-run").symlink_to("run-1")
    raise ServiceFailure("Timed out while retrying\nConsider a longer init_timeout")


def library(**parts: Any) -> SimpleNamespace:
    """A stand-in for wandb where everything works but what is given."""
    run = SimpleNamespace(log=lambda record: None, finish=lambda exit_code=0: None)
    working = {"login": lambda **_: True, "init": lambda **_: run, "teardown": lambda: None}
    return SimpleNamespace(**(working | parts))


CASES: dict[str, tuple[Any, str, str]] = {
    "not installed": (None, "offline", "needs the package wandb: pip install 'fomoe[wandb]'"),
    "no key": (library(login=fails("No API key configured.")), "online", "No API key configured."),
    "not logged in": (library(login=lambda **_: False), "online", "nobody is logged in"),
    "no network": (library(init=opens_and_fails), "online", "Timed out while retrying Consider"),
    "no permission": (library(init=fails("permission denied")), "offline", "permission denied"),
}


@pytest.mark.parametrize(("wandb", "mode", "reason"), CASES.values(), ids=CASES)
def test_wandb_that_cannot_be_used_is_one_line_and_takes_no_folder(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wandb: Any,
    mode: str,
    reason: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    outcome = fomoe("train", tiny, f"run.wandb={mode}")
    assert outcome.status == 1
    assert outcome.err.startswith(f"fomoe: error: run.wandb={mode}")
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_loses_nothing_to_wandb(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny)
    before = snapshot(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", library(init=opens_and_fails))
    for flag in ("--overwrite", "--resume"):
        assert fomoe("train", tiny, "run.wandb=offline", flag, "rounds=3").status == 1
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_wandb_that_fails_later_costs_no_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    run = SimpleNamespace(log=lambda record: None, finish=lambda: None)
    setattr(run, broken, fails("the service is gone"))
    monkeypatch.setitem(sys.modules, "wandb", library(init=lambda **_: run))
    outcome = fomoe("train", tiny, "run.wandb=offline")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("wandb failed and gets no more records: the service is gone") == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_one_site_without_wandb_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' wandb runs are ended, and nothing of them is left."""
    ended: list[int] = []

    def init(**options: Any) -> Any:
        if options["job_type"] == "site-1":
            raise ServiceFailure("no quota")
        (Path(options["dir"]) / "wandb" / options["job_type"]).mkdir(parents=True)
        return SimpleNamespace(finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", library(init=init))
    config = tiny_config({"num_sites": 3, "run.wandb": "offline"})
    errors = over_gloo(3, lambda transport: open_log(config, tmp_path, transport))
    assert all(isinstance(error, FomoeError) and "no quota" in str(error) for error in errors)
    assert ended == [1, 1]
    assert not (tmp_path / "wandb").exists()


PACKAGES = {
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
