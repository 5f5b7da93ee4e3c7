"""Calibration: recovers a known link from runs made with it, and says what it cannot know."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fomoe.cli import main as simulate
from fomoe.errors import ConfigError
from fomoe.load import build_config
from fomoe.planning import plan_run
from fomoe.segments import sync_traffic
from fomoe_sim import calibrate
from fomoe_sim.calibrate import Calibration, fit, load_calibration, split_rounds
from fomoe_sim.runs import Round, read_run, read_runs

STEP_S, FIXED_S, LINK_BPS = 0.1, 0.07, 80e6
TWO_SITES = {"num_sites": 2, "placement": {"replication_factor": 1}}


def write_run(folder, *, local_steps, wire_bytes, rounds=9, noise=0.0, syncs=1, config=None):
    """A run over a known link: two sites, of which site 1 is slower and so waits less."""
    folder.mkdir()
    random = np.random.default_rng(local_steps)
    lines = {0: [{"kind": "step", "round": 0, "step": 0, "site": 0, "loss": 5.5}], 1: []}
    for index in range(rounds):
        slow = STEP_S * local_steps * (1 + noise * random.standard_normal())
        moving = 8 * wire_bytes / LINK_BPS * (1 + noise * random.standard_normal())
        sync = FIXED_S * syncs + moving
        if index == 0:
            sync *= 3  # a cold first round
        for site, train in ((0, 0.8 * slow), (1, slow)):
            lines[site].append(
                {
                    "kind": "round",
                    "round": index,
                    "site": site,
                    "train_s": train,
                    "sync_s": slow + sync - train,
                    "wire_bytes": wire_bytes,
                    "payload_bytes": wire_bytes,
                    "local_steps": local_steps,
                }
            )
    for site, name in enumerate(("metrics.jsonl", "metrics.site1.jsonl")):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines[site]))
    (folder / "config.yaml").write_text((config or build_config(TWO_SITES)).to_yaml())
    return str(folder)


def run_command(*words):
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return calibrate.run(parser.parse_args(words))


# -------------------------------------------------------------------------------------------- fits


def test_two_payloads_separate_fixed_cost_and_bandwidth(tmp_path):
    runs = [
        write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000),
        write_run(tmp_path / "b", local_steps=32, wire_bytes=4_000_000),
    ]
    found = fit(read_runs(runs), [], bandwidth_bps=100e6)
    assert found.step_time_s == pytest.approx(STEP_S)
    assert found.sync_fixed_s == pytest.approx(FIXED_S)
    assert found.effective_bps == pytest.approx(LINK_BPS)
    assert found.link_efficiency == pytest.approx(0.8)
    assert found.separated
    assert found.note == ""
    assert found.round_error is None


def test_a_held_out_run_of_another_h_and_payload_is_predicted(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000, noise=0.05),
        write_run(tmp_path / "b", local_steps=32, wire_bytes=4_000_000, noise=0.05),
    ]
    other = write_run(tmp_path / "c", local_steps=16, wire_bytes=9_000_000, noise=0.05)
    assert run_command(*runs, "--hold-out", other) == 0
    found = load_calibration(tmp_path / "a" / "calibration.json")
    assert found.held_out == other
    assert found.held_out_rounds == 9
    assert found.round_error < 0.10
    assert found.sync_error < 0.15
    assert "wrote" in capsys.readouterr().out
    assert found.step_time_s == pytest.approx(0.1, rel=0.1)
    assert found.sync_s(9_000_000) == pytest.approx(0.07 + 0.9, rel=0.15)


def test_one_payload_is_not_separated_and_says_so(tmp_path):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    fitted, held_out = split_rounds(read_run(run))
    assert [r.index for r in held_out] == [6, 7, 8]
    found = fit(fitted, held_out)
    assert not found.separated
    assert found.sync_fixed_s == 0.0
    assert "cannot be told from the bandwidth" in found.note
    # All of the sync time counts as bandwidth, so the same payload is still predicted.
    assert found.sync_s(1_000_000) == pytest.approx(FIXED_S + 8e6 / LINK_BPS)
    assert found.round_error == pytest.approx(0.0, abs=1e-9)


def test_a_run_that_syncs_every_step_pays_the_fixed_cost_every_step(tmp_path):
    config = build_config({"method": "ddp", "num_sites": 2, "placement": {}})
    runs = [
        write_run(tmp_path / "a", local_steps=8, wire_bytes=8_000_000, syncs=8, config=config),
        write_run(tmp_path / "b", local_steps=8, wire_bytes=2_000_000),
    ]
    rounds = read_runs(runs)
    assert {r.num_syncs for r in rounds if r.run == runs[0]} == {8}
    found = fit(rounds, [])
    assert found.sync_fixed_s == pytest.approx(FIXED_S)
    assert found.effective_bps == pytest.approx(LINK_BPS)


def rounds_of(flops, step_s):
    """Three rounds whose steps execute so many FLOPs and take so long."""
    return [
        Round(
            run=f"{flops}",
            index=index,
            local_steps=4,
            num_syncs=1,
            train_s=4 * step_s,
            sync_s=1.0,
            wire_bytes=1000,
            payload_bytes=1000,
            step_flops=flops,
            planned_payload_bytes=1000,
        )
        for index in range(3)
    ]


def test_steps_of_different_work_separate_their_fixed_part():
    """A run of fewer executed assignments is predicted from its FLOPs, not at the same time."""
    found = fit(rounds_of(2e9, 0.3) + rounds_of(6e9, 0.5), rounds_of(4e9, 0.4))
    assert found.step_time_s == pytest.approx(0.5)
    assert found.step_flops == 6e9
    assert found.step_fixed_s == pytest.approx(0.2)
    assert found.step_s(4e9) == pytest.approx(0.4)
    assert found.round_error == pytest.approx(0, abs=1e-6)


def test_steps_of_equal_work_scale_with_it():
    found = fit(rounds_of(2e9, 0.3), [])
    assert found.step_fixed_s == 0
    assert found.step_s(1e9) == pytest.approx(0.15)


def test_a_link_too_fast_to_be_seen_has_no_bandwidth(tmp_path):
    runs = [
        write_run(tmp_path / "a", local_steps=8, wire_bytes=10),
        write_run(tmp_path / "b", local_steps=8, wire_bytes=1_000_000),
    ]
    rounds = read_runs(runs)
    backwards = [
        type(r)(**{**vars(r), "wire_bytes": 2_000_000 if r.wire_bytes == 10 else 10})
        for r in rounds
    ]
    found = fit(backwards, [], bandwidth_bps=1e9)
    assert found.effective_bps is None
    assert found.link_efficiency is None
    assert "does not grow" in found.note
    assert found.sync_s(5_000_000) == found.sync_fixed_s > 0


def test_planned_payload_is_compared_with_the_counted_one(tmp_path):
    config = build_config(
        {
            "num_sites": 2,
            "model": {"num_layers": 2, "num_experts": 4, "d_model": 32, "expert_ffn_dim": 16},
            "placement": {"replication_factor": 1},
        }
    )
    plan = plan_run(config).segment_plan
    payload = sync_traffic(plan, 0).payload
    exact = write_run(tmp_path / "a", local_steps=8, wire_bytes=payload, config=config)
    off = write_run(tmp_path / "b", local_steps=8, wire_bytes=payload + 4, config=config)
    assert fit(*split_rounds(read_run(exact))).payload_error_bytes == 0
    assert fit(*split_rounds(read_run(off))).payload_error_bytes == 4


# ----------------------------------------------------------------------------------------- reading


def test_a_round_is_that_of_its_slowest_site(tmp_path):
    first = read_run(write_run(tmp_path / "a", local_steps=10, wire_bytes=1_000_000))[1]
    assert first.train_s == pytest.approx(1.0)
    assert first.sync_s == pytest.approx(FIXED_S + 0.1)
    assert first.round_s == pytest.approx(1.17)


def test_a_repeated_round_counts_as_it_ran_last_and_a_torn_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "a", local_steps=10, wire_bytes=1_000_000, rounds=2)
    path = tmp_path / "a" / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[-1]) | {"train_s": 2.0, "sync_s": 0.5}
    path.write_text(path.read_text() + json.dumps(again) + '\n{"kind": "rou')
    rounds = read_run(run)
    assert len(rounds) == 2
    assert rounds[-1].train_s == 2.0


def test_a_site_whose_records_are_missing_is_named(tmp_path):
    config = build_config({"method": "ddp", "num_sites": 2, "placement": {}})
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000, config=config)
    assert "metrics.site" not in fit(read_run(run), []).note
    (tmp_path / "a" / "metrics.site1.jsonl").unlink()
    assert "without metrics.site1.jsonl in the folder, waiting" in fit(read_run(run), []).note


def test_files_of_a_larger_run_that_was_replaced_are_left_out(tmp_path):
    config = build_config({"method": "ddp", "num_sites": 2, "placement": {}})
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000, config=config)
    expected = read_run(run)
    record = json.loads((tmp_path / "a" / "metrics.site1.jsonl").read_text().splitlines()[0])
    for site, index in ((2, 0), (1, 9)):
        old = record | {"site": site, "round": index, "train_s": 99.0}
        with (tmp_path / "a" / f"metrics.site{site}.jsonl").open("a") as file:
            file.write(json.dumps(old) + "\n")
    assert read_run(run) == expected


# --------------------------------------------------------------------------------------- real runs

REAL = """
num_sites: 2
local_steps: 2
rounds: 6
model: {num_layers: 2, d_model: 32, num_heads: 2, num_experts: 4, expert_ffn_dim: 32}
placement: {capacity: [4, 1]}
inner: {batch_size: 1}
data: {source: text.txt, seq_len: 32, held_out_sequences: 2}
run: {checkpoint_every: 0, eval_every: 0}
"""


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """One process per site, on the loopback."""
    pytest.importorskip("fomoe.training", reason="the trainer is not part of this checkout")
    folder = tmp_path_factory.mktemp("real")
    (folder / "run.yaml").write_text(REAL)
    words = (" ".join(f"word{(i * j) % 97}" for j in range(200)) for i in range(60))
    (folder / "text.txt").write_text("\n\n".join(words))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launched}
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "fomoe", "train", "run.yaml", "run.dir=run"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_rounds_of_a_real_run_have_all_sites_and_the_planned_payload(real_run):
    rounds = read_run(real_run)
    assert [r.index for r in rounds] == list(range(6))
    for r in rounds:
        assert r.missing_sites == ()
        assert r.payload_bytes == r.planned_payload_bytes > 0
        assert r.wire_bytes > 0
    slowest = [0.0] * 6
    for path in real_run.glob("metrics*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            if record["kind"] == "round":
                slowest[record["round"]] = max(slowest[record["round"]], record["train_s"])
    assert [r.train_s for r in rounds] == slowest


def test_a_real_run_is_calibrated_and_its_last_rounds_predicted(real_run, tmp_path, capsys):
    out = tmp_path / "calibration.json"
    assert run_command(str(real_run), "--out", str(out)) == 0
    found = load_calibration(out)
    assert (found.num_rounds, found.held_out_rounds) == (3, 2), "the first is not fitted"
    assert found.payload_error_bytes == 0
    assert found.step_time_s > 0
    assert found.effective_bps > 0
    assert found.round_error < 10, "a busy machine is noisy; ten times off is a defect"
    capsys.readouterr()
    config = str(real_run / "config.yaml")
    assert simulate(["project", "--config", config, "--calibration", str(out), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    counted = json.loads((real_run / "summary.json").read_text())
    by_site = "payload_bytes_per_site_per_round_by_site"
    assert row[by_site] == counted[by_site]
    assert row["step_time_s"] == pytest.approx(found.step_time_s), "that of the slowest site"
    assert row["round_time_s"] > 2 * found.step_time_s


# ---------------------------------------------------------------------------------------- refusals


def edit_records(run, change):
    """Rewrite the round records of a run, of all sites."""
    for path in sorted(Path(run).glob("metrics*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records = [change(r) if r["kind"] == "round" else r for r in records]
        path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r | {"kind": "step"}, "has no round records"),
        (lambda r: r | {"wire_bytes": 0}, "sent no bytes between sites"),
        (lambda r: r | {"train_s": None}, r"metrics.jsonl:2 train_s None must be a number"),
        (lambda r: r | {"sync_s": -1.0}, r"sync_s -1.0 must be a number of at least 0"),
        (lambda r: r | {"local_steps": 0}, "local_steps 0 must be above 0"),
        (lambda r: {k: v for k, v in r.items() if k != "wire_bytes"}, "wire_bytes None"),
    ],
)
def test_records_that_cannot_be_fitted_are_refused(tmp_path, change, words):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    edit_records(run, change)
    with pytest.raises(ConfigError, match=words):
        run_command(run)
    assert not (tmp_path / "a" / "calibration.json").exists()


def test_a_proxy_run_is_refused(tmp_path):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    own, other = (tmp_path / "a" / name for name in ("metrics.jsonl", "metrics.site1.jsonl"))
    own.write_text(own.read_text() + other.read_text())
    with pytest.raises(ConfigError, match="is a proxy run, whose sites exchange in memory"):
        run_command(run)


@pytest.mark.parametrize("damage", [b"nonsense", b"\xff\xfe", b"\0" * 9, b"[1, 2]"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.site1.jsonl"])
def test_a_damaged_line_costs_its_round_and_is_counted(tmp_path, capsys, name, damage):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    whole = read_run(run)
    path = tmp_path / "a" / name
    *earlier, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(earlier[:-1]) + damage + b"\n" + last)  # the record of round 7
    assert read_run(run) == whole[:7] + whole[8:]
    capsys.readouterr()
    run_command(run)
    line = len(earlier)
    assert capsys.readouterr().err == (
        f"{path}: damaged lines left out: 1, the first is line {line}\n"
    )


def test_records_that_are_all_damaged_are_refused(tmp_path):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="has no round records"):
        read_run(run)


def test_wrong_arguments_are_refused(tmp_path):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        run_command(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="is also a run to fit"):
        run_command(run, "--hold-out", run)
    with pytest.raises(ConfigError, match=r"--bandwidth 1e\+06 bit/s is below the .* moved"):
        run_command(run, "--bandwidth", "1Mbit")
    with pytest.raises(ConfigError, match="--bandwidth"):
        run_command(run, "--bandwidth", "0")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_command(run, "--out", str(tmp_path / "no" / "folder.json"))


def test_a_calibration_file_round_trips_and_refuses_others(tmp_path):
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000)
    out = tmp_path / "c.json"
    assert run_command(run, "--out", str(out), "--bandwidth", "1Gbit") == 0
    found = load_calibration(out)
    assert isinstance(found, Calibration)
    assert found.runs == (run,)
    assert found.link_efficiency == found.effective_bps / 1e9
    tree = json.loads(out.read_text())
    for broken, words in (
        ("{", "not a readable JSON"),
        (json.dumps(tree | {"extra": 1}), "--calibration extra is not an option"),
        (json.dumps({"step_time_s": 1}), "--calibration runs is needed"),
        (json.dumps(tree | {"step_time_s": "fast"}), "step_time_s fast must be a number"),
        (json.dumps(tree | {"sync_fixed_s": -1}), "sync_fixed_s -1 must not be negative"),
        (json.dumps(tree | {"step_time_s": 0}), "step time or bandwidth of 0"),
    ):
        out.write_text(broken)
        with pytest.raises(ConfigError, match=words):
            load_calibration(out)
    with pytest.raises(ConfigError, match="does not exist"):
        load_calibration(tmp_path / "none.json")


def test_a_slow_first_round_is_not_fitted_and_large_errors_are_told(tmp_path, capsys):
    """Also with few rounds, in which a median does not help."""
    run = write_run(tmp_path / "a", local_steps=8, wire_bytes=1_000_000, rounds=3)
    found = fit(read_run(run), [])
    assert found.num_rounds == 2
    assert found.sync_s(1_000_000) == pytest.approx(FIXED_S + 8e6 / LINK_BPS)
    only = write_run(tmp_path / "b", local_steps=8, wire_bytes=1_000_000, rounds=1)
    assert fit(read_run(only), []).num_rounds == 1
    assert run_command(run, "--hold-out", only) == 0
    assert "calibrate from 8 rounds or more" in capsys.readouterr().out
