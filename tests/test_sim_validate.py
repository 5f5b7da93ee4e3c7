"""Published tables are reproduced within their tolerances, and the checks can fail."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fomoe_sim import anchors, published, validate
from fomoe_sim.event import GRID_BPS, ImpossibleResult, check_conservation
from fomoe_sim.reproduce import (
    bandwidth_table,
    bins_between,
    predictions,
    printed,
    row_gbit,
    table_spec,
)

STREAMING, LAWS = published.STREAMING_DILOCO, published.SCALING_LAWS


@pytest.fixture(scope="module")
def tables():
    return {table.name: table for table in validate.all_tables()}


def distances(table):
    return [abs(cell.bins_between) for cell in table.cells]


def test_streaming_table_with_its_one_factor(tables):
    bins = distances(tables["streaming-diloco-4"])
    assert len(bins) == 50
    assert max(bins) <= 1
    assert bins.count(0) >= 46


def test_streaming_table_with_nominal_sizes(tables):
    bins = distances(tables["streaming-diloco-4-nominal"])
    assert len(bins) == 50
    assert sum(distance > 1 for distance in bins) <= 1


def test_scaling_laws_table_with_its_one_factor(tables):
    bins = distances(tables["scaling-laws-6"])
    assert len(bins) == 50
    assert max(bins) <= 1
    assert bins.count(0) >= 30


@pytest.mark.parametrize(
    ("name", "most"), [("measured-tcp", 2.5), ("measured-tcp-calibrated", 1.5)]
)
def test_measured_links(tables, name, most):
    cells = tables[name].cells
    assert len(cells) == 12
    assert np.mean([abs(cell.ours - cell.published) for cell in cells]) <= most


def test_one_measured_point_by_hand():
    """H = 32 at 1 Gbit/s: 30,846,720 x 32 bit x 1.5 = 1.4806 s beside 32 x 25.3 ms = 0.8096 s."""
    table = anchors.measured_table(calibrated=False, max_error=2.5)
    (cell,) = [c for c in table.cells if (c.row, c.column) == ("H=32", "1000M")]
    assert cell.ours == pytest.approx(100 * 0.8096 / (0.8096 + 1.48064256))


def test_small_anchors_to_the_printed_digit(tables):
    ours = {
        (cell.row, cell.column): cell.ours
        for name in ("intellect-1", "activations", "deepseek-v3-money", "deepseek-v3-days")
        for cell in tables[name].cells
    }
    assert round(ours["INTELLECT-1", "sync 103 s"], 1) == 95.7
    assert round(ours["INTELLECT-1", "sync 382 s"], 1) == 85.6
    assert ours["22B", "tensor parallel"] == 59.25
    assert ours["22B", "sequence + selective"] == 9.5625
    assert ours["175B", "tensor parallel"] == pytest.approx(66.84, rel=1e-3)
    assert ours["175B", "sequence + selective"] == pytest.approx(12.35, rel=1e-3)
    assert round(ours["DeepSeek-V3", "cost"], 3) == 5.576
    assert round(ours["DeepSeek-V3", "days"], 2) == 3.66


# ------------------------------------------------------------------------------ the impossible


@pytest.mark.parametrize("factor", [1.0, published.EAGER_UPDATES.factor])
@pytest.mark.parametrize("model", published.EAGER_UPDATES.models, ids=lambda model: model.name)
def test_the_impossible_published_rows_are_refused(model, factor):
    """Below CU x 4N/(H T), nominal or with the factor, read as generously as the print allows."""
    (row,) = published.EAGER_UPDATES.printed[model.name].values()
    for share, value in zip(published.UTILISATIONS, row, strict=True):
        largest = max(bps for bps in GRID_BPS if printed(bps / 1e9) == value)
        with pytest.raises(ImpossibleResult, match="is impossible"):
            check_conservation(
                bits=factor * 4 * model.params,
                bandwidth_bps=largest,
                utilisation=share,
                local_steps=100,
                step_time_s=model.step_time_s,
            )


def test_the_printed_possible_rows_are_not_refused():
    """The same check passes every printed row of the other tables, ours and theirs."""
    for table in (STREAMING, LAWS):
        for model in table.models:
            for method, row in table.printed.get(model.name, {}).items():
                spec = table_spec(table, model, method, table.factor)
                check_conservation(
                    bits=spec.round_bits,
                    bandwidth_bps=1.05e9 * np.array(row),
                    utilisation=published.UTILISATIONS,
                    local_steps=spec.local_steps,
                    step_time_s=spec.step_time_s,
                )


# ------------------------------------------------------------------------------------ comparing


def test_bins_are_counted_on_the_published_grid():
    grid = GRID_BPS / 1e9
    assert bins_between(grid[30], printed(grid[30])) == 0
    assert bins_between(grid[31], printed(grid[30])) == 1
    assert bins_between(grid[27], printed(grid[30])) == -3
    # 0.45 and 0.54 both print as 0.5: either is the same bin.
    assert [printed(grid[8]), printed(grid[9])] == [0.5, 0.5]
    assert [bins_between(grid[i], 0.5) for i in (7, 8, 9, 10)] == [-1, 0, 0, 1]
    with pytest.raises(AssertionError, match="not on the published grid"):
        bins_between(1.0, 1.0)


def test_a_wrong_factor_or_a_wrong_figure_is_missed():
    limits = {"name": "t", "min_exact": 46, "max_outside": 0}
    assert not bandwidth_table(STREAMING, factor=0.5, **limits).passed
    assert not bandwidth_table(STREAMING, factor=1.0, **limits).passed
    wrong = {name: dict(rows) for name, rows in STREAMING.printed.items()}
    wrong["1B"]["diloco"] = (1.4, 6.2, 13.3, 23.3, 152.6)
    table = bandwidth_table(replace(STREAMING, printed=wrong), factor=5 / 6, **limits)
    assert not table.passed
    assert "49 within one bin" in table.summary
    assert not anchors.measured_table(calibrated=False, max_error=0.1).passed


def test_predictions_list_every_row_from_the_same_code():
    rows = {(r["table"], r["model"], r["method"]): r["gbit_per_s"] for r in predictions()}
    assert len(rows) == len(predictions()) == 30
    grid = {float(bps) / 1e9 for bps in GRID_BPS}
    for figures in rows.values():
        assert len(figures) == 5
        assert figures == sorted(figures)
        assert set(figures) <= grid
    assert {model for table, model, _ in rows if table == "streaming-diloco-4"} == {
        "1B",
        "10B",
        "100B",
    }
    assert {model for table, model, _ in rows if table == "scaling-laws-6"} == {
        "10B",
        "llama3-405b",
        "deepseek-v3",
    }
    diloco = row_gbit(STREAMING, published.MODEL_100B, "diloco", 5 / 6)
    assert rows["streaming-diloco-4", "100B", "diloco"] == diloco


# ------------------------------------------------------------------------------------ the command


def run(*words):
    parser = argparse.ArgumentParser()
    validate.add_command(parser.add_subparsers())
    args = parser.parse_args(["validate", *words])
    return args.run(args)


def test_json_has_the_shape_that_others_rely_on(capsys):
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    for table in report["tables"]:
        assert {"name", "cells", "tolerance", "passed"} <= set(table)
        assert table["passed"] is True
        for cell in table["cells"]:
            assert {"ours", "published", "bins_between"} <= set(cell)
    for row in report["predictions"]:
        assert set(row) == {"table", "model", "method", "gbit_per_s"}
    methods = {r["method"] for r in report["predictions"] if r["table"] == "scaling-laws-6"}
    assert methods == {"H=1", "H=10", "H=50", "H=100", "H=300"}


def test_the_report_shows_every_cell_and_a_summary(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert "86.8 / 86.8 (0)" in out
    assert "47 of 50 exact, 50 within one bin" in out
    assert "streaming-diloco-4 100B streaming-overlapped-fp4" in out
    assert "MISS" not in out


def test_a_missed_tolerance_is_a_non_zero_exit(monkeypatch, capsys):
    monkeypatch.setattr(published, "STREAMING_DILOCO", replace(STREAMING, factor=0.5))
    assert run() == 1
    assert "MISS streaming-diloco-4 " in capsys.readouterr().out


def test_no_torch_is_imported():
    code = "import sys, fomoe_sim.validate, fomoe_sim.calibrate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_documented_predictions_are_those_of_the_code():
    """Every row of the two tables in docs/validation.md."""
    page = (Path(__file__).parents[1] / "docs" / "validation.md").read_text(encoding="utf-8")
    documented = {line for line in page.splitlines() if line.startswith("| ")}
    for row in predictions():
        if row["model"] in ("100B", "deepseek-v3"):
            method = row["method"].removeprefix("H=")
            figures = " | ".join(str(printed(value)) for value in row["gbit_per_s"])
            assert f"| {method} | {figures} |" in documented
