"""Records sent to wandb and TensorBoard: one run per site, which a resume goes on with."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import over_gloo, tiny_config
from helpers_cli import fomoe, records, snapshot, trained, write_config

from fomoe.errors import FomoeError
from fomoe.logs import open_logs


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


def wandb_run(**parts: Any) -> SimpleNamespace:
    working: dict[str, Any] = {
        "log": lambda record: None,
        "finish": lambda exit_code=0: None,
        "define_metric": lambda name, step_metric=None: None,
    }
    return SimpleNamespace(**(working | parts))


def library(**parts: Any) -> SimpleNamespace:
    """A stand-in for wandb where everything works but what is given."""
    run = wandb_run()
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
    run = wandb_run(**{broken: fails("the service is gone")})
    monkeypatch.setitem(sys.modules, "wandb", library(init=lambda **_: run))
    outcome = fomoe("train", tiny, "run.wandb=offline")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("wandb failed and gets no more records: the service is gone") == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_one_site_without_wandb_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' wandb runs are ended, and nothing of them is left."""
    ended: list[int] = []
    opened: list[bool] = []
    opening = threading.Event()

    def init(**options: Any) -> Any:
        if options["job_type"] == "site-1":
            opening.wait(10)
            raise ServiceFailure("no quota")
        folder = Path(options["dir"]) / "wandb" / options["job_type"]
        folder.mkdir(parents=True)
        opening.set()
        time.sleep(0.2)  # site 1 fails meanwhile
        opened.append(folder.is_dir())
        return wandb_run(finish=lambda exit_code: ended.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", library(init=init))
    config = tiny_config({"num_sites": 3, "run.wandb": "offline"})
    errors = over_gloo(3, lambda transport: open_logs(config, tmp_path, transport, run_id="a"))
    assert all(isinstance(error, FomoeError) and "no quota" in str(error) for error in errors)
    assert opened == [True, True]  # a site that failed takes nothing from those that still open
    assert ended == [1, 1]
    assert not (tmp_path / "wandb").exists()


class Recorded:
    """A stand-in for wandb that keeps what it gets."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: dict[str, list[dict[str, Any]]] = {}
        self.finished: list[str] = []

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        rows = self.logged.setdefault(options["id"], [])
        return wandb_run(log=rows.append, finish=lambda: self.finished.append(options["id"]))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", library(init=recorded.init))
    return recorded


def test_wandb_gets_what_metrics_get(tiny: Path, tmp_path: Path, wandb: Recorded) -> None:
    trained(tiny, "run.wandb=offline", "run.wandb_project=mine", "run.eval_merged_every=1")
    assert [options["job_type"] for options in wandb.started] == ["site-0", "site-1", "site-2"]
    assert len({options["group"] for options in wandb.started}) == 1
    for options in wandb.started:
        assert (options["project"], options["mode"]) == ("mine", "offline")
        assert options["group"].startswith("run-")
        assert options["config"]["rounds"] == 2
    assert sorted(wandb.finished) == sorted(options["id"] for options in wandb.started)
    rows = list(wandb.logged.values())
    kept = records(tmp_path / "run")
    assert sum(map(len, rows)) == len(kept)
    losses = [row["step/loss"] for row in rows[1] if "step/loss" in row]
    assert losses == [r["loss"] for r in kept if r["kind"] == "step" and r["site"] == 1]
    merged = [row["merged/val_loss_merged"] for row in rows[0] if "merged/val_loss_merged" in row]
    assert merged == [r["val_loss_merged"] for r in kept if r["kind"] == "merged"]
    assert not any("merged" in name for row in rows[1] for name in row)
    trained(tiny, "--overwrite")
    assert len(wandb.started) == 3  # off by default


def test_the_axes_count_steps_and_tokens(tiny: Path, tmp_path: Path, wandb: Recorded) -> None:
    trained(tiny, "run.wandb=offline")
    (first, *_) = wandb.logged.values()
    tokens_per_step = 2 * 16 * 3  # batch, sequence, sites
    for row in first:
        assert row["tokens"] == row["steps"] * tokens_per_step
    assert [row["steps"] for row in first if "step/loss" in row] == [1, 2, 3, 4]
    assert [row["steps"] for row in first if "round/tokens" in row] == [2, 4]


def test_a_resumed_run_goes_on_with_its_wandb_runs(tiny: Path, wandb: Recorded) -> None:
    trained(tiny, "run.wandb=offline", "rounds=1")
    trained(tiny, "run.wandb=offline", "--resume")
    first, second = wandb.started[:3], wandb.started[3:]
    for name in ("id", "group", "name"):
        assert [options[name] for options in first] == [options[name] for options in second]
    assert {options["resume"] for options in wandb.started} == {"allow"}
    for rows in wandb.logged.values():
        assert [row["steps"] for row in rows if "step/loss" in row] == [1, 2, 3, 4]
    trained(tiny, "run.wandb=offline", "--overwrite")
    assert not {o["id"] for o in wandb.started[6:]} & {o["id"] for o in first}


def test_sites_of_their_own_have_the_same_wandb_runs(tmp_path: Path, wandb: Recorded) -> None:
    """A distributed run has the ids and names of a proxy run."""
    config = tiny_config({"num_sites": 2, "run.wandb": "offline"})
    over_gloo(2, lambda transport: open_logs(config, tmp_path, transport, run_id="abc").close())
    assert sorted(options["id"] for options in wandb.started) == ["abc-site-0", "abc-site-1"]
    assert {options["group"] for options in wandb.started} == {f"{tmp_path.name}-abc"}


# ------------------------------------------------------------------------------------- TensorBoard


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder: per name, values by step."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = module.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: {e.step: e.value for e in shown.Scalars(tag)} for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_what_wandb_gets(tiny: Path, tmp_path: Path, wandb: Recorded) -> None:
    pytest.importorskip("tensorboard")
    words = ["run.wandb=offline", "run.tensorboard=true", "run.eval_merged_every=1"]
    trained(tiny, *words, "rounds=1")
    trained(tiny, *words, "--resume")
    for site, rows in enumerate(wandb.logged.values()):
        shown = scalars(tmp_path / "run" / "tensorboard" / f"site-{site}")
        sent: dict[str, dict[int, float]] = {}
        for row in rows:
            for name, value in row.items():
                sent.setdefault(name, {})[row["steps"]] = pytest.approx(value)
        assert shown == sent


def next_second() -> None:
    """TensorBoard reads files in the order of their names, which carry whole seconds."""
    time.sleep(1.05 - time.time() % 1)


def test_steps_that_run_again_are_shown_once(tiny: Path, tmp_path: Path) -> None:
    """TensorBoard hides what a crash made void, and what another run left in the folder."""
    pytest.importorskip("tensorboard")
    trained(tiny, "run.tensorboard=true")
    next_second()
    trained(tiny, "run.tensorboard=true", "--resume-round", "1", "rounds=3")
    shown = scalars(tmp_path / "run" / "tensorboard" / "site-0")
    assert list(shown["step/loss"]) == [1, 2, 3, 4, 5, 6]
    next_second()
    trained(tiny, "run.tensorboard=true", "--overwrite", "rounds=1", "seed=5")
    shown = scalars(tmp_path / "run" / "tensorboard" / "site-0")
    assert list(shown["step/loss"]) == [1, 2]
    losses = [r["loss"] for r in records(tmp_path / "run", "step") if r["site"] == 0]
    assert list(shown["step/loss"].values()) == pytest.approx(losses)


def test_tensorboard_that_fails_costs_no_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = pytest.importorskip("torch.utils.tensorboard")
    monkeypatch.setattr(board.SummaryWriter, "add_scalar", fails("No space left on device"))
    outcome = fomoe("train", tiny, "run.tensorboard=true")
    assert outcome.status == 0, outcome.err
    told = "TensorBoard failed and gets no more records: No space left on device"
    assert outcome.err.count(told) == 1


def test_a_start_that_is_refused_leaves_no_tensorboard_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", library(init=opens_and_fails))
    outcome = fomoe("train", tiny, "run.wandb=offline", "run.tensorboard=true")
    assert outcome.status == 1
    assert not (tmp_path / "run").exists()


def test_a_round_without_an_evaluation_has_no_local_loss(tmp_path: Path) -> None:
    trained(write_config(tmp_path), "rounds=5", "run.eval_every=2")
    rounds = records(tmp_path / "run", "round")
    due = {record["round"] for record in rounds if record["val_loss_local"] is not None}
    assert due == {1, 3, 4}  # every second one, and the last
    assert len([r for r in rounds if r["val_loss_local"] is not None]) == 3 * len(due)
