"""One folder, several processes: peers that remove first, runs that want the same folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_good, over_gloo, tiny_config
from helpers_cli import fomoe, load_part, records, snapshot, trained, write_config
from safetensors.torch import load_file, save_file

import fomoe.training as fomoe_train
from fomoe import checkpoint, runlock
from fomoe.checkpoint import remove_parts, round_folder, save_part, saved_rounds
from fomoe.errors import CheckpointError
from fomoe.files import listing, remove_if_empty, write_text_atomically
from fomoe.merging import merge
from fomoe.metrics import Metrics
from fomoe.report import Progress
from fomoe.rundir import claim_run_dir
from fomoe.runlock import FolderInUseError, RunLock, lock_folder
from fomoe.sync.exchange import gather
from fomoe.sync.transport import InMemoryTransport, Transport

MODES = ([], ["--resume"], ["--overwrite"])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlock, "PATIENCE_S", 0.0)


# ----------------------------------------------------------------------------------- many processes


@pytest.mark.parametrize(
    "words", [("stress_folder", "--rounds", "12", "--times", "1"), ("kill_sites", "--kills", "1")]
)
def test_the_short_form_of_a_stress(words: tuple[str, ...]) -> None:
    """Its long form is a command: see the file of that name."""
    name, *flags = words
    short = ["--rounds", "4"] if name == "kill_sites" else []
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / f"{name}.py"), *flags, *short],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_part_whose_folder_a_peer_removes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in (0, 1):
        save_part(tmp_path, 1, site, {"x": torch.zeros(1)}, {})
    kept = Path.rmdir

    def after_a_peer(folder: Path) -> None:
        kept(folder)
        kept(folder)

    monkeypatch.setattr(Path, "rmdir", after_a_peer)
    remove_parts(tmp_path, 1, [0, 1])
    assert saved_rounds(tmp_path) == []
    remove_parts(tmp_path, 1, [0, 1])


def test_a_folder_that_a_peer_fills_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "part").touch()
    remove_if_empty(tmp_path / "a")
    assert listing(tmp_path / "a") == ["part"]
    assert listing(tmp_path / "gone") == []


def test_a_folder_that_a_peer_removes_before_the_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer prunes the round that this site is about to save."""
    kept, removed = Path.mkdir, []

    def before_a_peer(folder: Path, *args: Any, **options: Any) -> None:
        kept(folder, *args, **options)
        if folder.name == "round-000001" and not removed:
            folder.rmdir()
            removed.append(folder)

    monkeypatch.setattr(Path, "mkdir", before_a_peer)
    save_part(tmp_path, 1, 0, {"x": torch.zeros(1)}, {})
    assert removed
    assert checkpoint.check_part(tmp_path, 1, 0) == ""


def test_a_save_that_fails_leaves_the_files_that_a_peer_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if "site-0" in str(path):
            with pytest.raises(CheckpointError, match="No space left on device"):
                save_part(tmp_path, 1, 1, {"x": torch.zeros(1)}, {})
        else:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", slow)
    save_part(tmp_path, 1, 0, {"x": torch.zeros(1)}, {})
    assert checkpoint.check_part(tmp_path, 1, 0) == ""
    assert len(listing(round_folder(tmp_path, 1))) == 3


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """Each through a name of its own: the later one replaces the other's whole file."""

    def write(text: str) -> None:
        for _ in range(30):
            write_text_atomically(tmp_path / "config.yaml", text)

    errors: list[Any] = []
    threads = [
        threading.Thread(target=catch, args=(errors, lambda text=text: write(text)))
        for text in ("one", "two", "three")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert listing(tmp_path) == ["config.yaml"]


def catch(errors: list[Any], work: Callable[[], Any]) -> None:
    try:
        work()
    except Exception as error:
        errors.append(error)


# ------------------------------------------------------------------------------ merge beside a run


@pytest.fixture
def going_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """A run that saves round 3 and removes round 2 when a part of round 2 is read, the n-th."""
    run, later = tmp_path / "run", tmp_path / "later"
    trained(tiny, "rounds=3")
    round_folder(run, 3).rename(later)

    def prepare(number: int) -> Path:
        calls = count(1)

        def live(run_dir: Path, round_idx: int, site: int, **options: Any) -> Any:
            if next(calls) == number:
                later.rename(round_folder(run, 3))
                remove_parts(run, 2, range(3))
                # Gone between the check of the part and the reading of its file.
                raise CheckpointError("site-0.json: No such file or directory")
            return checkpoint.Part(run_dir, round_idx, site, **options)

        monkeypatch.setattr("fomoe.whole.Part", live)
        return run

    return prepare


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_round_that_is_removed_while_it_is_merged(
    going_on: Callable[[int], Path], number: int
) -> None:
    """The search begins anew and finds the round that was saved meanwhile."""
    merged = 3
    run, said = going_on(number), []
    path = merge(run, say=said.append)
    assert said[-1] == f"merged the checkpoint of round {merged}"
    part, _ = load_part(run, merged, 0)
    shared = {n: t for n, t in part.items() if n.startswith("param/") and "experts" not in n}
    whole = load_file(path)
    assert shared
    assert all(whole[n.removeprefix("param/")].equal(t) for n, t in shared.items())


def test_a_round_that_is_asked_for_and_removed(going_on: Callable[[int], Path]) -> None:
    run = going_on(2)
    outcome = fomoe("merge", run, "--round", 2)
    assert outcome.status == 1
    assert outcome.err == f"fomoe: error: {run} has no checkpoint of round 2, only [3, 1]\n"


def test_parts_of_two_runs_are_not_merged(tiny: Path, tmp_path: Path) -> None:
    """As where a run is overwritten while it is read."""
    trained(tiny)
    trained(tiny, "seed=1", f"run.dir={tmp_path / 'other'}")
    for name in ("site-1.json", "site-1.safetensors", "site-1.manifest.json"):
        (round_folder(tmp_path / "other", 2) / name).replace(
            round_folder(tmp_path / "run", 2) / name
        )
    outcome = fomoe("merge", tmp_path / "run")
    assert outcome.status == 0
    refused, merged = outcome.err.splitlines()
    assert "round-000002, site 1: seed (was 1, now 0)" in refused
    assert merged == "merged the checkpoint of round 1"


# -------------------------------------------------------------------------------- one run at a time


@contextmanager
def alive(run_dir: Path, run_id: str = "1234abcd") -> Iterator[RunLock]:
    """Another run that has begun."""
    lock = lock_folder(run_dir, run_id)
    lock.began = True
    try:
        yield lock
    finally:
        lock.release()


def test_nothing_enters_the_folder_of_a_run_that_is_alive(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its mode; readers may, and the run goes on as if nothing had happened."""
    run, straight = tmp_path / "run", trained(tiny, "rounds=3", f"run.dir={tmp_path / 'straight'}")
    outcomes = []
    kept = fomoe_train.save_round

    def meanwhile(own: Any, rounds_done: int) -> None:
        kept(own, rounds_done)
        if rounds_done == 2:
            before = snapshot(run)
            state = torch.get_rng_state()
            for flags in MODES:
                # A resume of another experiment is refused before the folder is claimed.
                other = [] if "--resume" in flags else ["seed=1"]
                outcomes.append(fomoe("train", tiny, "rounds=3", *flags, *other))
            assert snapshot(run) == before
            assert fomoe("merge", run, "--out", tmp_path / "merged").status == 0
            torch.set_rng_state(state)

    with monkeypatch.context() as patch:
        patch.setattr(fomoe_train, "save_round", meanwhile)
        again = trained(tiny, "rounds=3")
    assert again["val_loss_merged"] == straight["val_loss_merged"]
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert outcome.status == 1
        assert outcome.err.count("\n") == 1
        assert f"run.dir {run} is in use by run " in outcome.err
        assert f"(process {os.getpid()} on " in outcome.err
    assert len(records(run)) == len(records(tmp_path / "straight"))
    assert not (run / runlock.LOCK_NAME).exists()


@pytest.mark.parametrize("flags", MODES)
def test_a_folder_that_a_run_has_just_taken(tiny: Path, tmp_path: Path, flags: list[str]) -> None:
    """Nothing is written yet, and the second run is refused all the same."""
    with alive(tmp_path / "run"):
        before = snapshot(tmp_path)
        outcome = fomoe("train", tiny, *flags)
        assert outcome.status == 1
        assert f"run.dir {tmp_path / 'run'} is in use by run 1234abcd (process" in outcome.err
        assert snapshot(tmp_path) == before
    trained(tiny)


def killed(work: Callable[[], Any]) -> None:
    """Do something in a process that is then killed."""
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_killed_process_blocks_nobody(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, "rounds=1")
    run = tmp_path / "run"
    killed(lambda: lock_folder(run, "dead"))
    killed(lambda: lock_folder(run, "dead too"))
    before = snapshot(run)
    assert "run.lock" in before
    for flags in (["--resume", "inner.lr=0.5"], []):
        assert "in use" not in fomoe("train", tiny, *flags).err
        assert snapshot(run) == before, "a start that is refused leaves every byte"
    trained(tiny, "--resume")
    assert "run.lock" not in snapshot(run)


def test_the_lock_is_gone_with_the_last_process_of_its_run(tmp_path: Path) -> None:
    locks = [lock_folder(tmp_path / "run", "one") for _ in range(3)]
    for lock in locks:
        with pytest.raises(FolderInUseError, match="in use by run one"):
            lock_folder(tmp_path / "run", "two")
        lock.release()
    assert listing(tmp_path) == [], "the folder was made for it"
    lock_folder(tmp_path / "run", "two").release()


def test_a_folder_that_another_run_makes_and_removes_meanwhile(tmp_path: Path, monkeypatch) -> None:
    def meanwhile(path: Path, mode: int) -> None:
        monkeypatch.undo()
        raise FileExistsError(errno.EEXIST, "File exists", str(path))

    monkeypatch.setattr(os, "mkdir", meanwhile)
    lock_folder(tmp_path / "run", "one", patience_s=1.0).release()
    assert listing(tmp_path) == []


def test_a_file_system_without_locks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    outcome = fomoe("train", tiny)
    assert outcome.status == 0
    assert outcome.err.startswith(f"run.dir {tmp_path / 'run'} is on a file system without locks")
    assert not (tmp_path / "run" / runlock.LOCK_NAME).exists()


# -------------------------------------------------------------------- sites that share it, or not


def claims(
    folders: list[Path], mode: str, inside: Callable[[RunLock], Any] = lambda lock: None
) -> list[Any]:
    """Every site claims its folder: the folders that they got, or their errors."""

    def work(transport: Transport) -> Path:
        (site,) = transport.sites
        config = tiny_config({"num_sites": len(folders), "run.dir": str(folders[site])})
        with claim_run_dir(config, transport, mode) as (own, lock):
            inside(lock)
            gather(transport, lambda _: b"all are in")
            assert own.run.dir == str(lock.run_dir)
            return lock.run_dir

    return over_gloo(len(folders), work)


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite", "next-free"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_sites_of_one_run_are_let_in(tmp_path: Path, mode: str, shared: bool) -> None:
    folders = [tmp_path / ("run" if shared else f"{site}/run") for site in range(3)]
    assert all_good(claims(folders, mode)) == folders
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
@pytest.mark.parametrize("busy", [0, 2])
def test_one_folder_in_use_stops_all_sites(tmp_path: Path, mode: str, busy: int) -> None:
    folders = [tmp_path / f"{site}/run" for site in range(3)]
    with alive(folders[busy]):
        before = snapshot(tmp_path)
        errors = claims(folders, mode)
        for site, error in enumerate(errors):
            assert f"run.dir {folders[busy]} is in use by run 1234abcd" in str(error)
            assert str(error).startswith("run.dir" if site == busy else f"site {busy}: run.dir")
        assert snapshot(tmp_path) == before
    all_good(claims(folders, mode))


def test_next_free_is_free_at_every_site(tmp_path: Path) -> None:
    """One number for all: 1 is taken at site 0, 2 at site 1, and 3 by a run that is alive."""
    folders = [tmp_path / f"{site}/run" for site in range(3)]
    for name in ("0/run", "1/run-2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "notes.txt").touch()
    with alive(tmp_path / "2/run-3"):
        found = all_good(claims(folders, "next-free"))
    assert found == [tmp_path / f"{site}/run-4" for site in range(3)]


def test_runs_that_take_the_next_free_folder_at_once(tmp_path: Path) -> None:
    config = tiny_config({"run.dir": str(tmp_path / "run")})
    found: list[Path] = []
    together = threading.Barrier(4)

    def take() -> None:
        together.wait(30)
        with claim_run_dir(config, InMemoryTransport([0]), "next-free") as (_, lock):
            found.append(lock.run_dir)
            together.wait(30)

    errors: list[Any] = []
    threads = [threading.Thread(target=catch, args=(errors, take)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(path.name for path in found) == ["run", "run-2", "run-3", "run-4"]


def test_a_run_of_fewer_sites_refuses_and_replaces_all_of_a_larger_one(
    tiny: Path, tmp_path: Path
) -> None:
    """Parts and records of sites that are no more, and what a kill left of any file."""
    run = tmp_path / "run"
    save_part(run, 1, 7, {"x": torch.zeros(1)}, {})
    assert "already holds a run" in fomoe("train", tiny).err
    (run / "metrics.site7.jsonl").touch()
    (run / ".config.yaml.0123abcd.tmp").mkdir()
    (run / "mine.txt").touch()
    trained(tiny, "--overwrite")
    names = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert not [name for name in names if "site-7" in name or "site7" in name or "tmp" in name]
    assert "mine.txt" in names


def test_what_a_kill_left_of_a_record_is_removed_on_resume(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, "rounds=1")
    run = tmp_path / "run"
    names = ["config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json"]
    left = [run / f".{name}.0123abcd.tmp" for name in names]
    left.append(round_folder(run, 2) / ".site-1.safetensors.0123abcd.tmp")
    for folder in left:
        folder.mkdir(parents=True)
        (folder / ".tmpVNqIZD").touch()  # what the library of the tensors leaves
    trained(tiny, "--resume")
    assert not [path for path in left if path.exists()]


# ------------------------------------------------------------------------------------------ records


RECORD = b'{"kind": "step", "round": 0, "site": 1}\n'


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\0\0\0", b"[1]", b'{"kind": "step"}', b"{"])
def test_a_damaged_record_is_dropped_and_counted(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.site1.jsonl"
    path.write_bytes(damage + b"\n" + RECORD + damage + b"\n" + RECORD)
    metrics = Metrics(tmp_path, (1,), first_round=1)
    assert metrics.num_damaged == 2
    metrics.write([{"kind": "round", "round": 1, "site": 1}])
    metrics.close()
    assert path.read_bytes() == 2 * RECORD + b'{"kind": "round", "round": 1, "site": 1}\n'


def test_damaged_records_are_reported_on_resume(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, "rounds=1")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    outcome = fomoe("train", tiny, "--resume")
    assert outcome.status == 0, outcome.err
    assert f"{path}: damaged lines dropped: 1\n" in outcome.err


def test_a_site_that_shows_no_progress_warns_all_the_same(capsys: Any) -> None:
    progress = Progress(tiny_config(), num_local_sites=1, show=False)
    progress.say("nobody sees it")
    progress.warn("damaged")
    assert capsys.readouterr().err == "damaged\n"


def test_a_line_that_a_kill_cut_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(RECORD + b'{"kind": "st')
    metrics = Metrics(tmp_path, (0,), first_round=1)
    metrics.close()
    assert metrics.num_damaged == 0
    assert metrics.path.read_bytes() == RECORD
