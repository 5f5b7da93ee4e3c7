"""`fomoe report`, and `fomoe compare` over seeds: what is drawn is what was recorded."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, stdev

import pytest
from helpers_cli import fomoe, records, snapshot, trained, write_config

from fomoe import reportpage
from fomoe.records import RunRecords, read_groups, read_run, short_names
from fomoe.reportpage import page

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds each."""
    folder = tmp_path_factory.mktemp("compared")
    words = ["--methods", "ddp,fomoe", "--seeds", "0,1", "run.eval_merged_every=1", "--json"]
    outcome = fomoe("compare", write_config(folder), *words)
    assert outcome.status == 0, outcome.err
    (folder / "summaries.json").write_text(outcome.out)
    return folder


def folders(compared: Path) -> list[Path]:
    return sorted((compared / "run").iterdir())


def test_a_comparison_over_seeds_has_a_folder_for_each(compared: Path) -> None:
    summaries = json.loads((compared / "summaries.json").read_text())
    names = [Path(summary["run_dir"]).name for summary in summaries]
    assert names == ["ddp-seed-0", "ddp-seed-1", "fomoe-seed-0", "fomoe-seed-1"]
    assert [summary["seed"] for summary in summaries] == [0, 1, 0, 1]
    assert len({summary["val_loss_merged"] for summary in summaries}) == 4


def test_a_comparison_is_resumed_where_it_ended(compared: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(compared / "run", tmp_path / "run")
    shutil.rmtree(kept / "fomoe-seed-1")
    words = ["--methods", "ddp,fomoe", "--seeds", "0,1", "run.eval_merged_every=1"]
    outcome = fomoe(
        "compare", compared / "tiny.yaml", *words, f"run.dir={kept}", "--resume", "--json"
    )
    assert outcome.status == 0, outcome.err
    before = json.loads((compared / "summaries.json").read_text())
    losses = [[s["val_loss_merged"] for s in run] for run in (outcome.json, before)]
    assert losses[0] == losses[1]


def test_the_table_of_a_comparison_has_mean_and_deviation(compared: Path) -> None:
    from fomoe.report import print_comparison

    summaries = json.loads((compared / "summaries.json").read_text())
    losses = [summary["val_loss_merged"] for summary in summaries[2:]]
    shown = f"{mean(losses):.4f} ± {stdev(losses):.4f}"
    assert shown in page(read_groups(folders(compared)), ())
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print_comparison(summaries)
    assert shown in text.getvalue()
    assert "2 seeds" in text.getvalue()


def test_the_page_is_one_file_that_loads_nothing(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    before = snapshot(compared)
    outcome = fomoe("report", *folders(compared), "--out", out)
    assert (outcome.status, outcome.out) == (0, f"{out}\n")
    assert snapshot(compared) == before
    text = out.read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)\b|url\(\s*['\"]?http|@import", text)
    loaded = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', text)
    assert not loaded
    assert "<h1>ddp, fomoe</h1>" in text
    for title in (
        "Loss over tokens",
        "Loss over bytes sent",
        "Speed",
        "Skipped",
        "Traffic by class",
    ):
        assert f'aria-label="{title}"' in text, title
    for svg in re.findall(r"<svg .*?</svg>", text, flags=re.S):
        ElementTree.fromstring(svg)


def test_equal_figures_are_equal_files(compared: Path) -> None:
    from fomoe.runfigures import traffic

    groups = read_groups(folders(compared))
    assert traffic(groups).svg() == traffic(groups).svg()


@pytest.mark.parametrize("length", [5, 34, 60])
def test_labels_of_ticks_do_not_touch_whatever_the_names(compared: Path, length: int) -> None:
    from fomoe.runfigures import figures

    groups = read_groups(folders(compared))
    named = [replace(g, name=f"run-{i}-".ljust(length, "x")) for i, g in enumerate(groups)]
    for name, _, drawing in figures(named):
        figure, axes = drawing.figure, drawing.axes[0]
        figure.draw_without_rendering()
        for axis, first, last in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_text()]
            boxes.sort(key=lambda box: getattr(box, first))
            for one, other in pairwise(boxes):
                assert getattr(one, last) < getattr(other, first), (name, axis.axis_name)
            assert all(box.x0 >= 0 for box in boxes), name
            assert len(boxes) >= 2 or axis is axes.yaxis, name
        assert axes.get_window_extent().width > figure.bbox.width / 3, name


@pytest.mark.parametrize("times", [6, 20, 40, 90, 200])
def test_bytes_of_runs_far_apart_have_labels_that_can_be_read(compared: Path, times: int) -> None:
    from fomoe.runfigures import losses

    groups = read_groups(folders(compared))

    def sent(run: RunRecords) -> list[float]:
        return [1e6 * (times if run.config.method == "ddp" else 1) for _ in run.rounds]

    drawing = losses(groups, "bytes sent", sent, "model bytes that a site has sent")
    drawing.figure.draw_without_rendering()
    axis = drawing.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    labels = [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert all(label.get_text()[-1] in "kMG" for label in labels)


def test_figures_are_written_for_papers(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = reportpage.figures
    monkeypatch.setattr(reportpage, "figures", lambda groups: islice(drawn(groups), 2))
    words = ["--out", tmp_path / "report.html", "--figures", tmp_path / "figures"]
    assert fomoe("report", folders(compared)[2], *words).status == 0
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    names = ("loss-tokens", "loss-bytes")
    assert made == {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}
    assert (tmp_path / "figures" / "loss-bytes.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_the_seed_are_one_group(compared: Path) -> None:
    groups = read_groups(folders(compared))
    assert [(group.name, len(group.runs)) for group in groups] == [("ddp", 2), ("fomoe", 2)]
    alone = read_groups(folders(compared)[1:3])
    assert [group.name for group in alone] == ["ddp-seed-1", "fomoe-seed-0"]


def test_a_group_is_named_without_its_seed() -> None:
    folders = [Path("a/d32-seed1"), Path("a/d16-seed-2"), Path("a/d8-seed3")]
    names = short_names(folders, several=[True, True, False])
    assert names == ["d32", "d16", "d8-seed3"]


def test_equal_names_are_told_apart(compared: Path, tmp_path: Path) -> None:
    for parent, source in (("a", 0), ("b", 2)):
        shutil.copytree(folders(compared)[source], tmp_path / parent / "run")
    names = [g.name for g in read_groups([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert names == ["a/run", "b/run"]


def test_curves_are_those_of_the_records(compared: Path) -> None:
    from fomoe.runfigures import losses, over_tokens

    (folder,) = (f for f in folders(compared) if f.name == "fomoe-seed-0")
    (group,) = read_groups([folder])
    rounds = records(folder, "round")
    tokens = [sum(r["tokens"] for r in rounds if r["round"] <= index) for index in (0, 1)]
    local = [mean(r["val_loss_local"] for r in rounds if r["round"] == index) for index in (0, 1)]
    merged = [record["val_loss_merged"] for record in records(folder, "merged")]
    drawing = losses([group], "tokens", RunRecords.tokens, "tokens, all sites")
    dashed, solid = (line.get_xydata() for line in drawing.axes[0].lines)
    assert dashed[:, 0].tolist() == solid[:, 0].tolist() == tokens
    assert dashed[:, 1].tolist() == pytest.approx(local)
    assert solid[:, 1].tolist() == merged
    sent = [sum(r["wire_bytes"] for r in rounds if r["round"] <= index) / 3 for index in (0, 1)]
    assert group.first.sent() == pytest.approx(sent)
    # Agreement is known from the second evaluation on.
    agreement = over_tokens([group], "Top-k agreement", "share", lambda r: r["probe_agreement"])
    assert agreement is not None
    assert agreement.axes[0].lines[0].get_xydata()[:, 0].tolist() == tokens[1:]


def test_a_run_that_was_evaluated_once_has_points_that_differ(compared: Path) -> None:
    from fomoe.runfigures import losses

    (group,) = read_groups(folders(compared)[2:3])
    for record in group.first.rounds[0]:
        record["val_loss_local"] = None
    group.first.merged.clear()  # the last one is the summary's
    lines = losses([group], "tokens", RunRecords.tokens, "tokens, all sites").axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [1, 1]
    assert lines[0].get_markerfacecolor() == "none"
    assert lines[1].get_markerfacecolor() == lines[0].get_color()


def test_the_load_of_copies_is_that_of_a_site_s_own_set(tmp_path: Path) -> None:
    from fomoe.runfigures import figures

    words = ["method=copies", "num_sites=2", "placement.replication_factor=1", "rounds=1"]
    trained(write_config(tmp_path), *words, "model.top_k=1")
    groups = read_groups([tmp_path / "run"])
    loads = [layer["load"] for layer in groups[0].first.rounds[0][0]["layers"]]
    ((text, drawing),) = [(t, d) for name, t, d in figures(groups) if name == "load-0"]
    axes = drawing.axes[0]
    assert "own set of copies" in text
    assert axes.get_ylabel() == "MoE layer, 2 experts each"
    shown = axes.images[0].get_array()
    assert shown.shape == (sum(map(len, loads)), 1)
    assert shown.mean() == pytest.approx(1)


def test_speed_is_that_of_the_summary(compared: Path) -> None:
    """One site's tokens over the time of its local steps and sync, in records, summary and page."""
    for folder in folders(compared):
        run = read_run(folder)
        assert run.summary is not None
        by_site = [[r for r in records(folder, "round") if r["site"] == site] for site in range(3)]
        speeds = [
            sum(r["tokens"] for r in rows) / sum(r["train_s"] + r["sync_s"] for r in rows)
            for rows in by_site
        ]
        assert run.summary["tokens_per_s"] == pytest.approx(mean(speeds))


def test_a_run_that_is_not_finished_is_shown_so(compared: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folders(compared)[2], tmp_path / "half")
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["round"] == 0]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"kind": "round", "rou')
    text = page(read_groups([run, folders(compared)[0]]), ())
    assert "not finished: 1 of 2 rounds" in text


def test_records_of_some_sites_are_shown_so(compared: Path, tmp_path: Path) -> None:
    """Where every site has a folder of its own, site 0's has its own records only."""
    run = shutil.copytree(folders(compared)[2], tmp_path / "site0")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("site", 0) == 0]
    (run / "metrics.jsonl").write_text("".join(kept))
    assert "without [1, 2]" in page(read_groups([run]), ())


def test_a_dense_model_has_no_figures_of_experts(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert fomoe("train", config, "method=dense", "rounds=1").status == 0
    out = tmp_path / "report.html"
    assert fomoe("report", tmp_path / "run", "--out", out).status == 0
    text = out.read_text()
    assert "Loss over tokens" in text
    assert "Load: " not in text
    assert "MaxVio" not in text


REFUSED: dict[str, tuple[list[str], str]] = {
    "no run": (["report", "texts"], "texts is not a run's folder: it has no config.yaml"),
    "no folder": (["report", "nowhere"], "nowhere is not a run's folder"),
    "page is a folder": (
        ["report", "run/ddp-seed-0", "--out", "texts"],
        "report texts is a folder",
    ),
    "no folder for it": (
        ["report", "run/ddp-seed-0", "--out", "no/page.html"],
        "report no/page.html cannot be written: there is no folder no",
    ),
    "no number": (["compare", "tiny.yaml", "--methods", "ddp", "--seeds", "0,x"], "--seeds x must"),
    "twice": (["compare", "tiny.yaml", "--methods", "ddp", "--seeds", "1,1"], "1 is given twice"),
    "nothing": (["compare", "tiny.yaml", "--methods", "ddp", "--seeds", ""], "--seeds '' must"),
    "below 0": (["compare", "tiny.yaml", "--methods", "ddp", "--seeds=-1"], "--seeds -1 must"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_one_line(
    compared: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    words, reason = REFUSED[case]
    monkeypatch.chdir(compared)
    before = snapshot(compared)
    outcome = fomoe(*words)
    assert outcome.status != 0
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err
    assert snapshot(compared) == before


@pytest.mark.parametrize(
    "words",
    [
        ["report", "run/ddp-seed-0"],
        ["compare", "tiny.yaml", "--methods", "ddp", "run.dir=other", "--report", "page.html"],
        ["project", "--model", "dbrx", "--plot", "plot.svg"],
    ],
    ids=lambda words: words[0],
)
def test_without_matplotlib_the_extra_is_named(
    compared: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(compared)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = snapshot(compared)
    outcome = fomoe(*words)
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1
    assert "needs matplotlib: pip install 'fomoe[plot]'" in outcome.err
    assert snapshot(compared) == before
