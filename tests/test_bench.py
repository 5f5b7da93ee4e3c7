"""The benchmark's arithmetic and comparison; no test asserts a time."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config

pytest.importorskip("bench", reason="the bench folder is not beside the package")

from bench import answers, baseline, peaks
from bench.__main__ import main as bench_main
from bench.codecs import sync_rows
from bench.growth import even_routing, growth_rows
from bench.layers import layer_rows, product_candidates
from bench.machine import LayerShape, Machine, StepShape
from bench.plot import growth
from bench.proxy import proxy_row, proxy_rows
from bench.steps import memory_rows, step_flops, step_rows
from bench.timing import Timing
from bench.transports import transport_rows
from fomoe.figures import COLOURS
from fomoe.load import build_config
from fomoe.shapes import parameter_specs

ROOT = Path(__file__).parent.parent
SHAPE = LayerShape(tokens=32, width=16, hidden=12, num_experts=4, top_k=2)
STEP = StepShape(
    layers=2, width=16, heads=2, hidden=12, num_experts=4, top_k=2, vocab=32, seq_len=8, batch=2
)
MACHINE = Machine(
    device=torch.device("cpu"), dtype=torch.float32, layers=(SHAPE,), step=STEP, budget_s=0.0
)


def test_ratios_are_of_the_same_turn() -> None:
    slow, fast = Timing(seconds=[2.0, 20.0, 2.0]), Timing(seconds=[1.0, 10.0, 1.0])
    assert slow.over(fast) == 2.0
    assert slow.median == 2.0
    assert Timing(seconds=[1.0, 1.0, 1.0]).spread == 0.0


def test_layer_rows_cover_backends_shares_and_products() -> None:
    rows = {row["what"]: row for row in layer_rows(MACHINE, SHAPE)}
    assert {"split 1", "split 1/2", "split 1/4", "grouped_mm 1", "products torch"} <= set(rows)
    assert rows["split 1"]["executed"] == 1.0
    assert 0 < rows["split 1/4"]["executed"] < rows["split 1/2"]["executed"] < 1
    assert rows["products torch"]["share_of_products"] == pytest.approx(1.0) or (
        "products onednn" in rows
    )


def test_every_codec_stands_beside_a_copy() -> None:
    rows = {row["what"]: row for row in sync_rows(MACHINE, numel=1000)}
    assert rows["copy"]["over_copy"] == 1.0
    for name in ("fp32", "bf16", "int8", "int4"):
        assert rows[f"mean {name}"]["gb_per_s"] > 0
        assert (f"encode {name}" in rows) == (f"decode {name}" in rows) == (name != "fp32")


def test_a_sync_over_gloo_stands_beside_the_link() -> None:
    """And beside torchft's, where that is installed."""
    rows = {row["what"]: row for row in transport_rows(MACHINE, numel=1000)}
    assert rows["link"]["over_link"] == 1.0
    assert {"sync fp32", "sync bf16", "sync int8", "sync int4"} <= rows.keys()
    assert ("torchft DiLoCo" in rows) == (find_spec("torchft") is not None)


def test_the_router_is_timed_beside_its_layer() -> None:
    rows = {row["what"]: row for row in layer_rows(MACHINE, SHAPE)}
    assert 0 < rows["router"]["over_full"] < 10
    assert rows["router"]["executed"] == 1.0


def test_a_proxy_run_is_read_from_its_records(tmp_path: Path) -> None:
    assert proxy_rows(MACHINE) == [], "nothing to park on a CPU"
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"some words to train on, text {i}" * 3 for i in range(400))
    )
    config = tiny_config(
        rounds=3,
        local_steps=1,
        data__source=str(tmp_path / "text.txt"),
        run__park="never",
        data__tokenizer="byte",
        model__vocab_size=257,
    )
    row = proxy_row(MACHINE, config)
    assert row["round_s"] > 0
    assert row["peak_gb"] is None


def test_peaks_of_both_products_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"torch": iter([100e6, 200e6, 100e6] * 2), "onednn": iter([110e6, 240e6, 130e6] * 2)}
    asked = []

    def train(experiment: dict[str, Any], clock: str) -> dict[str, float]:
        products = experiment["model"]["matmul"]
        asked.append(products)
        build_config(experiment)
        return {"peak_bytes": next(sizes[products]), "step_s": 0.1 if products == "torch" else 0.2}

    monkeypatch.setattr(peaks, "train_apart", train)
    monkeypatch.setattr(peaks, "has_onednn", lambda: True)
    rows = peaks.peak_rows(MACHINE)
    assert asked == ["torch", "onednn"] * 6, "in turns"
    assert [(row["products"], row["over_torch"]) for row in rows] == [
        *(("torch", 1.0), ("onednn", 1.2)) * 2,
    ]
    assert [row["peak_mb"] for row in rows[:2]] == [100, 130]
    assert rows[1]["step_over_torch"] == pytest.approx(2.0)
    monkeypatch.setattr(peaks, "has_onednn", lambda: False)
    sizes["torch"] = iter([1e6] * 6)
    assert [row["products"] for row in peaks.peak_rows(MACHINE)] == ["torch", "torch"]


def test_a_training_process_reports_its_peak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"some words, text {i}" for i in range(900)))
    shape = {"num_layers": 1, "d_model": 16, "num_experts": 4, "expert_ffn_dim": 8}
    experiment = peaks.options(shape, "torch")
    experiment["data"] |= {"source": str(tmp_path / "text.txt"), "seq_len": 16}
    experiment |= {"rounds": 3, "local_steps": 1}
    peaks.main([json.dumps(experiment), "wall", str(torch.get_num_threads())])
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] >= 0, "nothing, where another test has used more before"
    assert found["step_s"] > 0


def test_rows_of_a_sweep_stand_beside_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = {"one answer": "--model dbrx", "sweep": "--model dbrx --sweep local_steps=1..9..1"}
    monkeypatch.setattr(answers, "QUESTIONS", questions)
    one, sweep = answers.answer_rows(MACHINE)
    assert (one["rows"], sweep["rows"]) == (1, 9)
    assert one["rows_per_answer"] == 1
    assert sweep["rows_per_answer"] > 0


def test_products_do_the_flops_that_a_layer_is_counted_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench import layers
    from fomoe.model.matmul import Products

    counted: list[int] = []

    def count(rows: int, inner: int, outer: int) -> None:
        counted.append(2 * rows * inner * outer)

    counting = Products(
        forward=lambda x, w: count(*x.shape, w.shape[0]),  # type: ignore[arg-type, return-value]
        input_grad=lambda y, w: count(*y.shape, w.shape[1]),  # type: ignore[arg-type, return-value]
        weight_grad=lambda y, x: count(*y.shape, x.shape[1]),  # type: ignore[arg-type, return-value]
    )
    monkeypatch.setattr(layers, "TORCH", counting)
    monkeypatch.setattr(layers, "has_onednn", lambda: False)
    product_candidates(MACHINE, SHAPE)["products torch"]()
    assert sum(counted) == SHAPE.flops


def test_step_and_memory_rows() -> None:
    rows = {row["what"]: row for row in step_rows(MACHINE, peak_gflops=100.0)}
    assert rows["ours R/E 1"]["executed"] == 1.0
    assert rows["ours R/E 0"]["executed"] == 0.0
    assert rows["ours R/E 1"]["gain"] == pytest.approx(1.0)
    whole, none = (step_flops(STEP, executed) for executed in (1.0, 0.0))
    assert whole - none == STEP.layers * STEP.batch * STEP.seq_len * 2 * 18 * 16 * 12
    used = rows["ours R/E 1"]["flop_utilisation"]
    assert used == pytest.approx(whole / rows["ours R/E 1"]["ms"] / 1e-3 / 1e11)
    memory = {row["what"]: row for row in memory_rows(MACHINE)}
    config = tiny_config(
        model__d_model=16, model__num_experts=4, model__qk_norm="full", data__seq_len=8
    )
    whole = sum(spec.numel for spec in parameter_specs(config))
    assert memory["R/E 1, recompute none"]["state_mb"] == pytest.approx(16 * whole / 1e6)
    kept = [memory[f"R/E 1, recompute {r}"]["activations_mb"] for r in ("none", "experts")]
    assert kept[0] > kept[1]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_even_routing_executes_the_share(share: float) -> None:
    routing = even_routing(SHAPE, 8, 4, share, torch.device("cpu"))
    assert routing.executed_TK.float().mean() == share
    assert torch.equal(routing.expert_TK < 4, routing.executed_TK)
    counts = torch.bincount(routing.expert_TK[routing.executed_TK])
    assert counts.max() == counts.min()


def test_plot_is_made_of_the_rows() -> None:
    rows = growth_rows(MACHINE)
    drawing = growth(rows)
    drawn = [line.get_xydata().tolist() for axes in drawing.axes for line in axes.lines]
    assert sum(map(len, drawn)) == len(rows)
    (routers,) = [line for line in drawing.axes[2].lines if line.get_color() == COLOURS[1]]
    measured = [[row["value"], row["ms"]] for row in rows if row["series"] == "router"]
    assert routers.get_xydata().tolist() == sorted(measured)
    assert all(text in drawing.svg() for text in ("<!-- experts -->", "<!-- router -->"))


def test_the_figure_of_the_page_is_drawn_from_the_stored_rows(tmp_path: Path) -> None:
    stored, page = ROOT / "docs/results/growth.jsonl", ROOT / "docs/performance.md"
    assert bench_main(["--stored", str(stored), "--plot", str(tmp_path / "plot.svg")]) == 0
    drawn, shown = (
        path.read_text() for path in (tmp_path / "plot.svg", ROOT / "docs/performance.svg")
    )
    # Legend, labels and ticks; lines may differ in the last digit between versions of the library.
    words = re.compile("<!-- (.*) -->")
    assert words.findall(drawn) == words.findall(shown)
    assert drawn.count("<path") == shown.count("<path")
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    for series, field in (("assignments", "ms"), ("residents", "state_mb"), ("experts", "ms")):
        numbers = [f"{row[field]:g}" for row in rows if row["series"] == series]
        assert ", ".join(numbers) in page.read_text()


def test_stored_rows_are_for_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_main(["--stored", "rows.jsonl"])
    assert "--stored needs --plot" in capsys.readouterr().err


def result(share: float) -> dict[str, Any]:
    layer = {"shape": "s", "what": "split 1/2", "share_of_products": share, "over_full": 0.5}
    step = {"what": "ours R/E 1", "over_transformers": 1.2, "share_of_bound": 1.0}
    peak = {"what": "shape", "products": "onednn", "over_torch": 1.25}
    sweep = {"what": "sweep", "rows": 9, "rows_per_answer": 90.0}
    tables = {"layers": [layer], "steps": [step], "peaks": [peak], "answers": [sweep]}
    return {"kind": "k", **tables}


def test_comparison_names_the_line_that_moved(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    assert "no baseline for k" in baseline.compare(result(0.7), baseline.load(path), whole=True)[0]
    baseline.store(result(0.7), path, whole=True)
    assert baseline.compare(result(0.71), baseline.load(path), whole=True) == [
        "all 6 ratios within 15% of the baseline"
    ]
    (line,) = baseline.compare(result(0.5), baseline.load(path), whole=True)
    assert line == "WORSE -29%: s | split 1/2 | share of product rate (0.70 -> 0.50)"
    fewer = {**result(0.7), "steps": []}
    assert baseline.compare(fewer, baseline.load(path), whole=True)[0].startswith("gone: step")


def test_one_part_is_compared_and_stored_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline.store(result(0.7), path, whole=True)
    part = {**result(0.7), "layers": [], "steps": [], "answers": []}
    part["peaks"][0]["over_torch"] = 2.5
    (line,) = baseline.compare(part, baseline.load(path), whole=False)
    assert line == "WORSE -50%: peak | shape | torch over onednn (0.80 -> 0.40)"
    baseline.store(part, path, whole=False)
    assert baseline.load(path)["k"]["peak | shape | torch over onednn"] == 0.4
    assert baseline.load(path)["k"]["step | ours R/E 1 | over_transformers"] == 1.2
