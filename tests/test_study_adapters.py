"""Studies of runs with adapters: their lines, and the tables of losses at every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from helpers_adapters import base_folder
from helpers_cli import fomoe
from test_adapter_runs import write_adapter_config
from test_study import ROOT

from fomoe.study import results
from fomoe.study.page import write_page
from fomoe.study.plan import Study, load_study


def write_study(folder: Path, **changes: Any) -> Path:
    """Two arms at two learning rates of the tiny clients."""
    write_adapter_config(folder)
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    del config["run"]["dir"]
    tree = {
        "title": "Rates",
        "config": config,
        "seeds": [0, 1],
        "control": "nested",
        "grid": {"inner.lr": [0.01, 0.02]},
        "arms": {"nested": None, "least": {"method": "fedit-min", "local_steps": 3, "note": "all"}},
        "runs": str(folder / "runs"),
        "results": str(folder / "results.jsonl"),
    }
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
    return path


def add_line(study: Study, arm: str, seed: int, losses: dict[str, float], passes: float) -> None:
    """A result as if a run had ended."""
    run = next(run for run in study.runs if (run.arm, run.seed) == (arm, seed))
    line = {
        **{"study": run.study, "arm": arm, "regime": None, "seed": seed},
        **{"overrides": run.overrides, "torch": "2.0", "text_sha256": "a" * 64},
        "val_loss_by_rank": losses,
        "val_loss_by_client": [3.0, None, 4.0 + seed, None],
        "passes_per_step": passes,
        "payload_bytes_per_site_per_round": 1000,
        "config": run.config.model_dump(mode="json", exclude={"run"}),
    }
    results.append_result(study.results, line)


def rows(page: Path, arm: str) -> list[list[str]]:
    """Cells of every table row that begins with an arm's name, in the page's order."""
    lines = page.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return [row for row in cells if row[0] == arm]


def test_a_line_has_the_losses_at_every_rank(tmp_path: Path) -> None:
    """Once through the program itself."""
    path = write_study(tmp_path, arms={"nested": None}, grid={}, seeds=[0])
    outcome = fomoe("study", path, "rounds=1")
    assert outcome.status == 0, outcome.err
    (line,) = results.read_results(tmp_path / "results.jsonl")
    summary = json.loads(
        (tmp_path / "runs" / "rates" / "nested-seed0" / "summary.json").read_text()
    )
    for name in ("val_loss_by_rank", "val_loss_by_client", "passes_per_step", "energy"):
        assert line[name] == summary[name]
    page = tmp_path / "page.md"
    assert fomoe("study", path, "rounds=1", "--report", page).status == 0
    (row,) = rows(page, "**nested**")
    assert row[2:5] == [f"{loss:.3f}" for loss in summary["val_loss_by_rank"].values()]
    assert "experts" not in page.read_text()


def test_an_arm_stands_at_its_best_point(tmp_path: Path) -> None:
    """A point is chosen on the seeds that all its arm's points have."""
    study = load_study(write_study(tmp_path))
    low, high = "nested-inner.lr=0.01", "nested-inner.lr=0.02"
    add_line(study, low, 0, {"1": 3.0, "2": 2.5, "4": 2.0}, 2.0)
    add_line(study, high, 0, {"1": 2.75, "2": 2.5, "4": 2.0}, 2.0)  # the mean is lower
    add_line(study, high, 1, {"1": 4.75, "2": 4.5, "4": 4.0}, 2.0)  # the other point lacks it
    add_line(study, "least-inner.lr=0.01", 0, {"1": 2.25}, 1.0)
    add_line(study, "least-inner.lr=0.01", 1, {"1": 4.0}, 1.0)
    page = tmp_path / "page.md"
    write_page(page, [study])
    best, every = rows(page, f"**{high}**")[0], rows(page, high)
    spread = "± 1.414"  # of two values that are 2 apart
    assert best[1:5] == ["2", f"3.750 {spread}", f"3.500 {spread}", f"3.000 {spread}"]
    assert best[5] == "3.750 ± 0.354"  # (3 + 4) / 2 and (3 + 5) / 2
    assert best[6:9] == ["8", "1.0 kB", ""]  # 2 passes x 2 steps x 2 rounds
    assert rows(page, f"**{low}**") == []
    least, lead, again = rows(page, "least-inner.lr=0.01")
    assert least[2:5] == ["3.125 ± 1.237", "-", "-"]
    assert least[6:] == ["6", "1.0 kB", "all"]
    assert lead[1:] == ["+0.625 ± 0.177", "-", "-"]  # 0.5 and 0.75
    assert [row[1] for row in (*rows(page, low), *every, again)] == ["1", "2", "2"]


def test_a_page_without_results_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(page, [load_study(write_study(tmp_path))])
    assert "No run is done yet." in page.read_text()


def test_only_some_seeds(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    outcome = fomoe("study", path, "--seeds", "1", "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "4 runs" in outcome.out
    outcome = fomoe("study", path, "--seeds", "7", "--dry-run")
    assert outcome.status == 2
    assert "--seeds 7 is no seed of the study, which has 0, 1" in outcome.err


def test_the_shipped_study_has_its_own_rates() -> None:
    path = ROOT / "configs" / "study" / "prelort.yaml"
    study = load_study(path, [f"adapters.base={base_folder()}"])
    assert len({run.config.fingerprint() for run in study.runs}) == len(study.runs)
    rates = {run.config.inner.lr for run in study.runs}
    assert len(rates) >= 3
    assert len(study.runs) == 3 * len(study.arms)


def test_a_base_that_is_not_there_is_one_line() -> None:
    path = ROOT / "configs" / "study" / "prelort.yaml"
    outcome = fomoe("study", path, "adapters.base=nowhere")
    assert outcome.status == 2
    assert "adapters.base nowhere is no folder and no name on the hub" in outcome.err
