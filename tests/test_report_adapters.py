"""`fomoe report` of runs with adapters: what is drawn is what was recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import mean

import pytest
from helpers_cli import fomoe, records, write_config
from test_adapter_runs import write_adapter_config

from fomoe.adapters.figures import energy, rank_figures, traffic
from fomoe.records import read_groups

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds each, evaluated every round."""
    folder = tmp_path_factory.mktemp("compared")
    words = ["--methods", "prelort,fedit-min", "--seeds", "0,1", "run.eval_merged_every=1"]
    outcome = fomoe("compare", write_adapter_config(folder), *words)
    assert outcome.status == 0, outcome.err
    return folder / "run"


def test_lines_are_the_recorded_losses(compared: Path) -> None:
    least, nested = read_groups(sorted(compared.iterdir()))
    drawn = {name: drawing for name, _, drawing in rank_figures([least, nested])}
    kinds = ["energy", "loss-bytes", "loss-rank-1", "loss-rank-2", "loss-rank-4", "memory"]
    assert sorted(drawn) == [*kinds, "speed", "traffic"]
    evaluated = [records(run.folder, "merged") for run in nested.runs]
    for rank in ("1", "2", "4"):
        lines = drawn[f"loss-rank-{rank}"].axes[0].lines
        assert len(lines) == (2 if rank == "1" else 1)  # fedit-min trains rank 1 only
        losses = [mean(run[i]["val_loss_by_rank"][rank] for run in evaluated) for i in range(2)]
        assert lines[-1].get_ydata() == pytest.approx(losses)
        assert lines[-1].get_xdata() == pytest.approx(nested.first.tokens())
    sent = drawn["loss-bytes"].axes[0].lines[1]
    assert sent.get_xdata() == pytest.approx(nested.first.sent())


def test_one_run_has_all_ranks_in_a_figure(compared: Path) -> None:
    groups = read_groups([compared / "prelort-seed-0"])
    drawn = {name: drawing for name, _, drawing in rank_figures(groups)}
    lines = drawn["loss-ranks"].axes[0].lines
    last = records(compared / "prelort-seed-0", "merged")[-1]["val_loss_by_rank"]
    assert [line.get_ydata()[-1] for line in lines] == list(last.values())


def test_energy_and_bytes_are_those_of_the_runs(compared: Path) -> None:
    least, nested = read_groups(sorted(compared.iterdir()))
    shares = [records(run.folder, "merged")[-1]["energy"] for run in nested.runs]
    line = energy([least, nested]).axes[0].lines[1]
    assert line.get_ydata() == pytest.approx([mean(pair) for pair in zip(*shares, strict=True)])
    assert list(line.get_xdata()) == [1, 2, 3, 4]
    assert nested.first.summary is not None
    counted = nested.first.summary["payload_bytes_per_site_per_round_by_site"]
    assert list(traffic([least, nested]).axes[0].lines[1].get_ydata()) == counted


def test_the_page_has_a_column_for_every_rank(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert fomoe("report", *sorted(compared.iterdir()), "--out", out).status == 0
    text = out.read_text()
    for rank in (1, 2, 4):
        assert f"loss at rank {rank}" in text
    assert "executed" not in text
    assert "Loss at rank 2" in text
    unfinished = shutil.copytree(compared / "prelort-seed-0", tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    assert fomoe("report", unfinished, "--out", out).status == 0
    assert "not finished" in out.read_text()


def test_runs_of_both_kinds_are_refused(compared: Path, tmp_path: Path) -> None:
    assert fomoe("train", write_config(tmp_path), "rounds=1").status == 0
    outcome = fomoe(
        "report", compared / "prelort-seed-0", tmp_path / "run", "--out", tmp_path / "a.html"
    )
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "is fine-tuned with adapters, and others are not" in outcome.err
    assert not (tmp_path / "a.html").exists()
