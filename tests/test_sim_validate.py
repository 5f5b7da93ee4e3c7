"""Published figures are compared within their bounds, and the bounds can fail."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_cli import fomoe

from fomoe_sim import validate
from fomoe_sim.trainer import read_data
from fomoe_sim.validate import GRID_BPS, bandwidth_table, bins_between, predictions, printed

DATA = read_data("published")


@pytest.fixture(scope="module")
def tables():
    return {table.name: table for table in validate.all_tables()}


@pytest.fixture
def published(monkeypatch):
    """Our copy of the published figures, which a test may change."""
    tree = copy.deepcopy(DATA)
    monkeypatch.setattr(validate, "read_data", lambda name: tree)
    return tree


def distances(table):
    return [abs(cell.bins_between) for cell in table.cells]


def test_streaming_table_with_its_one_factor(tables):
    bins = distances(tables["streaming-diloco-4"])
    assert len(bins) == 50
    assert max(bins) <= 1
    assert bins.count(0) == 47


def test_streaming_table_with_nominal_sizes(tables):
    assert sum(distance > 1 for distance in distances(tables["streaming-diloco-4-nominal"])) <= 1


def test_scaling_laws_table_with_its_one_factor(tables):
    bins = distances(tables["scaling-laws-6"])
    assert len(bins) == 50
    assert max(bins) <= 1
    assert bins.count(0) == 33


def test_one_measured_point_by_hand(tables):
    """H = 32 at 1 Gbit/s: 30,846,720 x 32 bit x 1.5 = 1.4806 s beside 32 x 25.3 ms = 0.8096 s."""
    cells = tables["measured-tcp-ring"].cells
    assert len(cells) == 12
    (cell,) = [c for c in cells if (c.row, c.column) == ("H=32", "1000M")]
    assert cell.ours == pytest.approx(100 * 0.8096 / (0.8096 + 1.48064256))


def test_every_run_states_a_bound_and_its_source():
    for run in DATA["runs"]:
        assert run["source"]
        assert "bound" in run or run.get("fits")
        assert run.get("bound", 0) <= (0.3 if run.get("aside") else 0.25)
        assert run.get("bound", 0) <= 0.15 or "mfu" not in run["ask"]


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


def test_a_wrong_factor_or_a_wrong_figure_is_missed(published):
    table = published["tables"]["streaming-diloco-4"]
    assert not bandwidth_table("streaming-diloco-4", False, 46, 0).passed
    table["printed"]["1B"]["diloco"] = [1.4, 6.2, 13.3, 23.3, 152.6]
    found = bandwidth_table("streaming-diloco-4", True, 46, 0)
    assert not found.passed
    assert "49 within one bin" in found.summary


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (lambda d: d["runs"][1].update(gpu_hours=1e6), "runs"),
        (lambda d: d["runs"][8].update(gib=40.0), "runs"),
        (lambda d: d["gains"].update(bound=0.001), "own-gains"),
        (lambda d: d["measured"]["bounds"].update(ring=0.1), "measured-tcp-ring"),
    ],
)
def test_a_missed_bound_is_a_non_zero_exit(published, where, name):
    where(published)
    outcome = fomoe("validate")
    assert outcome.status == 1
    assert f"MISS {name} " in outcome.out


def test_json_has_the_shape_that_others_rely_on():
    outcome = fomoe("validate", "--json")
    assert outcome.status == 0
    report = json.loads(outcome.out)
    for table in report["tables"]:
        assert {"name", "cells", "tolerance", "passed"} <= set(table)
        assert table["passed"] is True
        for cell in table["cells"]:
            assert {"ours", "published", "bins_between", "error"} <= set(cell)
    for row in report["predictions"]:
        assert set(row) == {"table", "model", "method", "gbit_per_s"}
        assert row["gbit_per_s"] == sorted(row["gbit_per_s"])
        assert np.isin(np.array(row["gbit_per_s"]), GRID_BPS / 1e9).all()


def test_the_report_shows_every_cell_and_a_summary():
    out = fomoe("validate").out
    assert "86.8 / 86.8 (0)" in out
    assert "47 of 50 exact, 50 within one bin" in out
    assert "streaming-diloco-4 100B streaming-overlapped-fp4" in out
    assert "MISS" not in out


def test_no_torch_is_imported():
    """A planner's machine needs no torch, and the commands stay fast."""
    code = (
        "import pkgutil, sys, importlib, fomoe_sim\n"
        "names = [m.name for m in pkgutil.iter_modules(fomoe_sim.__path__)]\n"
        "[importlib.import_module(f'fomoe_sim.{n}') for n in names]\n"
        "print(len(names) > 10, 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True False\n"


def test_the_documented_figures_are_those_of_the_code(tables):
    """Every run and every predicted row that docs/validation.md shows."""
    page = (Path(__file__).parents[1] / "docs" / "validation.md").read_text(encoding="utf-8")
    documented = {line for line in page.splitlines() if line.startswith("| ")}
    for row in predictions():
        method = row["method"].removeprefix("H=")
        figures = " | ".join(str(printed(value)) for value in row["gbit_per_s"])
        assert f"| {method} | {figures} |" in documented
    for name in ("runs", "runs-aside"):
        for cell in tables[name].cells:
            shown = f"{cell.published:.4g} | {cell.ours:.4g} | {100 * cell.error:+.1f} %"
            assert any(cell.row in line and shown in line for line in documented), cell.row
