"""The commands: what they print and write, and that planned and measured figures agree."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_cli import fomoe, records, snapshot, trained, write_config

from fomoe import __version__
from fomoe.config import METHODS
from fomoe.load import load_config

DOCS = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
SUMMARY_KEYS = {
    *("method", "num_sites", "replication_factor", "local_steps", "rounds", "tokens"),
    *("params_total", "params_per_site", "val_loss_merged", "val_loss_local"),
    *("skipped_fraction", "executed_fraction", "tokens_per_s"),
    *("peak_memory_bytes", "peak_accelerator_memory_bytes"),
    *("payload_bytes_per_site_per_round", "wire_bytes_per_site_per_round"),
    *("ratio_vs_ddp", "ratio_vs_diloco"),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


# Three sites have copies of two experts each; of two holders per copy there is no set.
FITS_ALL = ("placement.replication_factor=1", "model.num_experts=6")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All methods once: the folder of their runs, and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    outcome = fomoe("compare", write_config(folder), "--methods", ",".join(METHODS), *FITS_ALL)
    assert outcome.status == 0, outcome.err
    assert [w for w in outcome.err.split("\n") if w[:3] == "== "] == [f"== {m}" for m in METHODS]
    return folder / "run", outcome.out


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


# ----------------------------------------------------------------------------------------- summary


def test_the_summary_is_complete_and_consistent(tiny: Path, tmp_path: Path) -> None:
    printed = trained(tiny)
    summary = summary_of(tmp_path / "run")
    assert printed == summary
    assert set(summary) >= SUMMARY_KEYS
    for name, values in summary.items():
        if name.endswith("_by_site"):
            scalar = summary[name.removesuffix("_by_site")]
            expected = sum(values) if name == "tokens_by_site" else sum(values) / 3
            assert len(values) == 3
            assert scalar == pytest.approx(expected)
    assert summary["tokens"] == 3 * 2 * 2 * 2 * 16  # sites, rounds, steps, sequences, tokens
    assert len(summary["val_loss_local"]) == 3
    assert summary["val_loss_merged"] < math.log(257)
    assert summary["skipped_fraction"] > 0
    assert summary["executed_fraction"] >= 1 - summary["skipped_fraction"]  # at_least_one
    assert summary["tokens_per_s"] > 0
    assert summary["peak_memory_bytes"] > sum(summary["memory_bytes_per_site_by_site"])
    assert summary["peak_accelerator_memory_bytes"] == 0 or torch.cuda.is_available()
    assert summary["control_payload_bytes_per_site"] > 0
    last = records(tmp_path / "run", "round")[-3:]
    assert summary["val_loss_local"] == [row["val_loss_local"] for row in last]
    assert summary["val_loss_merged"] == records(tmp_path / "run", "merged")[-1]["val_loss_merged"]


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_what_was_measured(compared: tuple[Path, str], method: str) -> None:
    run_dir = compared[0] / method
    outcome = fomoe("train", run_dir / "config.yaml", "--dry-run", "--json")
    assert outcome.status == 0, outcome.err
    summary = summary_of(run_dir)
    assert {name: summary[name] for name in outcome.json} == outcome.json
    assert SUMMARY_KEYS - set(outcome.json) == {
        "val_loss_merged",
        "val_loss_local",
        "skipped_fraction",
        "executed_fraction",
        "tokens_per_s",
        "peak_memory_bytes",
        "peak_accelerator_memory_bytes",
    }


# ----------------------------------------------------------------------------------------- dry run


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    outcome = fomoe("train", tiny, "--dry-run", "rounds=9")
    assert outcome.status == 0, outcome.err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()
    resolved = yaml.safe_load(outcome.out[: re.search(r"^\s+Resident", outcome.out, re.M).start()])  # type: ignore[union-attr]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(resolved))
    assert load_config(tmp_path / "again.yaml") == load_config(tiny, ["rounds=9"])
    planned = fomoe("train", tiny, "--dry-run", "--json").json
    for name in ("params_per_site_by_site", "params_shared_per_site_by_site"):
        for count in planned[name]:
            assert f"{count:,}" in outcome.out
    assert f"{planned['params_total']:,} parameters" in outcome.out
    for name in ("ratio_vs_diloco", "ratio_vs_ddp"):
        assert f"{planned[name]:.2f}x" in outcome.out


def test_the_ratios_are_of_full_replicas(tiny: Path) -> None:
    def plan(*words: str) -> dict[str, Any]:
        return fomoe("train", tiny, "--dry-run", "--json", *words).json

    ours, diloco, ddp = plan(), plan("method=diloco"), plan("method=ddp")
    name = "payload_bytes_per_site_per_round"
    assert diloco[name] == 4 * diloco["params_total"]
    assert ddp[name] == 2 * diloco[name]  # two steps per round
    assert ours["ratio_vs_diloco"] == diloco[name] / ours[name]
    assert ours["ratio_vs_ddp"] == ddp[name] / ours[name]
    assert diloco["ratio_vs_diloco"] == ddp["ratio_vs_ddp"] == 1
    alone = plan("method=single")
    assert alone[name] == 0
    assert alone["ratio_vs_ddp"] is alone["ratio_vs_diloco"] is None


def test_the_54m_plan_is_the_papers() -> None:
    """45.44 there is 32 steps times the rounded 1.42."""
    config = Path(__file__).resolve().parent.parent / "configs" / "proxy_54m.yaml"
    planned = fomoe("train", config, "--dry-run", "--json").json
    assert (planned["num_sites"], planned["replication_factor"]) == (4, 2)
    assert planned["local_steps"] == 32
    assert planned["params_total"] == pytest.approx(55.7e6, rel=1e-3)
    assert round(planned["ratio_vs_diloco"], 2) == 1.42
    assert planned["ratio_vs_ddp"] == 32 * planned["ratio_vs_diloco"]
    assert planned["ratio_vs_ddp"] == pytest.approx(45.44, rel=1e-3)


# ----------------------------------------------------------------------------------------- metrics


def documented(section: str) -> set[str]:
    """Names in backquotes in a part of docs/metrics.md."""
    text = DOCS.read_text().partition(section)[2]
    return set(re.findall(r"`(\w+)`", re.split(r"\n\*\*`kind|\n## ", text)[0]))


def test_records_are_strict_json_with_the_documented_fields(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, "rounds=3", "run.eval_merged_every=2", "run.eval_every=2")
    rows = records(tmp_path / "run")
    for kind in ("step", "round", "merged"):
        own = [row for row in rows if row["kind"] == kind]
        assert all(set(row) == set(own[0]) for row in own)
        assert set(own[0]) - {"kind", "round"} <= documented(f"**`kind: {kind}`**")
    steps = [(row["round"], row["step"], row["site"]) for row in rows if row["kind"] == "step"]
    assert sorted(steps) == [(i // 2, i, site) for i in range(6) for site in range(3)]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert [(r["round"], r["site"]) for r in rounds] == [(i, s) for i in range(3) for s in range(3)]
    assert {r["round"] for r in rounds if r["val_loss_local"] is None} == {0}
    merged = [row for row in rows if row["kind"] == "merged"]
    assert [row["round"] for row in merged] == [1, 2]
    held_out_tokens = 6 * 16
    for row in merged:
        assert set(row) == {"kind", "round", "val_loss_merged", "load"}
        assert [sum(load) for load in row["load"]] == [2 * held_out_tokens] * 2  # top-2, no skip


def test_the_summarys_fields_are_documented(tiny: Path) -> None:
    names = {name.removesuffix("_by_site") for name in trained(tiny)}
    text = DOCS.read_text().partition("## `summary.json`")[2]
    patterns = [name.replace("*", r"\w+") for name in re.findall(r"`([\w*]+)`", text)]
    assert not [n for n in names if not any(re.fullmatch(p, n) for p in patterns)]


def test_round_records_add_up(tiny: Path, tmp_path: Path) -> None:
    summary = trained(tiny)
    steps, rounds = records(tmp_path / "run", "step"), records(tmp_path / "run", "round")
    for row in rounds:
        own = [s for s in steps if (s["round"], s["site"]) == (row["round"], row["site"])]
        assert row["tokens"] == sum(s["tokens"] for s in own)
        for name in ("skipped_fraction", "executed_fraction"):
            assert row[name] == pytest.approx(sum(s[name] for s in own) / len(own), abs=1e-6)
        by_class = row["payload_bytes_by_class"]
        assert row["payload_bytes"] == by_class["shared"] + by_class["expert"]
        for layer in row["layers"]:
            assert sum(layer["load"]) == pytest.approx(1, abs=1e-5)
            assert layer["max_vio"] == pytest.approx(max(layer["load"]) * 4 - 1, abs=1e-4)
            assert 0 <= layer["entropy"] <= math.log(4) + 1e-6
    for site in range(3):
        total = sum(row["payload_bytes"] for row in rounds if row["site"] == site)
        assert total / 2 == summary["payload_bytes_per_site_per_round_by_site"][site]


def test_holders_report_equal_hashes(tiny: Path, tmp_path: Path) -> None:
    trained(tiny)
    for round_idx in range(2):
        hashes: dict[str, list[str]] = {}
        for row in records(tmp_path / "run", "round"):
            if row["round"] == round_idx:
                for bucket, value in row["replica_hashes"].items():
                    hashes.setdefault(bucket, []).append(value)
        assert sorted(len(values) for values in hashes.values()) == [2, 2, 2, 3]
        assert all(len(set(values)) == 1 for values in hashes.values())


# ----------------------------------------------------------------------------------------- compare


def test_all_methods_train_on_the_same_text(compared: tuple[Path, str]) -> None:
    summaries = {method: summary_of(compared[0] / method) for method in METHODS}
    assert [s["method"] for s in summaries.values()] == list(METHODS)
    assert len({s["unigram_entropy"] for s in summaries.values()}) == 1
    assert {s["tokens_by_site"][0] for s in summaries.values()} == {128}
    losses = {method: s["val_loss_merged"] for method, s in summaries.items()}
    assert len(set(losses.values())) == len(METHODS)  # no two are the same thing
    assert all(loss < math.log(257) for loss in losses.values())
    for method in ("diloco", "photon", "ddp", "diloco-half", "single", "dense"):
        assert summaries[method]["skipped_fraction"] == 0
        assert summaries[method]["executed_fraction"] == 1
    for method in ("resident-routing", "copies"):
        assert summaries[method]["executed_fraction"] == 1
    assert 0 < summaries["fomoe"]["skipped_fraction"] < 1
    flops = {method: s["expert_flops_fraction"] for method, s in summaries.items()}
    assert flops["diloco-half"] == 0.5
    assert flops["diloco"] == 1
    assert flops["fomoe"] < 1


def test_compare_prints_one_row_per_method(compared: tuple[Path, str]) -> None:
    run_dir, out = compared
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line) if cell.strip()]
        if cells and cells[0] in (*METHODS, "method"):
            rows[cells[0]] = cells
    head = rows.pop("method")
    assert list(rows) == list(METHODS)
    for method, row in rows.items():
        summary = summary_of(run_dir / method)
        cells = dict(zip(head, row, strict=True))
        assert cells["merged val"] == f"{summary['val_loss_merged']:.4f}"
        assert cells["executed"] == f"{summary['executed_fraction']:.3f}"
        assert cells["skipped"] == f"{summary['skipped_fraction']:.3f}"
        ratio = summary["ratio_vs_ddp"]
        assert cells["vs DDP"] == ("-" if ratio is None else f"{ratio:.2f}x")
        assert cells["memory/site"].endswith(("kB", "MB"))


def test_compare_as_json_equals_the_runs(
    tiny: Path, tmp_path: Path, compared: tuple[Path, str]
) -> None:
    outcome = fomoe(
        "compare", tiny, "--methods", "fomoe,ddp", "--json", "run.log_every=3", *FITS_ALL
    )
    assert outcome.status == 0, outcome.err
    assert [summary["method"] for summary in outcome.json] == ["fomoe", "ddp"]
    for summary in outcome.json:
        assert summary == summary_of(tmp_path / "run" / summary["method"])
        other = summary_of(compared[0] / summary["method"])
        assert summary["val_loss_merged"] == other["val_loss_merged"]
    alone = trained(tiny, f"run.dir={tmp_path / 'alone'}", *FITS_ALL)
    assert alone["val_loss_merged"] == outcome.json[0]["val_loss_merged"]


# ------------------------------------------------------------------------------------ what is seen


def test_a_run_ends_with_a_table_and_where_to_look(tiny: Path, tmp_path: Path) -> None:
    outcome = fomoe("train", tiny)
    summary = summary_of(tmp_path / "run")
    assert f"{summary['val_loss_merged']:.4f}" in outcome.out
    assert f"{summary['unigram_entropy']:.4f}" in outcome.out
    for hint in ("metrics.jsonl", "summary.json"):
        assert hint in outcome.out
    lines = outcome.err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["round 1/2", "round 2/2"]
    assert all(re.search(r"train loss \d.*skipped 0.*tokens/s.* left", line) for line in lines)
    assert f"  {summary['tokens_per_s']:,.0f} tokens/s per site, " in lines[-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["model.shared_expert_ffn_dim=0"], ["generate", "export", "report"]),
        ([], ["merge", "report"]),  # no format can say a shared expert of half a routed one
        (["method=copies", "model.shared_expert_ffn_dim=0"], ["merge", "report"]),
    ],
)
def test_the_next_commands_work(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    expected: list[str],
) -> None:
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    sites = ["num_sites=4", "rounds=1"]
    ended = fomoe("train", tiny, *sites, *options, f"run.dir={tmp_path / 'my run'}").out
    commands = [line.partition("fomoe ")[2] for line in ended.splitlines() if "fomoe " in line]
    assert [command.split()[0] for command in commands] == expected
    monkeypatch.chdir(tmp_path)
    for command in commands:
        outcome = fomoe(*shlex.split(command))
        assert outcome.status == 0, outcome.err


def test_a_terminal_gets_a_live_display(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal
    outcome = fomoe("train", tiny, "run.log_every=1")
    assert outcome.status == 0
    assert "\x1b[" in outcome.err
    assert "round 2/2" in outcome.err


@pytest.mark.parametrize("columns", ["0", "1", "30"])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_width_is_too_small_to_print(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, columns: str, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    outcome = fomoe("train", tiny, "rounds=1")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", outcome.out)
    assert "│ merged validation loss (nats per token)" in plain
    assert "round 1/1" in outcome.err
    planned = fomoe("train", tiny, "--dry-run")
    assert "│ this run (fomoe) │" in re.sub(r"\x1b\[[0-9;]*m", "", planned.out)


def test_version_and_help() -> None:
    assert fomoe("--version").out.strip() == f"fomoe {__version__}"
    out = fomoe("--help").out
    assert all(command in out for command in ("train", "compare", "merge"))
    for flag in (
        "--resume",
        "--resume-round",
        "--overwrite",
        "--next-free",
        "--dry-run",
        "--json",
        "--device",
    ):
        assert flag in fomoe("train", "--help").out


def test_a_run_without_run_dir_is_named_after_its_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trained(tiny, "run.dir=null", "rounds=1")["run_dir"] == str(Path("runs") / "tiny")
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()
