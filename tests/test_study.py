"""Studies: from a file to runs, their processes, the lines of results, and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cli import fomoe, tiny_tree, trained
from helpers_study import called, lines, write_study

from fomoe.load import load_config
from fomoe.planning import plan_run, planned_summary
from fomoe.study import results
from fomoe.study.plan import load_study

ROOT = Path(__file__).resolve().parent.parent
# That of adapters needs a base, and has its own tests.
SHIPPED = [p for p in sorted((ROOT / "configs" / "study").glob("*.yaml")) if p.stem != "prelort"]


# ---------------------------------------------------------------------------------------- the file


def test_runs_are_arms_times_grid_times_regimes_times_seeds(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        grid={"outer.lr": [0.5, 1.0]},
        regimes={"short": None, "long": {"rounds": 3}},
        config={**tiny_tree(tmp_path), "rounds": 2},
    )
    study = load_study(path, ["inner.batch_size=1"])
    assert [run.folder.name for run in study.runs[:8]] == [
        *("all-outer.lr=0.5-short-seed0", "plain-outer.lr=0.5-short-seed0"),
        *("all-outer.lr=1.0-short-seed0", "plain-outer.lr=1.0-short-seed0"),
        *("all-outer.lr=0.5-long-seed0", "plain-outer.lr=0.5-long-seed0"),
        *("all-outer.lr=1.0-long-seed0", "plain-outer.lr=1.0-long-seed0"),
    ]
    assert len(study.runs) == 16
    assert [arm.control for arm in study.arms[2:]] == ["all-outer.lr=1.0"] * 2
    run = study.runs[15]
    assert run.folder.parent == tmp_path / "runs" / "small"
    config = run.config
    assert (config.seed, config.outer.lr, config.rounds, config.inner.batch_size) == (1, 1.0, 3, 1)
    assert (config.router.at_least_one, config.method) == (False, "fomoe")
    assert run.overrides == {
        "inner.batch_size": 1,
        "rounds": 3,
        "router.at_least_one": False,
        "outer.lr": 1.0,
    }


def test_a_base_lies_under_the_config(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    path = write_study(tmp_path, base="base.yaml", config={"model": {"top_k": 1}})
    model = load_study(path).runs[0].config.model
    assert (model.top_k, model.d_model) == (1, tree["model"]["d_model"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arms": {}}, "arms must name at least one arm"),
        ({"control": None}, "control null must name the arm"),
        ({"control": "plian"}, "control plian is no arm; did you mean plain?"),
        ({"sedes": [1]}, "sedes is not an option; did you mean seeds?"),
        ({"seeds": []}, "seeds [] must list at least one seed"),
        ({"seeds": [1, 2, 1]}, "seeds 1 stands twice"),
        ({"seeds": ["1"]}, "seeds.0 '1' must be an integer"),
        ({"seeds": [-1]}, "arm all: seed -1 must be at least 0"),
        ({"arms": {"all": {"method": "dilco"}}}, "arm all: method 'dilco' must be one of"),
        ({"arms": {"all": {"router.skip_scal": 1}}}, "arms.all.router.skip_scal is no option; did"),
        (
            {"arms": {"all": {"router": {"score": 1}}}},
            "arms.all.router is a section; write router.",
        ),
        ({"arms": {"all": {"seed": 3}}}, "arms.all.seed is set by the study"),
        ({"arms": {"all": ["run.dir=x"]}}, "arms.all.run.dir is set by the study"),
        ({"arms": {"all": ["rounds"]}}, "arms.all: override rounds must have the form"),
        ({"arms": {"all": [3]}}, "arms.all 3 must have the form section.option=value"),
        ({"arms": {"all": "x"}}, "arms.all x must be a mapping or a list of overrides"),
        ({"arms": {"all": {"note": 3}}}, "arms.all.note 3 must be text"),
        ({"arms": {"a/b": {}}, "control": "a/b"}, "arms 'a/b' must be a name of letters"),
        (
            {"arms": {"all": {"method": "diloco", "placement.replication_factor": 1}}},
            "placement.replication_factor 1 contradicts method diloco, which sets 3",
        ),
        ({"grid": {"outer.lr": 0.5}}, "grid.outer.lr 0.5 must be a list of values"),
        ({"grid": {"outer.lr": [1, 1]}}, "grid.outer.lr 1 stands twice"),
        ({"grid": {"data.source": ["a/b"]}}, "grid.data.source a/b must be a number or a word"),
        ({"grid": {"router.at_least_one": [True]}}, "arms.plain.router.at_least_one is set by"),
        ({"regimes": {"x": {"round": 3}}}, "regimes.x.round is no option; did you mean rounds?"),
        ({"regimes": {"x": {"rounds": 0}}}, "arm all, regime x: rounds 0 must be at least 1"),
        ({"base": "no.yaml"}, "no.yaml does not exist"),
        ({"arms": {"all": {}, "all-b": {}}, "regimes": {"b": {}, "b-b": {}}}, "has a run with the"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    outcome = fomoe("study", write_study(tmp_path, **changes))
    assert (outcome.status, outcome.out) == (2, "")
    assert expected in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["router.at_least_one=true"], "router.at_least_one True is set by arm plain"),
        (["seed=3"], "seed 3 is set by the study's seeds"),
        (["run.dir=x"], "run.dir x is set by the study"),
        (["run={dir: x}"], "is set by the study"),
        (["round=3"], "round is not an option; did you mean rounds?"),
        (["--only", "plian"], "--only plian is no arm; did you mean plain?"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--cores", "9999"], "--cores 9999 is no core that this process may use"),
        (["small.yaml"], "small.yaml does not exist"),
    ],
)
def test_wrong_words_are_one_line(tmp_path: Path, more: list[str], expected: str) -> None:
    outcome = fomoe("study", write_study(tmp_path), *more)
    assert (outcome.status, outcome.out) == (2, "")
    assert expected in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_needs_are_asked_for(tmp_path: Path) -> None:
    path = write_study(tmp_path, needs=["data.seq_len"])
    outcome = fomoe("study", path, "--dry-run")
    assert outcome.status == 2
    assert "data.seq_len must be given after the file" in outcome.err
    assert fomoe("study", path, "--dry-run", "data.seq_len=8").status == 0


def test_a_study_is_no_distributed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    outcome = fomoe("study", write_study(tmp_path))
    assert outcome.status == 2
    assert "WORLD_SIZE 2 sets up a distributed run" in outcome.err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_run(path: Path) -> None:
    study = load_study(path, ["data.sites=[a.txt,b.txt,c.txt,d.txt]"] * (path.stem == "texts"))
    assert len({run.config.fingerprint() for run in study.runs}) == len(study.runs)
    own = [arm.name for arm in study.arms]
    seeds = 1 if path.stem == "proxy" else 3
    assert len(study.runs) == seeds * len(own) * len(study.regimes)


def test_the_controls_of_the_capacity_study_are_equal() -> None:
    """In state and payload of a site, to the bytes that routers differ by."""
    runs = load_study(ROOT / "configs" / "study" / "capacity.yaml").runs
    for regime in ("d64", "d32"):
        planned = {
            run.arm: planned_summary(plan_run(run.config))
            for run in runs
            if (run.regime, run.seed) == (regime, 0)
        }
        equal = ("d8", "half", "fomoe", "plain-skip", "resident", "top1", "copies-clusters")
        for names in (equal, ("d4", "quarter")):
            for what in ("memory_bytes_per_site", "payload_bytes_per_site_per_round"):
                values = [planned[name][what] for name in names]
                assert max(values) < 1.03 * min(values), (names, what)
        assert planned["single"]["tokens"] * 4 == planned["d8"]["tokens"]


# ------------------------------------------------------------------------------------------- runs

EVERY = ["all-seed0", "all-seed1", "plain-seed0", "plain-seed1"]


def test_each_run_has_one_line_and_is_not_run_again(tmp_path: Path, calls: Path) -> None:
    path = write_study(tmp_path)
    outcome = fomoe("study", path, "--jobs", "2")
    assert (outcome.status, outcome.out) == (0, ""), outcome.err
    assert "4/4 small" in outcome.err
    assert called(calls) == EVERY
    found = {(line["arm"], line["seed"]): line for line in lines(tmp_path)}
    assert len(found) == len(lines(tmp_path)) == 4
    line = found["plain", 1]
    assert (line["study"], line["regime"]) == ("small", None)
    assert line["overrides"] == {"router.at_least_one": False}
    assert (line["val_loss_merged"], line["val_loss_local"]) == (1.875, 2.5)
    assert line["curve"] == [[500, 3.0], [2000, 1.875]]  # the last is the summary's loss
    assert line["config"]["seed"] == 1
    assert "run" not in line["config"]
    assert line["wall_s"] >= 0
    for name in ("torch", "python", "fomoe"):
        assert re.match(r"\d+\.\d+", line[name])
    documented = (ROOT / "docs" / "metrics.md").read_text().partition("## Results of a study")[2]
    assert set(line) <= set(re.findall(r"`(\w+)`", documented))
    assert fomoe("study", path).status == 0
    for run in load_study(path).runs:
        (run.folder / "config.yaml").unlink()  # a line is enough
    assert fomoe("study", path).status == 0
    assert called(calls) == []


def test_only_some_arms(tmp_path: Path, calls: Path) -> None:
    path = write_study(tmp_path, grid={"outer.lr": [1.0, 0.5]})
    assert fomoe("study", path, "--only", "plain").status == 0
    assert called(calls) == sorted(
        f"plain-outer.lr={x}-seed{s}" for x in (0.5, 1.0) for s in (0, 1)
    )
    assert fomoe("study", "--only", "all-outer.lr=0.5,plain", path).status == 0
    assert called(calls) == ["all-outer.lr=0.5-seed0", "all-outer.lr=0.5-seed1"]


def test_runs_are_bound_to_their_core(tmp_path: Path, calls: Path) -> None:
    (tmp_path / "pin").touch()
    core = min(os.sched_getaffinity(0))
    assert fomoe("study", write_study(tmp_path), "--cores", core).status == 0
    assert called(calls) == EVERY


def test_what_has_ended_is_recorded_and_what_was_stopped_goes_on(
    tmp_path: Path, calls: Path
) -> None:
    path = write_study(tmp_path)
    assert fomoe("study", path).status == 0
    called(calls)
    (tmp_path / "results.jsonl").rename(tmp_path / "before")
    ended, saved, unsaved, new = load_study(path).runs
    for run in (saved, unsaved):
        (run.folder / "summary.json").unlink()
    (saved.folder / "checkpoints" / "round-1").mkdir(parents=True)
    shutil.rmtree(new.folder)
    assert fomoe("study", path).status == 0
    assert called(calls) == sorted(
        [f"{saved.folder.name} --resume", f"{unsaved.folder.name} --overwrite", new.folder.name]
    )
    found = {(line["arm"], line["seed"]): line for line in lines(tmp_path)}
    assert len(found) == 4
    times = [found[run.arm, run.seed]["wall_s"] for run in (ended, saved, unsaved, new)]
    assert [time is None for time in times] == [
        True,
        True,
        False,
        False,
    ]  # known for a whole run only


def test_a_folder_of_another_config_is_kept(tmp_path: Path, calls: Path) -> None:
    path = write_study(tmp_path)
    assert fomoe("study", path).status == 0
    called(calls)
    outcome = fomoe("study", path, "rounds=1")
    assert outcome.status == 1
    assert "all-seed0 holds a run of another config than small all seed 0" in outcome.err
    assert outcome.err.count("\n") == 1
    assert called(calls) == []
    assert fomoe("study", path, "rounds=1", "--overwrite").status == 0
    assert called(calls) == [f"{name} --overwrite" for name in EVERY]
    assert [line["config"]["rounds"] for line in lines(tmp_path)] == [2] * 4 + [1] * 4
    assert fomoe("study", path).status == 0  # the older lines count again
    assert called(calls) == []


def test_a_run_that_fails_is_retried(tmp_path: Path, calls: Path) -> None:
    path = write_study(tmp_path)
    (tmp_path / "fail").write_text("all-seed0")
    outcome = fomoe("study", path)
    assert outcome.status == 1
    log = tmp_path / "runs" / "small" / "all-seed0.log"
    assert f"small all seed 0: failed, status 1: fomoe: error: it broke ({log})" in outcome.err
    assert "1 of 4 runs failed" in outcome.err
    assert called(calls) == EVERY
    assert len(lines(tmp_path)) == 3
    (tmp_path / "fail").unlink()
    assert fomoe("study", path).status == 0
    assert called(calls) == ["all-seed0 --overwrite"]
    assert len(lines(tmp_path)) == 4


def test_an_interrupt_ends_every_process_and_loses_nothing(tmp_path: Path, calls: Path) -> None:
    path = write_study(tmp_path)
    (tmp_path / "hang").write_text("seed1")
    runs = load_study(path).runs[2:]

    def interrupt() -> None:
        while not all((run.folder / "hangs").exists() for run in runs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    outcome = fomoe("study", path, "--jobs", "2")
    assert outcome.status == 130
    assert "interrupted; the same command goes on" in outcome.err
    assert all((run.folder / "stopped").exists() for run in runs)
    assert signal.getsignal(signal.SIGINT) == handler
    assert sorted((line["arm"], line["seed"]) for line in lines(tmp_path)) == [
        ("all", 0),
        ("plain", 0),
    ]
    called(calls)
    (tmp_path / "hang").unlink()
    assert fomoe("study", path).status == 0
    assert called(calls) == ["all-seed1 --overwrite", "plain-seed1 --overwrite"]


def test_a_study_trains_for_real(tmp_path: Path) -> None:
    """Once through the program itself: the line is the run's summary."""
    arms = {"all": {"method": "diloco"}}
    path = write_study(tmp_path, arms=arms, seeds=[3])
    outcome = fomoe("study", path, "rounds=1")
    assert outcome.status == 0, outcome.err
    (line,) = lines(tmp_path)
    run_dir = tmp_path / "runs" / "small" / "all-seed3"
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("val_loss_merged", "tokens", "memory_bytes_per_site", "text_sha256"):
        assert line[name] == summary[name]
    assert len(line["text_sha256"]) == 64
    assert results.same_experiment(line, load_config(run_dir / "config.yaml"))


def test_equal_text_has_an_equal_hash(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_tree(tmp_path), "rounds": 1, "local_steps": 1}))
    hashes = [
        trained(path, f"run.dir={tmp_path}/{number}", *words)["text_sha256"]
        for number, words in enumerate([[], ["method=diloco"], ["data.held_out_sequences=5"]])
    ]
    assert hashes[0] == hashes[1] != hashes[2]
