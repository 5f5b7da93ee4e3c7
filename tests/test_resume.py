"""Resuming: a run that is there is never started over, and a damaged round is never gone on from.

Refused means one line at every site and every byte as it was, on one folder or on a folder per
site; a fallback means that the older round is loaded whole, and that the newer ones are gone.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_good, assert_same_bits, over_gloo
from helpers_cli import Outcome, fomoe, load_part, records, snapshot, trained, write_config
from safetensors.torch import load_file, save_file

from fomoe import checkpoint
from fomoe.build import started
from fomoe.checkpoint import remove_parts, round_folder, saved_rounds
from fomoe.errors import CheckpointError
from fomoe.load import load_config
from fomoe.resume import expected_state, wrong_value
from fomoe.resume import resume as resume_run
from fomoe.run import Run
from fomoe.sync.transport import InMemoryTransport, Transport
from fomoe.training import run_local_steps, run_rounds

SITES = 3


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished proxy run of two rounds; tests work on copies of its run."""
    folder = tmp_path_factory.mktemp("done")
    trained(write_config(folder))
    return folder


@pytest.fixture
def run_dir(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done / "run", tmp_path / "run"))


def everything(folder: Path) -> dict[str, str]:
    """Every folder and the hash of every file below one."""
    folders = (path for path in folder.rglob("*") if path.is_dir())
    return snapshot(folder) | {f"{path.relative_to(folder)}/": "" for path in folders}


def resume(done: Path, run_dir: Path, *words: str) -> Outcome:
    return fomoe("train", done / "tiny.yaml", f"run.dir={run_dir}", "--resume", *words)


def sign(run_dir: Path, round_idx: int, site: int) -> None:
    """Make a part's manifest agree with its files, whatever they hold."""
    folder = round_folder(run_dir, round_idx)
    path = folder / f"site-{site}.manifest.json"
    names = (f"site-{site}.safetensors", f"site-{site}.json")
    files = {name: checkpoint._describe(folder / name) for name in names}
    text = json.dumps({"format": 1, "round": round_idx, "site": site, "files": files})
    path.write_text(text)


def edit(run_dir: Path, round_idx: int, site: int, change: Callable[[dict, dict], Any]) -> None:
    """Change the tensors and values of a part and sign it anew."""
    folder = round_folder(run_dir, round_idx)
    tensors = load_file(folder / f"site-{site}.safetensors")
    values = json.loads((folder / f"site-{site}.json").read_text())
    change(tensors, values)
    save_file(tensors, folder / f"site-{site}.safetensors")
    (folder / f"site-{site}.json").write_text(json.dumps(values))
    sign(run_dir, round_idx, site)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# ------------------------------------------------------------------------ never over what is there


def fewer_sites(run: Path) -> None:
    """What a run with two sites would have left."""
    for round_idx in (1, 2):
        remove_parts(run, round_idx, [2])
        for site in (0, 1):
            edit(run, round_idx, site, lambda _, values: values["config"].update(num_sites=2))


def torn(run: Path) -> None:
    for round_idx in (1, 2):
        for site in range(SITES):
            cut(round_folder(run, round_idx) / f"site-{site}.safetensors")


def illegible(run: Path) -> None:
    """Only config.yaml tells what the run was."""
    for path in run.glob("checkpoints/*/*.json"):
        path.write_text("{")


def none_in_common(run: Path) -> None:
    remove_parts(run, 1, [0])
    remove_parts(run, 2, [1])


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def lost_in_the_middle(run: Path) -> None:
    """The run was stopped in its second round, and its first checkpoint is gone."""
    no_checkpoints(run)
    (run / "summary.json").unlink()


def only_records(run: Path) -> None:
    lost_in_the_middle(run)
    (run / "config.yaml").unlink()


def a_file_for_the_folder(run: Path) -> None:
    no_checkpoints(run)
    (run / "checkpoints").write_text("")


THERE: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "more sites than before": (
        fewer_sites,
        [],
        ["is of another experiment: sites 0, 1: num_sites (was 2, now 3)"],
    ),
    "torn, and other options": (
        torn,
        ["inner.lr=0.5", "seed=7"],
        ["is of another experiment: sites 0, 1, 2: ", "seed (was 0, now 7)", "(was 0.01, now 0.5)"],
    ),
    "illegible, and other options": (
        illegible,
        ["inner.lr=0.5", "seed=7"],
        ["is of another experiment: sites 0, 1, 2: ", "seed (was 0, now 7)", "(was 0.01, now 0.5)"],
    ),
    "torn": (
        torn,
        [],
        ["no checkpoint can be used: round 2: site 0: ", "round 1: site 0: ", "is torn"],
    ),
    "illegible": (illegible, [], ["no checkpoint can be used", "manifest is not readable"]),
    "none in common": (
        none_in_common,
        [],
        ["no checkpoint is at all sites", "site 0: has rounds 2;", "site 1: has rounds 1;"],
    ),
    "ended, checkpoints gone": (no_checkpoints, [], ["no site holds a checkpoint", "has ended"]),
    "not ended, checkpoints gone": (lost_in_the_middle, [], ["no site holds a checkpoint"]),
    "only records": (only_records, [], ["no site holds a checkpoint", "records of 2 rounds"]),
    "not a folder": (a_file_for_the_folder, [], ["checkpoints cannot be read: Not a directory"]),
}


@pytest.mark.parametrize(("damage", "words", "reasons"), THERE.values(), ids=THERE)
def test_a_run_that_is_there_is_never_started_over(
    done: Path, run_dir: Path, damage: Callable[[Path], Any], words: list[str], reasons: list[str]
) -> None:
    damage(run_dir)
    before = everything(run_dir)
    outcome = resume(done, run_dir, "rounds=3", *words)
    assert outcome.status == 1, outcome.err
    assert outcome.err.startswith("fomoe: error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert all(reason in outcome.err for reason in reasons), outcome.err
    assert everything(run_dir) == before


def test_another_experiment_is_refused_before_its_data_is_read(done: Path, run_dir: Path) -> None:
    outcome = resume(done, run_dir, "data.source=/no/such/file.txt")
    assert outcome.status == 1
    assert "is of another experiment: sites 0, 1, 2: data.source (was " in outcome.err


def test_a_saved_null_of_another_kind_of_placement_is_no_difference(
    done: Path, run_dir: Path
) -> None:
    """Runs of an earlier version saved the options of every kind."""

    def save(**options: Any) -> None:
        for round_idx, site in product((1, 2), range(SITES)):
            edit(
                run_dir, round_idx, site, lambda _, own: own["config"]["placement"].update(options)
            )

    save(capacity=None, num_common=None, table=None)
    other = ("placement.kind=common", "placement.replication_factor=null", "placement.num_common=2")
    outcome = resume(done, run_dir, *other)
    assert outcome.status == 1
    for words in ("kind (was cyclic, now common)", "num_common (was null, now 2)"):
        assert f"placement.{words}" in outcome.err
    assert "capacity" not in outcome.err
    save(of_a_later_version=1)  # what cannot be known must not be taken for the same
    assert "placement.of_a_later_version (was 1, now null)" in resume(done, run_dir).err
    save(of_a_later_version=None)
    outcome = resume(done, run_dir, "rounds=3")
    assert outcome.status == 0, outcome.err
    assert "resuming after round 2\n" in outcome.err


class Stop(Exception):
    """A kill."""


def killed_while_saving(monkeypatch: pytest.MonkeyPatch, saves: int, *words: object) -> None:
    """`fomoe train` that dies after some parts were written, before the next one."""
    real, left = checkpoint.save_part, iter(range(saves))

    def save_part(*arguments: Any, **more: Any) -> None:
        if next(left, None) is None:
            raise Stop
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_part", save_part)
        with pytest.raises(Stop):
            fomoe("train", *words)


@pytest.mark.parametrize(("every", "saved"), [(0, 0), (0, 2), (1, 0), (1, 1)])
def test_a_kill_before_the_first_checkpoint_was_whole_costs_nothing_but_time(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, saved: int
) -> None:
    """A job that always passes --resume starts again; nothing could have been continued."""
    always = [f"run.checkpoint_every={every}"]
    words = [done / "tiny.yaml", f"run.dir={tmp_path / 'run'}", *always]
    killed_while_saving(monkeypatch, saved, *words)
    outcome = resume(done, tmp_path / "run", *always, "--json")
    assert outcome.status == 0, outcome.err
    when = "while its first checkpoint was saved" if saved else "before its first checkpoint"
    assert f"the run was stopped {when}; starting at round 0\n" in outcome.err
    straight = json.loads((done / "run" / "summary.json").read_text())
    assert outcome.json["val_loss_merged"] == straight["val_loss_merged"]
    assert len(records(tmp_path / "run")) == len(records(done / "run"))


def test_a_crash_in_the_very_first_round_is_no_run_to_lose(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("fomoe.training.run_local_steps", stop)
        with pytest.raises(Stop):
            fomoe("train", done / "tiny.yaml", f"run.dir={tmp_path / 'run'}")
    before = everything(tmp_path / "run")
    for other in ("seed=4", "num_sites=2"):
        assert "is of another experiment" in resume(done, tmp_path / "run", other).err
        assert everything(tmp_path / "run") == before
    outcome = resume(done, tmp_path / "run")
    assert outcome.status == 0
    assert "stopped before its first checkpoint; starting at round 0" in outcome.err


# --------------------------------------------------------------------------- a folder at every site


@pytest.fixture(scope="module")
def apart(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of the three sites of a distributed run of two rounds."""
    folder = tmp_path_factory.mktemp("apart")
    all_good(over_gloo(SITES, at_site(done, folder, mode="new")))
    return folder


def at_site(done: Path, folder: Path, *words: str, **start: Any) -> Callable[[Transport], Run]:
    """What each site's process runs, in `<folder>/<site>`."""

    def work(transport: Transport) -> Run:
        (site,) = transport.sites
        config = load_config(done / "tiny.yaml", [f"run.dir={folder / str(site)}", *words])
        options = {"mode": "resume", "device": torch.device("cpu"), "show": False} | start
        with started(config, transport, **options) as run:
            run_rounds(run)
        return run

    return work


def refusals_at_all(done: Path, folder: Path, *words: str) -> str:
    """The one line that all sites say when none of them may resume; nothing may change."""
    before = everything(folder)
    results = over_gloo(SITES, at_site(done, folder, "rounds=3", *words))
    assert all(isinstance(error, CheckpointError) for error in results), results
    assert everything(folder) == before
    said = {str(error) for error in results}
    assert len(said) == 1
    return said.pop()


LOST = {
    "one folder": lambda folder: shutil.rmtree(folder / "1"),
    "one folder emptied": lambda folder: [shutil.rmtree(folder / "1"), (folder / "1").mkdir()],
    "the first folder": lambda folder: shutil.rmtree(folder / "0"),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_a_lost_folder_is_refused_at_every_site(
    done: Path, apart: Path, tmp_path: Path, lose: Callable[[Path], Any]
) -> None:
    folder = Path(shutil.copytree(apart, tmp_path / "sites"))
    lose(folder)
    lost = next(s for s in range(SITES) if not (folder / str(s) / "checkpoints").exists())
    said = refusals_at_all(done, folder)
    assert "no checkpoint is at all sites" in said
    assert f"site {lost}: nothing of a run is in {folder / str(lost)}" in said


def test_what_differs_at_one_site_only_is_named_at_every_site(
    done: Path, apart: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(apart, tmp_path / "sites"))
    for round_idx in (1, 2):
        edit(folder / "2", round_idx, 2, lambda _, values: values["config"].update(seed=5))
    said = refusals_at_all(done, folder)
    assert "is of another experiment: site 2: seed (was 5, now 0); only" in said


def test_sites_on_folders_of_their_own_fall_back_together_and_each_says_why(
    done: Path, apart: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(apart, tmp_path / "sites"))
    edit(folder / "1", 2, 1, lambda tensors, _: tensors.pop("inner/exp_avg/final_norm.weight"))
    runs = all_good(over_gloo(SITES, at_site(done, folder, "rounds=3", show=True)))
    assert [run.first_round for run in runs] == [1] * SITES
    line = (
        "checkpoint of round 2 refused: site 1: site-1.safetensors: it lacks "
        "inner/exp_avg/final_norm.weight"
    )
    said = capfd.readouterr().err.splitlines()
    assert said.count(line) == 2, "site 0 says it of site 1, and site 1 of itself"
    for site in range(SITES):
        assert saved_rounds(folder / str(site)) == [3, 2, 1]


def test_a_kill_while_sites_save_their_first_part_on_folders_of_their_own(
    done: Path, apart: Path, tmp_path: Path
) -> None:
    """Site 0 was done, site 1 in the middle, site 2 had not even written its records."""
    folder = Path(shutil.copytree(apart, tmp_path / "sites"))
    (folder / "0" / "summary.json").unlink()
    for site in range(SITES):
        own = folder / str(site)
        remove_parts(own, 2, range(SITES))
        path = next(own.glob("metrics*.jsonl"))
        first = [line for line in path.read_text().splitlines() if '"round": 0' in line]
        path.write_text("\n".join(first[: 0 if site == 2 else None]))
    (round_folder(folder / "1", 1) / "site-1.manifest.json").unlink()
    remove_parts(folder / "2", 1, [2])
    runs = all_good(over_gloo(SITES, at_site(done, folder)))
    assert [run.first_round for run in runs] == [0] * SITES
    for site in range(SITES):
        again, _ = load_part(folder / str(site), 2, site)
        before, _ = load_part(apart / str(site), 2, site)
        assert_same_bits({**again, "rng": before["rng"]}, before)
    shutil.rmtree(folder / "1")
    assert "site 1: nothing of a run" in refusals_at_all(done, folder)


# ------------------------------------------------------------------------ never a poisoned one


@pytest.mark.parametrize(("method", "kind"), [("fomoe", "exp_avg_sq"), ("ddp", "exp_avg")])
def test_a_poisoned_optimizer_stops_the_run_in_its_round_and_is_never_saved(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    """The parameters are still finite: nothing else would show before the next round diverges."""
    rounds = iter(range(9))

    def poisoned(run: Run, round_idx: int) -> Any:
        result = run_local_steps(run, round_idx)
        if next(rounds) == 1:
            site = run.sites[2]
            state = site.optimizer.state[site.parameters["final_norm.weight"]]
            state[kind][5] = torch.inf
        return result

    words = [done / "tiny.yaml", f"run.dir={tmp_path / 'run'}", f"method={method}", "rounds=3"]
    with monkeypatch.context() as patch:
        patch.setattr("fomoe.training.run_local_steps", poisoned)
        outcome = fomoe("train", *words)
    assert outcome.status == 1
    reason = f"site 2: its inner optimizer state is not finite ({kind}/final_norm.weight)"
    assert reason in outcome.err.splitlines()[-1]
    assert saved_rounds(tmp_path / "run") == [1]
    assert {row["round"] for row in records(tmp_path / "run")} == {0}
    assert trained(*words, "--resume")["rounds"] == 3


# ------------------------------------------------------------------------------------ the way back


def test_resume_round_goes_back_and_what_came_later_is_gone(done: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    config = done / "tiny.yaml"
    trained(config, "rounds=3", f"run.dir={straight}")
    shutil.copytree(straight, run)
    for round_idx in (2, 3):  # a history that must not be mixed with the one to come
        for site in range(SITES):
            edit(run, round_idx, site, lambda tensors, _: tensors["probe"].add_(1))
    outcome = fomoe("train", config, "rounds=2", f"run.dir={run}", "--resume-round", 1)
    assert outcome.status == 0, outcome.err
    assert "resuming after round 1\n" in outcome.err
    assert saved_rounds(run) == [2, 1]
    assert {row["round"] for row in records(run)} == {0, 1}
    assert resume(done, run, "rounds=3").status == 0
    for round_idx in (1, 2, 3):
        for site in range(SITES):
            assert_same_bits(
                load_part(run, round_idx, site)[0], load_part(straight, round_idx, site)[0]
            )


def test_a_round_that_cannot_be_gone_back_to(done: Path, run_dir: Path) -> None:
    edit(run_dir, 1, 2, lambda tensors, _: tensors.pop("rng"))
    before = everything(run_dir)
    cases = [
        (["--resume-round", "1"], 1, "round 1: site 2: site-2.safetensors: it lacks rng"),
        (["--resume-round", "7"], 1, "has no checkpoint of round 7, only 2, 1"),
        (["--resume-round", "0"], 2, "--resume-round 0 must be at least 1"),
        (["--resume-round", "2", "--overwrite"], 2, "it cannot be combined with --overwrite"),
        (["--resume-round", "2", "seed=9"], 1, "is of another experiment"),
        (["--resume-round", "2", "rounds=1"], 2, "rounds 1 is below the 2 rounds"),
    ]
    for words, status, reason in cases:
        outcome = fomoe("train", done / "tiny.yaml", f"run.dir={run_dir}", *words)
        assert outcome.status == status
        assert reason in outcome.err
        assert outcome.err.count("\n") == 1
        assert everything(run_dir) == before


def test_after_a_fallback_no_part_of_the_refused_round_is_left(
    done: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the next save must not leave a round with parts of two histories."""
    edit(
        run_dir,
        2,
        1,
        lambda tensors, _: tensors["inner/exp_avg/final_norm.weight"].fill_(torch.inf),
    )
    words = [done / "tiny.yaml", f"run.dir={run_dir}", "rounds=3", "--resume"]
    killed_while_saving(monkeypatch, 1, *words)
    left = [checkpoint.has_part(run_dir, 2, site) for site in range(SITES)]
    assert left == [True, False, False]


# -------------------------------------------------------------------------------- damaged rounds


class Bench:
    """A run that resumes from a copy of the finished one, again and again."""

    def __init__(self, done: Path, folder: Path) -> None:
        self.good, self.run_dir = done / "run", folder / "run"
        shutil.copytree(self.good, self.run_dir)
        self.folder = round_folder(self.run_dir, 2)
        config = load_config(done / "tiny.yaml", [f"run.dir={self.run_dir}"])
        transport = InMemoryTransport(range(SITES))
        cpu = torch.device("cpu")
        with started(config, transport, mode="resume", device=cpu, show=False) as self.run:
            pass
        self.said: list[str] = []
        self.run.progress.say = self.said.append  # type: ignore[method-assign]

    def restore(self) -> None:
        """Undo what was done to the newest round."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(round_folder(self.good, 2), self.folder)

    def resume(self) -> int:
        """The round that is taken; what is loaded must be that round's state, all of it."""
        self.said.clear()
        resume_run(self.run, None, show=False)
        for site, own in self.run.sites.items():
            loaded = own.state()[0] | self.run.sync.state_of(site)
            kept, _ = load_part(self.run_dir, self.run.first_round, site)
            others = ("rng", "probe")
            assert_same_bits(loaded, {n: t for n, t in kept.items() if n not in others})
        refused = [line for line in self.said if "refused" in line]
        assert len(refused) == 2 - self.run.first_round
        for line in refused:
            assert line.startswith("checkpoint of round 2 refused: site")
            assert "\n" not in line
            assert len(line) < 700
            assert saved_rounds(self.run_dir) == [1]
        return self.run.first_round


@pytest.fixture(scope="module")
def bench(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(done, tmp_path_factory.mktemp("bench"))


FILES = ("site-1.safetensors", "site-1.json", "site-1.manifest.json")


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 3, 20))):
        # Half of them in what is read first, where the names and shapes are.
        end = min(len(data), 400) if draw.random() < 0.5 else len(data)
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def shorten(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.choice((1, 8, draw.randrange(len(data)), len(data) - 1))])


def scramble(path: Path, draw: random.Random) -> None:
    texts = (
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 20_000,
        b'{"a":' * 20_000,
        b"9" * 9_000,
    )
    path.write_bytes(draw.choice(texts))


def unlink(path: Path, draw: random.Random) -> None:
    path.unlink()


def neighbour(path: Path, draw: random.Random) -> None:
    shutil.copy(path.with_name(path.name.replace("site-1", "site-0")), path)


def predecessor(path: Path, draw: random.Random) -> None:
    shutil.copy(path.parent.with_name("round-000001") / path.name, path)


SEVERAL = (flip, shorten, scramble)
DAMAGES = (*SEVERAL, unlink, neighbour, predecessor)


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_falls_back_in_one_line(
    bench: Bench, damage: Callable[[Path, random.Random], None]
) -> None:
    """With the manifest as it was, and with one that agrees with the damage."""
    draw = random.Random(damage.__name__)
    for name in FILES:
        for signed in (False, True):
            if signed and name == FILES[2]:
                continue
            for _ in range(2 if damage in SEVERAL else 1):
                bench.restore()
                damage(bench.folder / name, draw)
                if signed and damage is not unlink:
                    sign(bench.run_dir, 2, 1)
                taken = bench.resume()
                # A bit of a number may change in a file that is signed for, and nobody can tell.
                assert taken == 1 or (signed and damage is flip), (name, signed)


def change_values(*keys: str, value: Any = None) -> Callable[[dict, dict], Any]:
    def change(_: dict, values: dict) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


def poison(tensors: dict, _: dict) -> None:
    tensors["inner/exp_avg_sq/final_norm.weight"][3] = torch.nan


MISFITS = {
    "lacks": (lambda t, _: t.pop("outer/momentum_buffer/embedding.weight"), "it lacks outer/"),
    "has more": (lambda t, _: t.update(more=torch.ones(2)), "it holds more, which this run"),
    "a shape": (
        lambda t, _: t.update({"param/final_norm.weight": torch.ones(17)}),
        "param/final_norm.weight is float32 [17], not float32 [16]",
    ),
    "a type": (
        lambda t, _: t.update({"inner/step/final_norm.weight": torch.tensor(4)}),
        "inner/step/final_norm.weight is int64 [], not float32 []",
    ),
    "poisoned": (poison, "inner/exp_avg_sq/final_norm.weight is not finite"),
    "another history": (
        lambda t, _: t["param/final_norm.weight"].add_(1),
        "site 1: its embedding.weight is not that of site 0: saved by another run",
    ),
    "random state": (
        lambda t, _: t.update(rng=torch.zeros_like(t["rng"])),
        "rng is not a random state",
    ),
    "another seed": (change_values("config", "seed", value=4), "seed (was 4, now 0)"),
    "no config": (change_values("config"), "site-1.json: it holds no config"),
    "another text": (change_values("fingerprints", "data split", value="x"), "data split"),
    "another site": (change_values("site", value=0), "site is 0, not 1"),
    "more steps": (change_values("step_idx", value=5), "step_idx is 5, not 4"),
    "a huge position": (
        change_values("data", "position", value=10**30),
        "not a position in the text",
    ),
    "no sums": (change_values("totals", "tokens", value="x"), "totals are not sums over rounds"),
}


@pytest.mark.parametrize(("change", "reason"), MISFITS.values(), ids=MISFITS)
def test_a_part_that_does_not_fit_falls_back_and_says_why(
    bench: Bench, change: Callable[[dict, dict], Any], reason: str
) -> None:
    """Its files and its manifest agree, as of a part that was written like this."""
    bench.restore()
    edit(bench.run_dir, 2, 1, change)
    assert bench.resume() == 1
    assert reason in bench.said[0]


def test_a_good_round_is_taken_and_parts_of_the_version_before_are_good(bench: Bench) -> None:
    bench.restore()
    for round_idx in (1, 2):
        for site in range(SITES):
            edit(bench.run_dir, round_idx, site, lambda _, values: values.pop("site"))
    assert bench.resume() == 2
    assert bench.said == ["resuming after round 2"]


def places(tree: Any, prefix: tuple = ()) -> list[tuple]:
    """Every place in a part's values; the config and the fingerprints are compared elsewhere."""
    found = [prefix] if prefix else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key not in ("config", "fingerprints"):
                found += places(value, (*prefix, key))
    return found


WRONG = (None, True, "x", "", [], [1], {}, {"a": []}, -1, 10**30, float("nan"), float("inf"))


def test_values_of_any_other_kind_are_refused(bench: Bench) -> None:
    """Each one missing, and each of another kind; only what may be so is taken."""
    values = checkpoint.read_values(bench.good, 2, 1)
    expected = expected_state(bench.run, 1)
    assert wrong_value(values, 2, 1, expected) == ""
    taken = set()
    for place in places(values):
        for wrong in ("missing", *WRONG):
            changed = json.loads(json.dumps(values))
            *parents, last = place
            node = changed
            for parent in parents:
                node = node[parent]
            node.pop(last)
            if wrong != "missing":
                node[last] = wrong
            if not wrong_value(changed, 2, 1, expected):
                taken.add((".".join(place), repr(wrong)))
    bytes_by_class = {place for place in places(values) if place[0] == "counts"}
    allowed = {(name, "'missing'") for name in ("site", "ranks_by_site")}  # older parts
    allowed |= {*(("val_loss_local", w) for w in ("None", "nan", "inf"))}
    allowed |= {(".".join(p), "'missing'") for p in bytes_by_class if len(p) == 3}  # none sent
    allowed |= {(".".join(p), "{}") for p in bytes_by_class if len(p) == 2}
    assert taken == allowed


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"\xff")])
def test_a_damaged_tokenizer_is_trained_anew_and_must_be_the_same(
    done: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    run_dir = tmp_path / "run"
    always = ["data.tokenizer=bpe", "data.bpe_vocab_size=280"]
    trained(done / "tiny.yaml", f"run.dir={run_dir}", "rounds=1", *always)
    good = (run_dir / "tokenizer.json").read_bytes()
    damage(run_dir / "tokenizer.json")
    outcome = resume(done, run_dir, *always)
    assert outcome.status == 0, outcome.err
    assert (run_dir / "tokenizer.json").read_bytes() == good


# ------------------------------------------------------------------------------------ the schedule


def test_more_rounds_say_how_the_learning_rate_jumps_and_how_to_keep_it(
    done: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    always = [done / "tiny.yaml", "inner.schedule_steps=null", f"run.dir={run_dir}"]
    trained(*always, "rounds=2")
    shutil.copytree(run_dir, tmp_path / "kept")
    outcome = fomoe("train", *always, "rounds=4", "--resume")
    assert outcome.status == 0
    line = (
        "the learning rate's schedule ends after 8 steps, not after 4 as before: the next step "
        "takes 0.0055 instead of 0.001; inner.schedule_steps=4 keeps the old schedule"
    )
    assert outcome.err.splitlines().count(line) == 1
    lr = {row["step"]: row["lr"] for row in records(run_dir, "step")}
    assert lr[4] == pytest.approx(0.0055)
    # As advised; then the horizon is the checkpoint's own, and there is nothing more to say.
    kept = [*always[:2], f"run.dir={tmp_path / 'kept'}", "inner.schedule_steps=4", "--resume"]
    for rounds in (3, 4):
        outcome = fomoe("train", *kept, f"rounds={rounds}")
        assert outcome.status == 0
        assert "schedule" not in outcome.err
    lr = {row["step"]: row["lr"] for row in records(tmp_path / "kept", "step")}
    assert [lr[step] for step in (4, 5, 6, 7)] == pytest.approx([0.001] * 4)


def test_a_schedule_that_does_not_move_is_not_spoken_of(done: Path, run_dir: Path) -> None:
    """The tiny experiment sets its horizon: more rounds do not change it."""
    outcome = resume(done, run_dir, "rounds=3")
    assert outcome.status == 0
    assert "schedule" not in outcome.err


# ----------------------------------------------------------------------------------------- merging

UNMERGED = {
    "lacks": (MISFITS["lacks"][0], ""),  # not of the model itself
    "no parameter": (lambda t, _: t.pop("param/final_norm.weight"), "it lacks param/final_norm"),
    "a shape": MISFITS["a shape"],
    "another history": (MISFITS["another history"][0], "replicas are not those of the other sites"),
    "another seed": (MISFITS["another seed"][0], "seed (was 4, now 0)"),
    "no config": (MISFITS["no config"][0], "it holds no config"),
    "no sites": (
        lambda _, values: values["config"].pop("num_sites"),
        "num_sites (was 4, now 3)",
    ),
    "another text": (MISFITS["another text"][0], "data split"),
}


@pytest.mark.parametrize("site", [0, 1])
@pytest.mark.parametrize(("change", "reason"), UNMERGED.values(), ids=UNMERGED)
def test_merge_refuses_what_a_resume_refuses_in_one_line(
    run_dir: Path, tmp_path: Path, site: int, change: Callable[[dict, dict], Any], reason: str
) -> None:
    edit(run_dir, 2, site, change)
    whole = fomoe("merge", run_dir, "--out", tmp_path / "out")
    assert whole.status == 0
    lines = whole.err.splitlines()
    assert lines[-1] == f"merged the checkpoint of round {1 if reason else 2}"
    assert len(lines) == (2 if reason else 1)
    outcome = fomoe("merge", run_dir, "--round", 2, "--out", tmp_path / "two")
    if not reason:
        assert outcome.status == 0
        return
    assert outcome.status == 1
    for line in (lines[0], outcome.err):
        assert re.search(r"site \d: ", line)
        if site == 1:  # the others are measured by site 0's config
            assert "site 1: " in line
            assert reason in line
    assert outcome.err.startswith("fomoe: error: ")
    assert outcome.err.count("\n") == 1
