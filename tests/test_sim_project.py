"""`fomoe project`: the promised examples, the identities of its answers, and bad input."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import fields

import pytest

from fomoe.cli import main
from fomoe.load import load_config
from fomoe_sim.calibrate import Calibration, save_calibration
from fomoe_sim.cluster import price_kinds
from fomoe_sim.memory import ADAM, STATES
from fomoe_sim.options import OPTIONS, Ask
from fomoe_sim.plan import Constraints
from fomoe_sim.runs import most_step_flops
from fomoe_sim.shape import model_preset, token_work
from fomoe_sim.step import RECOMPUTE, VALUE_PASSES

PROMISED = {
    "model",
    "method",
    "num_sites",
    "replication_factor",
    "local_steps",
    "params_total",
    "params_active",
    "params_per_site",
    "payload_bytes_per_site_per_round",
    "wire_bytes_per_site_per_round",
    "ratio_vs_ddp",
    "ratio_vs_diloco",
    "memory_bytes_per_site",
    "step_time_s",
    "round_time_s",
    "utilisation",
}
THREE = "configs/clusters/three-sites.yaml"
CONFIG = """
num_sites: 4
local_steps: 32
model: {num_layers: 2, d_model: 32, num_heads: 4, expert_ffn_dim: 24, num_experts: 8}
placement: {replication_factor: 2}
data: {seq_len: 64}
"""


def project(capsys, *flags):
    """Rows of a question; the command must succeed."""
    assert main(["project", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *flags, command="project"):
    """The one line of a refused question."""
    code = main([command, *flags])
    captured = capsys.readouterr()
    assert code in (1, 2)
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_one_answer_has_every_promised_key(capsys):
    flags = "--model deepseek-v3 --sites 8 --replication 2 --local-steps 100 --bandwidth 1Gbit"
    row = project(capsys, *flags.split())
    assert set(row) >= PROMISED
    assert row["params_total"] == 671_026_419_200
    assert row["params_per_site"] == pytest.approx(16.96e9 + 654.1e9 / 4, rel=1e-3)
    assert row["ratio_vs_ddp"] == pytest.approx(100 * row["ratio_vs_diloco"])


def test_compare_shows_every_method_of_a_config(capsys, config):
    rows = project(capsys, "--config", config, "--compare", "ddp,diloco,streaming,spes,ep,fomoe")
    by_method = {row["method"]: row for row in rows}
    assert list(by_method) == ["one-site", "ddp", "diloco", "streaming", "spes", "ep", "fomoe"]
    assert by_method["ddp"]["ratio_vs_ddp"] == 1
    assert by_method["diloco"]["ratio_vs_ddp"] == 32
    assert by_method["streaming"]["ratio_vs_diloco"] == pytest.approx(8, rel=1e-3)


def test_paper_ratio(capsys):
    row = project(capsys, "--model", "proxy-54m", "--sites", "4", "--replication", "2")
    assert row["ratio_vs_ddp"] == pytest.approx(45.44, rel=2e-3)
    assert row["ratio_vs_diloco"] == pytest.approx(1.42, abs=5e-3)


def test_sweep_answers_what_makes_sense_and_names_the_rest(capsys):
    flags = (
        f"--cluster {THREE} --model qwen3-235b-a22b --sweep replication=1,2,4 local_steps=32..512"
    )
    assert main(["project", *flags.split(), "--csv"]) == 0
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    assert [row["local_steps"] for row in rows[:5]] == ["32", "64", "128", "256", "512"]
    assert {row["replication_factor"] for row in rows} == {"1", "2"}
    assert "--replication 4 exceeds the 3 sites" in captured.err


def test_a_calibration_replaces_our_defaults(capsys, config, tmp_path):
    """Round time as the fit itself predicts it; payload as planned."""
    own = load_config(config)
    fitted = Calibration(
        runs=("run",),
        step_time_s=0.02,
        step_flops=most_step_flops(own),
        step_fixed_s=0.005,
        effective_bps=1e8,
        sync_fixed_s=0.01,
        separated=True,
        num_rounds=4,
        link_efficiency=0.5,
    )
    path = str(tmp_path / "calibration.json")
    save_calibration(fitted, path)
    row = project(capsys, "--config", config, "--calibration", path)
    wire = row["wire_bytes_per_site_per_round"]
    assert row["step_time_s"] == pytest.approx(0.02)
    assert row["round_time_s"] == pytest.approx(32 * 0.02 + fitted.sync_s(wire))
    # Another link: its nominal rate times the fitted efficiency.
    slow = project(capsys, "--config", config, "--calibration", path, "--bandwidth", "20Mbit")
    expected = 32 * 0.02 + 0.01 + 8 * wire / 1e7
    assert slow["round_time_s"] == pytest.approx(expected)
    # Full replication executes everything, so its step is slower by the model's FLOPs.
    full = project(capsys, "--config", config, "--calibration", path, "--method", "diloco")
    assert full["step_time_s"] > row["step_time_s"]


def test_a_slower_site_holds_the_others_up(capsys):
    row = project(capsys, "--cluster", THREE, "--model", "olmoe-1b-7b", "--method", "diloco")
    assert row["slowest_link"] == "south up"
    assert row["utilisation"] < 1 - row["exposed_s_per_round"] / row["round_time_s"]


def test_shared_uplinks_carry_both_sites(capsys):
    path = "configs/clusters/shared-uplink.yaml"
    flags = ["--cluster", path, "--model", "olmoe-1b-7b"]
    row = project(capsys, *flags)
    assert row["slowest_link"] == "remote up"
    fast = project(capsys, *flags, "--bandwidth", "10Gbit")
    assert fast["slowest_link"] == "uplink campus up"


def test_money_ranges_are_ordered_and_idle_time_is_paid(capsys):
    row = project(capsys, "--model", "100b-moe", "--bandwidth", "10Gbit")
    assert row["cost_usd_low"] < row["cost_usd"] < row["cost_usd_high"]
    assert row["days_low"] < row["days"] < row["days_high"]
    assert 0 < row["idle_usd"] < row["cost_usd"]


def test_plots_are_drawn(capsys, tmp_path):
    for name, more in (
        ("lines.svg", ["--sweep", "bandwidth=100Mbit..10Gbit", "--compare", "fomoe,diloco"]),
        ("bars.svg", ["--compare", "fomoe,ddp"]),
    ):
        out = tmp_path / name
        assert main(["project", "--model", "100b-moe", *more, "--plot", str(out)]) == 0
        assert ElementTree.parse(out).getroot().tag.endswith("svg")
    assert "diloco" in (tmp_path / "lines.svg").read_text()


def test_every_field_of_real_output_is_explained_and_nothing_else(capsys, config):
    assert main(["project", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "arXiv 2412.19437" in text
    explained = {line.split("  (")[0].strip() for line in text.splitlines() if "  (" in line}
    explained = {name for name in explained if name}
    rows = [
        project(capsys, "--config", config),
        project(capsys, "--model", "dbrx", "--method", "streaming", "--states", "mixed"),
        project(capsys, "--model", "dbrx", "--outer-on", "accelerator"),
        project(capsys, "--model", "deepseek-v3", "--parallel", "tp=1,pp=1,ep=1,zero=3"),
    ]
    seen = {"memory_parts.*.where", "step_parts.*"}
    for row in rows:
        seen |= {name for name in row if name not in ("memory_parts", "step_parts")}
        seen |= {f"memory_parts.{name}.bytes" for name in row["memory_parts"]}
        assert all(set(part) == {"where", "bytes"} for part in row["memory_parts"].values())
    assert seen == explained


def test_options_have_the_choices_of_their_tables():
    """The command line is made from one file, the choices stand in others too."""
    said = {item.name for kind in (Ask, Constraints) for item in fields(kind)}
    assert said <= set(OPTIONS)
    assert OPTIONS["price_kind"][3] == [list(price_kinds())]
    assert OPTIONS["recompute"][3] == [list(RECOMPUTE)]
    assert OPTIONS["states"][3] == [list(STATES)]
    assert OPTIONS["adam"][3] == [list(ADAM)]
    assert OPTIONS["kernels"][3] == [list(VALUE_PASSES)]


def test_series_are_named_by_all_that_varies(capsys, tmp_path):
    out = tmp_path / "plot.svg"
    axes = ["bandwidth=1Gbit,2Gbit", "fragments=1,4", "overlap_steps=0,1", "local_steps=8,16"]
    assert main(["project", "--model", "dbrx", "--sweep", *axes, "--plot", str(out)]) == 0
    drawn = out.read_text()
    axes = [(h, f, o) for h in (8, 16) for f in (1, 4) for o in (0, 1)]
    names = {f"fomoe H={h} fragments={f} overlap={o}" for h, f, o in axes}
    assert names <= set(re.findall("<!-- (.*) -->", drawn))


def test_lines_of_a_plot_differ_and_so_do_their_legends(tmp_path, monkeypatch):
    """Where there are more lines than colours too; the legend shows colour and dashes."""
    kept = []
    monkeypatch.setattr("fomoe_sim.plot._write", lambda path, drawing: kept.append(drawing))
    sweep = ["--sweep", "replication=1,2,4", "bandwidth=1Gbit,2Gbit"]
    asked = ["--sites", "8", "--compare", "ddp,diloco,streaming,spes,fomoe,ep", *sweep]
    assert main(["project", "--model", "100b-moe", *asked, "--plot", "x.svg"]) == 0
    (drawing,) = kept
    lines = drawing.axes[0].lines
    assert len(lines) >= 8
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == len(looks)
    (legend,) = drawing.figure.legends
    entries = zip(legend.get_texts(), legend.get_lines(), strict=True)
    shown = {text.get_text(): (line.get_color(), line.get_linestyle()) for text, line in entries}
    assert list(shown.values()) == looks
    assert {"fomoe r=2", "ddp"} <= set(shown)


@pytest.mark.parametrize(
    "axes",
    [
        "replication=1,2,4 sites=8..17..1 bits=4,8,32 fragments=1..11..1 local_steps=1..10..1",
        "replication=1..4..1 local_steps=1..2500..1",
    ],
)
def test_ten_thousand_points_are_one_answer_each(capsys, axes):
    """Structural axes are grids of their own, the others arrays; `make bench` watches the speed."""
    assert main(["project", "--model", "deepseek-v3", "--sweep", *axes.split(), "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + (9900 if "sites" in axes else 10_000)
    assert len(set(lines)) == len(lines)


BAD_INPUT = {
    "--model olmo-1b-7b": "did you mean olmoe-1b-7b?",
    "--model dbrx --bandwidth 0Gbit": "above 0",
    "--model dbrx --bandwidth fast": "is not a link",
    "--model dbrx --sites 2 --replication 4": "exceeds the 2 sites",
    "--model dbrx --price -1": "--price -1.0 must not be negative",
    "--model gpt5": "is not a model preset; choose from olmoe-1b-7b, mixtral-8x7b",
    "--model 2b": "is not a model preset; choose from",
    "--model dbrx --accelerator TPU": "is not an accelerator preset; choose from A100, H100",
    "--model dbrx --method adamw": "is not a method; choose from",
    "--model dbrx --method dilco": "did you mean diloco?",
    "--model dbrx --accelerator H10": "did you mean H100?",
    "--model dbrx --config x.yaml": "name one of --model and --config",
    "--sites 3": "neither is given",
    "--model dbrx --sites 0": "above 0",
    "--model dbrx --method ddp --replication 2": "has no meaning for method ddp",
    "--model llama3-405b --replication 2": "without routed experts",
    "--model dbrx --method ddp --fragments 4": "communicates in every step",
    "--model dbrx --method ddp --compare ddp,fomoe": "contradicts --compare",
    "--model dbrx --solve bandwidth": "needs both",
    "--model dbrx --utilisation 0.9": "needs both",
    "--model dbrx --solve bandwidth --utilisation 0.9 --bandwidth 1Gbit": "contradicts --solve",
    "--model dbrx --solve bandwidth --utilisation 0.99 --local-steps 1": "is not reached",
    f"--model dbrx --cluster {THREE} --sites 4": "has 3 sites, not 4",
    f"--model dbrx --cluster {THREE} --accelerator H100": "contradicts --cluster",
    "--model dbrx --cluster three.yaml": "does not exist",
    "--model dbrx --sweep replcation=1,2": "did you mean replication?",
    "--model dbrx --sweep replication=a": "whole number",
    "--model dbrx --sweep replication=9,10": "leaves nothing",
    "--model dbrx --replication 2 --sweep replication=1,2": "contradicts --sweep",
    "--model dbrx --json --csv": "contradicts --json",
    "--model dbrx --explain --json": "--explain is text",
    "--model dbrx --compare ddp,dilco": "--compare dilco is not a method",
    "--model dbrx --plot out.txt": "must end in .svg, .png or .pdf",
    "--model dbrx --mfu 1.5": "--mfu 1.5 must be at most 1",
    "--model dbrx --mfu nan": "--mfu nan must be a number",
    "--model dbrx --tokens inf": "--tokens inf must be at most",
    "--model dbrx --price inf": "--price inf must be at most",
    "--model dbrx --repair-hours inf": "--repair-hours inf must be at most",
    "--model dbrx --mfu 1e-300": "--mfu 1e-300 must be at least",
    "--model dbrx --tokens 1e-300": "--tokens 1e-300 must be at least 1",
    "--model dbrx --mtbf-hours 1e-300": "--mtbf-hours 1e-300 must be at least",
    "--model dbrx --bandwidth 1e-300": "from 1 to 1e+18 bit/s",
    "--model dbrx --mtbf-hours -1": "--mtbf-hours -1.0 must be above 0",
    "--model dbrx --local-steps 100000000000000000000": "must be at most 1,000,000",
    f"--model dbrx --sites {'9' * 400}": "must be at most 256",
    f"--model dbrx --sweep sites={'9' * 400}": "must be a whole number",
    "--model dbrx --sweep sites=100000": "must be at most 256",
    "--model dbrx --bits 64": "--bits 64.0 must be at most 32",
    "--model dbrx --bits 0": "--bits 0.0 must be above 0",
    "--model dbrx --method photon": "needs --config",
    "--model dbrx --parallel tp=2,qq=3": "--parallel qq=3 must be one of tp, pp",
    "--model dbrx --parallel tp=0": "--parallel tp 0 must be one whole number above 0",
    "--model dbrx --parallel zero=2": "--parallel zero 2 must be 1 or 3",
    "--model dbrx --capacity 8,8": "one number for each of the 4 sites",
    "--model dbrx --capacity 1,1,1,1": "--capacity 1,1,1,1 has capacity for 4 experts",
    "--model dbrx --capacity a": "must be whole numbers",
    "--model dbrx --capacity 8,8,8,8 --replication 2": "contradicts --capacity",
    "--model dbrx --price 2 --price-kind spot": "contradicts --price",
    "--model dbrx --tornado --json": "asks about one question",
    "--model dbrx --solve break_even --bandwidth 1Gbit": "contradicts --solve break_even",
    "--model no.yaml": "does not exist",
    "--model dbrx --bandwidth .": "is not a link",
    "--model dbrx --bandwidth 1GB/s": "is in bytes",
    "--model dbrx --bandwidth 1e300Gbit": "to 1e+18 bit/s",
    "--model dbrx --step-time 1 --mfu 0.3": "--mfu 0.3 contradicts --step-time",
    "--model dbrx --batch-tokens 10000": "leaves accelerators idle",
    "--model dbrx --compare ddp,ep --outer-on disk": "has no meaning for ddp",
    "--model dbrx --method ddp --sweep fragments=1,2": "--sweep fragments has no meaning",
    "--model 10b --sweep replication=1,2": "without routed experts",
    "--model dbrx --method single": "needs --config",
    "--model dbrx --cluster configs/clusters/shared-uplink.yaml --solve bandwidth "
    "--utilisation 0.999": "uplink campus up",
    "--model dbrx --accelerator A100 --precision fp8": "--precision fp8 has no rate on A100",
}


@pytest.mark.parametrize(("flags", "words"), BAD_INPUT.items())
def test_bad_input_is_one_clear_line(capsys, flags, words):
    assert words in refusal(capsys, *flags.split())


@pytest.mark.parametrize("flag", ["--bandwidth", "--model", "--cluster", "--method"])
def test_an_empty_text_is_refused(capsys, flag):
    flags = [] if flag == "--model" else ["--model", "dbrx"]
    assert flag in refusal(capsys, *flags, flag, "")


def test_a_cluster_that_is_too_small_is_refused(capsys, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("sites: [{name: lone, accelerator: L40S, count: 1, link: 1Gbit}]")
    assert "lone does not fit" in refusal(
        capsys, "--model", "deepseek-v3", "--cluster", str(path), "--csv"
    )
    site = "accelerator: L40S, count: 8, link: 1Gbit, capacity: 3"
    path.write_text(f"sites: [{{name: a, {site}}}, {{name: b, {site}}}]")
    assert "has capacity for 6 experts" in refusal(
        capsys, "--model", "mixtral-8x7b", "--cluster", str(path)
    )


def test_a_configs_capacities_are_its_own(capsys, config, tmp_path):
    path = tmp_path / "cluster.yaml"
    site = "accelerator: L40S, count: 1, link: 1Gbit, capacity: 8"
    path.write_text("sites: [" + ", ".join(f"{{name: s{i}, {site}}}" for i in range(4)) + "]")
    words = refusal(capsys, "--config", config, "--cluster", str(path))
    assert "placement.capacity" in words


def capacity_cluster(tmp_path, *capacities):
    """Sites that only differ in the experts per layer that they may hold."""
    path = tmp_path / "cluster.yaml"
    site = "accelerator: H200, count: 64, link: 1Gbit"
    sites = (f"{{name: s{i}, {site}, capacity: {c}}}" for i, c in enumerate(capacities))
    path.write_text(f"sites: [{', '.join(sites)}]")
    return str(path)


@pytest.mark.parametrize(
    ("method", "holds"),
    [("diloco", 8), ("streaming", 8), ("ddp", 8), ("spes", 8), ("ep", 4)],
)
def test_a_method_that_stores_more_than_a_sites_capacity_does_not_fit(
    capsys, tmp_path, method, holds
):
    path = capacity_cluster(tmp_path, 8, 3)
    flags = ["--model", "mixtral-8x7b", "--cluster", path, "--method", method]
    assert main(["project", *flags, "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert not row["fits"]
    assert (
        f"s1 does not fit: it holds {holds} experts per layer, capacity 3" in row["memory_verdict"]
    )


@pytest.mark.parametrize("method", ["fomoe", "fsdp"])
def test_placement_by_capacity_and_shards_keep_to_it(capsys, tmp_path, method):
    path = capacity_cluster(tmp_path, 8, 3)
    flags = ["--model", "mixtral-8x7b", "--cluster", path, "--method", method]
    assert project(capsys, *flags)["fits"]


def test_a_steered_router_executes_its_target(capsys, config):
    with open(config, "a") as file:
        file.write("router: {execute_target: 0.75}\n")
    assert project(capsys, "--config", config)["executed_fraction"] == 0.75
    assert project(capsys, "--config", config, "--replication", "4")["executed_fraction"] == 1


@pytest.mark.parametrize(
    ("choice", "ours"), [("none", "none"), ("experts", "experts"), ("layers", "full")]
)
def test_a_config_recomputes_what_it_says(capsys, config, choice, ours):
    with open(config, "w") as file:
        file.write(CONFIG.replace("num_experts: 8", f"num_experts: 8, recompute: {choice}"))
    row = project(capsys, "--config", config)
    assert row["recompute"] == ours
    flagged = project(capsys, "--config", config, "--recompute", "full")
    assert flagged["recompute"] == "full"
    assert row["step_time_s"] <= flagged["step_time_s"]
    name = "memory_bytes_per_accelerator"
    assert row[name] >= flagged[name]


def test_a_configs_own_methods_have_their_own_names(capsys, config):
    names = "resident-routing,dense,diloco-half,single"
    rows = project(capsys, "--config", config, "--compare", names)
    assert [row["method"] for row in rows] == ["one-site", *names.split(",")]
    rows = rows[1:]
    assert rows[0]["executed_fraction"] == 1
    assert rows[1]["params_total"] < rows[0]["params_total"]
    assert rows[3]["num_sites"] == 1


def fitted(tmp_path, **changes):
    """A calibration file."""
    values = {
        "runs": ("run",),
        "step_time_s": 0.02,
        "step_flops": 1e9,
        "effective_bps": 1e8,
        "sync_fixed_s": 0.01,
        "separated": True,
        "num_rounds": 4,
        "link_efficiency": 0.5,
    }
    path = str(tmp_path / "fitted.json")
    save_calibration(Calibration(**(values | changes)), path)
    return path


def test_a_swept_or_solved_link_has_the_fitted_efficiency(capsys, config, tmp_path):
    flags = ["--config", config, "--calibration", fitted(tmp_path)]
    alone = project(capsys, *flags, "--bandwidth", "20Mbit")
    (swept,) = project(capsys, *flags, "--sweep", "bandwidth=20Mbit")
    assert swept["round_time_s"] == pytest.approx(alone["round_time_s"])
    target = str(alone["utilisation"])
    solved = project(capsys, *flags, "--solve", "bandwidth", "--utilisation", target)
    assert solved["bandwidth_bps"] == pytest.approx(2e7, rel=2e-3)
    lacking = fitted(tmp_path, link_efficiency=None)
    words = refusal(
        capsys, "--config", config, "--calibration", lacking, "--sweep", "bandwidth=1e8"
    )
    assert "has no link efficiency" in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rtt-ms 10", "--rtt-ms 10.0 contradicts --calibration"),
        ("--mfu 0.3", "--mfu 0.3 contradicts --calibration"),
        ("--accelerator A100", "--accelerator A100 contradicts --calibration"),
        ("--accelerators 2", "--accelerators 2 contradicts --calibration"),
        ("--step-time 1", "--step-time 1.0 contradicts --calibration"),
        ("--recompute full", "--recompute full contradicts --calibration"),
    ],
)
def test_what_a_calibration_fixes_is_not_asked_again(capsys, config, tmp_path, flags, words):
    path = fitted(tmp_path)
    assert words in refusal(capsys, "--config", config, "--calibration", path, *flags.split())


def test_plan_refuses_what_project_refuses(capsys):
    shared = ["--model", "dbrx", "--sites", "2"]
    for flags, words in (
        (["--replication", "4"], "--replication 4 exceeds the 2 sites"),
        (["--method", "ddp", "--fragments", "4"], "has no meaning for ddp"),
        (["--method", "dilco"], "did you mean diloco?"),
        (["--fragments", "400"], "exceeds the 40 layers"),
    ):
        assert words in refusal(capsys, *shared, *flags, command="plan")


def test_a_given_step_time_scales_with_the_executed_flops(capsys):
    """1 - f (1 - s), f the experts' share of the FLOPs and s the executed share."""
    shared = ["--model", "mixtral-8x7b", "--sites", "4", "--step-time", "8"]
    full = project(capsys, *shared, "--method", "diloco")
    half = project(capsys, *shared, "--replication", "2")
    token = token_work(model_preset("mixtral-8x7b"), 4096)
    share = 1 - token.experts / token.full * (1 - half["executed_fraction"])
    assert half["step_time_s"] / full["step_time_s"] == pytest.approx(share)


def test_a_given_mfu_is_the_models_flops_over_peak(capsys):
    flags = "--model deepseek-v3 --sites 1 --accelerator H800 --accelerators 2048 --tokens 1e12"
    row = project(capsys, *flags.split(), "--method", "ddp", "--mfu", "0.35")
    assert row["mfu"] == pytest.approx(0.35)
    flops = 1e12 * token_work(model_preset("deepseek-v3"), 4096).full
    seconds = flops / (0.35 * 989e12 * 2048)
    assert row["days_without_failures"] == pytest.approx(seconds / 86400)
    assert row["cost_usd_low"] == pytest.approx(2 * 2048 * 24 * row["days"])


def test_fp32_products_run_slower_than_bf16(capsys, config):
    rows = {}
    for precision in ("fp32", "bf16"):
        path = config.replace("small", precision)
        with open(path, "w") as file:
            file.write(CONFIG + f"inner: {{precision: {precision}}}\n")
        rows[precision] = project(capsys, "--config", path)
    assert rows["fp32"]["step_time_s"] > rows["bf16"]["step_time_s"]
    parts = [rows[p]["memory_parts"]["activations"]["bytes"] for p in ("fp32", "bf16")]
    assert parts[0] == pytest.approx(2 * parts[1], rel=1e-5)


def test_fp8_products_run_at_the_rate_of_the_datasheet(capsys):
    shared = ["--model", "dbrx", "--parallel", "tp=1,pp=1,ep=1,zero=3", "--micro-batch", "1"]
    bf16, fp8 = (project(capsys, *shared, "--precision", name) for name in ("bf16", "fp8"))
    times = [row["step_parts"]["products"] for row in (bf16, fp8)]
    assert times[0] / times[1] == pytest.approx(0.75 * 1979 / 989), "three quarters of its share"
    assert bf16["step_parts"]["attention scores"] == fp8["step_parts"]["attention scores"]
    assert "products in fp8" in fp8["needs"]
    assert "products in fp8" not in bf16["needs"]


def test_a_sync_costs_once_however_many_fragments_share_its_step(capsys):
    shared = ["--model", "olmoe-1b-7b", "--bandwidth", "1Mbit", "--local-steps", "1"]
    one = project(capsys, *shared)
    many = project(capsys, *shared, "--sweep", "fragments=16")[0]
    assert many["round_time_s"] == pytest.approx(one["round_time_s"])


def test_prices_kinds_and_energy(capsys):
    shared = ["--model", "100b-moe"]
    listed, spot = (project(capsys, *shared, *more) for more in ((), ("--price-kind", "spot")))
    assert spot["cost_usd"] < 0.7 * listed["cost_usd"]
    hours = 24 * listed["days"]
    assert listed["energy_mwh"] == pytest.approx(1.2 * 256 * 700 * hours / 1e6)
    assert listed["carbon_t"] == pytest.approx(0.414 * listed["energy_mwh"])


def test_more_tokens_for_the_same_loss(capsys):
    shared = ["--model", "100b-moe", "--sites", "8"]
    plain = project(capsys, *shared)
    more = project(capsys, *shared, "--token-overhead", "1.5")
    assert plain["token_overhead"] > 1
    assert more["token_overhead"] == pytest.approx(1.5 * plain["token_overhead"])
    assert plain["days_at_equal_loss"] == pytest.approx(plain["days"] * plain["token_overhead"])
    assert project(capsys, *shared, "--method", "ddp")["token_overhead"] == 1


def test_a_tornado_shows_what_moves_the_answer_most(capsys, tmp_path):
    out = tmp_path / "tornado.svg"
    assert main(["project", "--model", "100b-moe", "--tornado", "--plot", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "every link, half and twice" in lines[1] + lines[2], "1 Gbit/s: the link matters most"
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


def test_wide_tables_show_more(capsys):
    flags = ["project", "--model", "100b-moe", "--sites", "8", "--wide"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "equal work" in out
    assert "payload/round" in out
