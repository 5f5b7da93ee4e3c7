"""Checkpoints: whole or refused, and a resumed run that is bitwise the straight one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import MEASURED, fomoe, load_part, records, snapshot, trained, write_config
from safetensors.torch import load_file

from fomoe import checkpoint
from fomoe.checkpoint import round_folder, saved_rounds
from fomoe.errors import CheckpointError
from fomoe.load import load_config
from fomoe.training import train

TIMES = ("train_s", "sync_s")
BYTES = [
    f"{kind}_bytes_per_site_per_round{suffix}"
    for kind in ("payload", "wire")
    for suffix in ("", "_by_site")
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def parts(run_dir: Path, round_idx: int, num_sites: int = 3) -> list[tuple[Any, Any]]:
    """Tensors and small values of every site, without times and without the number of rounds."""
    found = []
    for site in range(num_sites):
        tensors, values = load_part(run_dir, round_idx, site)
        del values["config"]["rounds"], values["config"]["run"]
        for name in TIMES:
            del values["totals"][name]
        for kind in ("control", "evaluation"):  # talk of starting, and of the end of each part
            for counts in values["counts"].values():
                counts.pop(kind, None)
        found.append((tensors, values))
    return found


def assert_same_parts(first: Path, second: Path, round_idx: int) -> None:
    for (tensors, values), (others, other_values) in zip(
        parts(first, round_idx), parts(second, round_idx), strict=True
    ):
        assert values == other_values
        assert tensors.keys() == others.keys()
        different = [
            n for n, t in tensors.items() if t.dtype != others[n].dtype or not t.equal(others[n])
        ]
        assert not different


# ------------------------------------------------------------------------------------------ resume

RESUMED = {
    "adamw": [],
    "sgd": ["inner.optimizer=sgd", "inner.momentum=0.9", "inner.lr=0.1"],
    "sgd-plain": ["inner.optimizer=sgd", "inner.lr=0.1", "outer.momentum=0"],
    "bpe": ["data.tokenizer=bpe", "data.bpe_vocab_size=280"],
    "balance-both": ["router.balance=both", "router.bias_rate=0.05"],
    "execute-target": ["router.execute_target=0.5", "router.execute_rate=0.1"],
    "outer-adam": ["outer.optimizer=Adam", "outer.lr=0.01"],
    "outer-nadam": ["outer.optimizer=NAdam", "outer.lr=0.01"],
    "accumulation": ["inner.accumulation_steps=2", "model.tie_embeddings=true"],
    "tokens": ["sync.weight=tokens", "sync.single_holder=local", "placement.replication_factor=1"],
    "many-epochs": ["local_steps=9", "inner.batch_size=4"],
    "ddp": ["method=ddp"],
    "spes": ["method=spes"],
    "dense": ["method=dense"],
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_bitwise_the_straight_run(
    tiny: Path, tmp_path: Path, overrides: list[str]
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    common = [*overrides, "run.eval_merged_every=1"]
    whole = trained(tiny, *common, "rounds=4", f"run.dir={straight}")
    trained(tiny, *common, "rounds=1", f"run.dir={resumed}")
    for rounds in (2, 4):  # twice
        torch.manual_seed(rounds)  # whatever the process did before
        outcome = fomoe(
            "train", tiny, *common, f"rounds={rounds}", f"run.dir={resumed}", "--resume", "--json"
        )
        assert outcome.status == 0, outcome.err
        assert f"resuming after round {1 if rounds == 2 else 2}" in outcome.err
    assert saved_rounds(straight) == saved_rounds(resumed) == [4, 3, 2, 1]
    for round_idx in (1, 2, 3, 4):
        assert_same_parts(straight, resumed, round_idx)
    assert without_times(records(resumed)) == without_times(records(straight))
    for name in ("val_loss_merged", "val_loss_local", "tokens", "skipped_fraction", *BYTES):
        assert outcome.json[name] == whole[name], name


class Stop(Exception):
    """A crash in the middle of a round."""


def crash_in_round(monkeypatch: pytest.MonkeyPatch, round_idx: int, where: str) -> None:
    """Stop before a function of the rounds does its work in one round, as a kill would."""
    import fomoe.training

    kept = getattr(fomoe.training, where)
    calls = iter(range(round_idx + 1))

    def stop(*args: Any) -> Any:
        if next(calls) == round_idx:
            raise Stop
        return kept(*args)

    monkeypatch.setattr(fomoe.training, where, stop)


@pytest.mark.parametrize("where", ["synchronize", "evaluate_sites", "save_round"])
def test_a_crash_anywhere_in_a_round_costs_that_round_only(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    whole = trained(tiny, "rounds=3", f"run.dir={straight}")
    config = load_config(tiny, ["rounds=3", f"run.dir={crashed}"])
    with monkeypatch.context() as patch:
        crash_in_round(patch, 1, where)
        with pytest.raises(Stop):
            train(config, show=False)
    assert saved_rounds(crashed) == [1]
    left = records(crashed, "round")
    assert {row["round"] for row in left} == ({0, 1} if where == "save_round" else {0})
    again = trained(tiny, "rounds=3", f"run.dir={crashed}", "--resume")
    assert_same_parts(straight, crashed, 3)
    assert without_times(records(crashed)) == without_times(records(straight))
    for name in (*BYTES, "val_loss_merged", "evaluation_payload_bytes_per_site", "tokens"):
        assert again[name] == whole[name], name


def test_resume_of_a_finished_run_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    first = trained(tiny)
    before = snapshot(tmp_path / "run")
    again = trained(tiny, "--resume")
    after = snapshot(tmp_path / "run")
    assert {n: h for n, h in after.items() if n != "summary.json"} == {
        n: h for n, h in before.items() if n != "summary.json"
    }
    same = [n for n in first if "memory" not in n and "control" not in n and "evaluation" not in n]
    assert {n: again[n] for n in same} == {n: first[n] for n in same}


def test_only_rounds_and_run_may_change(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    saved = snapshot(tmp_path / "run" / "checkpoints")
    for override in ("seed=1", "inner.lr=0.02", "model.d_model=32", "outer.lr=0.6", "method=spes"):
        outcome = fomoe("train", tiny, override, "rounds=3", "--resume")
        assert outcome.status != 0
        assert override.partition("=")[0] in outcome.err
        assert (
            "only rounds, inner.schedule_steps, inner.parallel and run.* may change" in outcome.err
        )
        assert snapshot(tmp_path / "run" / "checkpoints") == saved
    trained(tiny, "rounds=3", "run.log_every=3", "run.keep_checkpoints=4", "--resume")


def test_resume_refuses_another_text(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    text = tmp_path / "texts" / "0003.txt"
    text.write_text(text.read_text() + "more")
    outcome = fomoe("train", tiny, "rounds=3", "--resume")
    assert outcome.status != 0
    assert "data split" in outcome.err


def test_fewer_rounds_than_were_done_are_refused(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    before = snapshot(tmp_path / "run")
    outcome = fomoe("train", tiny, "rounds=1", "--resume")
    assert outcome.status == 2
    assert "rounds 1 is below the 2 rounds" in outcome.err
    assert snapshot(tmp_path / "run") == before


def test_without_a_checkpoint_resume_says_so_and_starts(tiny: Path, tmp_path: Path) -> None:
    outcome = fomoe("train", tiny, "--resume", "--json")
    assert outcome.status == 0
    assert "holds no run; starting at round 0" in outcome.err
    other = trained(tiny, f"run.dir={tmp_path / 'other'}")
    assert outcome.json["val_loss_merged"] == other["val_loss_merged"]
    assert_same_parts(tmp_path / "run", tmp_path / "other", 2)


# ---------------------------------------------------------------------------------- damaged parts


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def empty_manifest(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))


def other_round(path: Path) -> None:
    """All of another round's part, manifest included."""
    for name in ("site-1.safetensors", "site-1.json", "site-1.manifest.json"):
        shutil.copy(path.parent.parent / "round-000001" / name, path.parent / name)


DAMAGE = {
    "torn tensors": ("site-1.safetensors", tear, "site-1.safetensors is torn or was altered"),
    "altered byte": ("site-2.safetensors", alter, "site-2.safetensors is torn or was altered"),
    "altered values": ("site-0.json", alter, "site-0.json is torn or was altered"),
    "missing tensors": ("site-0.safetensors", Path.unlink, "site-0.safetensors is missing"),
    "missing manifest": ("site-1.manifest.json", Path.unlink, "site-1.manifest.json is missing"),
    "torn manifest": ("site-1.manifest.json", tear, "manifest is not readable"),
    "empty manifest": ("site-1.manifest.json", empty_manifest, "manifest does not name its files"),
    "another round's": ("site-1.manifest.json", other_round, "its manifest is of round 1, site 1"),
}


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(
    tiny: Path, tmp_path: Path, name: str, damage: Any, reason: str
) -> None:
    run, good = tmp_path / "run", tmp_path / "good"
    trained(tiny, "rounds=3")
    shutil.copytree(run, good)
    damage(round_folder(run, 3) / name)
    outcome = fomoe("train", tiny, "rounds=3", "--resume")
    assert outcome.status == 0, outcome.err
    refused = [line for line in outcome.err.splitlines() if "refused" in line]
    assert len(refused) == 1
    assert refused[0].startswith("checkpoint of round 3 refused: site ")
    assert reason in refused[0]
    assert "resuming after round 2" in outcome.err
    assert_same_parts(run, good, 3)
    assert without_times(records(run)) == without_times(records(good))


def test_one_site_missing_makes_the_round_incomplete(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    checkpoint.remove_parts(tmp_path / "run", 2, [1])
    outcome = fomoe("train", tiny, "rounds=3", "--resume")
    assert outcome.status == 0
    assert "checkpoint of round 2 refused: site 1: site-1.manifest.json is missing" in outcome.err
    assert "resuming after round 1" in outcome.err


def test_leftover_temporary_files_are_no_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """What a kill during a save leaves behind."""
    trained(tiny)
    for round_idx in (2, 3):
        folder = round_folder(tmp_path / "run", round_idx)
        folder.mkdir(exist_ok=True)
        for name in (".site-0.safetensors.tmp", ".site-1.json.tmp"):
            (folder / name).write_bytes(b"half of")
    outcome = fomoe("train", tiny, "rounds=4", "run.keep_checkpoints=2", "--resume")
    assert outcome.status == 0
    assert "resuming after round 2" in outcome.err
    assert saved_rounds(tmp_path / "run") == [4, 3]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_save_that_fails_leaves_the_earlier_ones(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny, "rounds=1")
    saved = snapshot(tmp_path / "run" / "checkpoints")

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    outcome = fomoe("train", tiny, "--resume")
    assert outcome.status == 1
    assert "checkpoint of round 2 could not be written" in outcome.err
    assert "No space left on device" in outcome.err
    after = snapshot(tmp_path / "run" / "checkpoints")
    assert after == saved
    monkeypatch.undo()
    trained(tiny, "--resume")


# ------------------------------------------------------------------------- what is in a checkpoint


def test_a_part_holds_all_state_of_its_site_and_no_more(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    residents = {}
    for site in range(3):
        tensors, values = load_part(tmp_path / "run", 2, site)
        names = {n.removeprefix("param/") for n in tensors if n.startswith("param/")}
        kinds = {name.split("/")[0] for name in tensors}
        assert kinds == {"param", "anchor", "inner", "outer", "router", "rng", "probe"}
        for prefix in ("inner/exp_avg/", "inner/exp_avg_sq/", "inner/step/"):
            assert {n.removeprefix(prefix) for n in tensors if n.startswith(prefix)} == names
        for kind in ("anchor", "outer/momentum_buffer"):
            state = {n: t for n, t in tensors.items() if n.startswith(kind + "/")}
            assert sum(t.numel() for t in state.values()) == sum(
                tensors[f"param/{name}"].numel() for name in names
            )
            assert all(t.dtype == torch.float32 for t in state.values())
        assert any(t.abs().max() > 0 for n, t in tensors.items() if n.startswith("outer/"))
        residents[site] = {name for name in names if ".experts." in name}
        assert values["step_idx"] == 4
        assert values["data"] == {"position": 8}
        assert values["config"]["num_sites"] == 3
    everything = set.union(*residents.values())
    assert all(residents[site] < everything for site in range(3))
    assert {sum(name in held for held in residents.values()) for name in everything} == {2}


def test_after_a_sync_parameters_are_the_anchor(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    for site in range(3):
        tensors, _ = load_part(tmp_path / "run", 2, site)
        flat = {
            k: [t for n, t in sorted(tensors.items()) if n.startswith(k)]
            for k in ("anchor/", "param/")
        }
        assert (
            torch.cat([t.ravel() for t in flat["anchor/"]])
            .sort()
            .values.equal(torch.cat([t.ravel() for t in flat["param/"]]).sort().values)
        )


# --------------------------------------------------------------------------------- which are kept


@pytest.mark.parametrize(
    ("every", "keep", "rounds"),
    [(1, 2, [5, 4]), (1, 3, [5, 4, 3]), (2, 9, [5, 4, 2]), (3, 2, [5, 3]), (0, 2, [5])],
)
def test_how_often_and_how_many(
    tiny: Path, tmp_path: Path, every: int, keep: int, rounds: list[int]
) -> None:
    trained(tiny, "rounds=5", f"run.checkpoint_every={every}", f"run.keep_checkpoints={keep}")
    assert saved_rounds(tmp_path / "run") == rounds
    for round_idx in rounds:
        assert not any(checkpoint.check_part(tmp_path / "run", round_idx, s) for s in range(3))


def test_an_old_part_that_cannot_be_removed_ends_no_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Path.unlink

    def unlink(path: Path, **options: bool) -> None:
        if path.name == "site-1.json":
            raise PermissionError(13, "Permission denied", str(path))
        kept(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    outcome = fomoe("train", tiny, "rounds=3", "run.keep_checkpoints=2")
    assert outcome.status == 0, outcome.err
    part = round_folder(tmp_path / "run", 1) / "site-1.json"
    assert f"{part} cannot be removed: Permission denied\n" in outcome.err


# ------------------------------------------------------------------------------- the run's folder


def test_a_run_is_never_started_over_by_accident(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    before = snapshot(tmp_path)
    outcome = fomoe("train", tiny)
    assert outcome.status == 1
    for hint in ("--resume", "--overwrite", "--next-free"):
        assert hint in outcome.err
    assert snapshot(tmp_path) == before


def test_next_free_takes_a_new_folder(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    before = snapshot(tmp_path / "run")
    for number in (2, 3):
        summary = trained(tiny, "--next-free")
        assert summary["run_dir"] == str(tmp_path / f"run-{number}")
        assert saved_rounds(tmp_path / f"run-{number}") == [2, 1]
    assert snapshot(tmp_path / "run") == before


def test_overwrite_replaces_the_run_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, "rounds=3")
    assert fomoe("merge", tmp_path / "run").status == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    trained(tiny, "--overwrite", "seed=1", "rounds=1")
    names = {name.split("/")[0] for name in snapshot(tmp_path / "run")}
    assert names == {"notes.txt", "config.yaml", "metrics.jsonl", "summary.json", "checkpoints"}
    assert saved_rounds(tmp_path / "run") == [1]
    assert {row["round"] for row in records(tmp_path / "run")} == {0}
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "wrong", ["data.source=/no/such.txt", "outer.options.foo=1", "data.seq_len=4000"]
)
def test_overwrite_with_a_mistake_loses_nothing(tiny: Path, tmp_path: Path, wrong: str) -> None:
    trained(tiny)
    before = snapshot(tmp_path / "run")
    assert fomoe("train", tiny, "--overwrite", wrong).status != 0
    assert snapshot(tmp_path / "run") == before


def test_a_new_run_trains_its_own_bpe(tiny: Path, tmp_path: Path) -> None:
    """A tokenizer left in the folder must not decide the tokens of another experiment."""
    bpe = ["data.tokenizer=bpe", "data.bpe_vocab_size=280"]
    trained(tiny, *bpe)
    first = (tmp_path / "run" / "tokenizer.json").read_bytes()
    for flags in (["data.bpe_vocab_size=270", "--overwrite"], ["seed=3", "--overwrite"]):
        trained(tiny, *bpe, *flags)
        assert (tmp_path / "run" / "tokenizer.json").read_bytes() != first


# ------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("overrides", [[], ["placement.replication_factor=1"], ["method=spes"]])
def test_merge_takes_every_parameter_from_a_holder(
    tiny: Path, tmp_path: Path, overrides: list[str]
) -> None:
    trained(tiny, *overrides)
    outcome = fomoe("merge", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    path = tmp_path / "run" / "merged" / "model.safetensors"
    assert outcome.out.strip() == str(path)
    merged = load_file(path)
    found: set[str] = set()
    for site in range(3):
        tensors, _ = load_part(tmp_path / "run", 2, site)
        own = {n.removeprefix("param/"): t for n, t in tensors.items() if n.startswith("param/")}
        assert all(merged[name].equal(tensor) for name, tensor in own.items())
        found |= set(own)
    assert merged.keys() == found
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())["params_total"]
    assert sum(tensor.numel() for tensor in merged.values()) == whole
    assert load_config(path.with_name("config.yaml")) == load_config(
        tmp_path / "run" / "config.yaml"
    )


def test_merge_takes_a_round_and_a_folder(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    fomoe("merge", tmp_path / "run", "--round", 1, "--out", tmp_path / "one")
    fomoe("merge", tmp_path / "run", "--round", 2, "--out", tmp_path / "two")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert not all(one[name].equal(two[name]) for name in one)
    first, _ = load_part(tmp_path / "run", 1, 0)
    assert all(
        one[n.removeprefix("param/")].equal(t) for n, t in first.items() if n[:6] == "param/"
    )


def test_merge_skips_an_incomplete_round_and_refuses_none(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    run = tmp_path / "run"
    checkpoint.remove_parts(run, 2, [2])
    assert fomoe("merge", run, "--out", tmp_path / "out").status == 0
    first, _ = load_part(run, 1, 0)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        merged[n.removeprefix("param/")].equal(t) for n, t in first.items() if n[:6] == "param/"
    )
    for words, reason in (
        ([run, "--round", 2], "site 2: site-2.manifest.json is missing"),
        ([run, "--round", 7], "no checkpoint of round 7"),
        ([tmp_path / "nowhere"], "is not a run's folder"),
        ([tmp_path / "texts"], "holds no complete checkpoint"),
    ):
        outcome = fomoe("merge", *words)
        assert outcome.status == 1
        assert outcome.err.startswith("fomoe: error: ")
        assert outcome.err.count("\n") == 1
        assert reason in outcome.err
    alter(round_folder(run, 1) / "site-1.safetensors")
    outcome = fomoe("merge", run)
    assert outcome.status == 1
    assert "complete checkpoint" in outcome.err


def test_a_part_names_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    with pytest.raises(CheckpointError, match=r"round-000009, site 0: .*manifest.json is missing"):
        load_part(tmp_path / "run", 9, 0)
