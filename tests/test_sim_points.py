"""What the cost model must not get wrong again, asked through its commands as a user would."""

from __future__ import annotations

import re

import pytest
from helpers_cli import fomoe

from fomoe_sim import layout, step

THREE = "configs/clusters/three-sites.yaml"
SITE = ["--model", "100b-moe", "--sites", "8", "--accelerators", "32"]


def project(*flags):
    outcome = fomoe("project", *flags, "--json")
    assert outcome.status == 0, outcome.err
    return outcome.json


# ------------------------------------------------------------- 1: traffic inside a site is not free

LONE = """
accelerators:
  LONE: {peak_flops: 989.0e+12, peak_fp32_flops: 66.9e+12, memory_bytes: 85.5e+9,
    memory_bandwidth: 3.35e+12, nvlink: 62.5e+9, nic: 62.5e+9, node: 1, host_bytes: 256.0e+9,
    watts: 700, price_per_hour: [2.0, 2.0], source: one card of 400 Gb/s that reaches 50 GB/s}
sites: [SITES]
"""


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [("--method diloco", 47), ("--replication 2", 13.4), ("--replication 1", 7.8)],
)
def test_shards_that_are_gathered_take_their_time(tmp_path, flags, seconds):
    """32 cards of one 400 Gb/s link each: two gathers and a scatter for 4 micro-batches."""
    path = tmp_path / "lone.yaml"
    sites = (f"{{name: s{i}, accelerator: LONE, count: 32, link: 1Gbit}}" for i in range(8))
    path.write_text(LONE.replace("SITES", ", ".join(sites)))
    degrees = "tp=1,pp=1,ep=1,shard=32,zero=3"
    flags = [*flags.split(), "--micro-batch", "1", "--parallel", degrees, "--recompute", "full"]
    outcome = fomoe("project", "--model", "100b-moe", "--cluster", path, *flags, "--json")
    row = outcome.json
    assert row["step_parts"]["shards"] == pytest.approx(seconds, rel=0.02)
    assert row["step_time_s"] >= row["step_parts"]["shards"]


def test_nvlink_and_the_search_lower_the_traffic_inside(tmp_path):
    row = project(*SITE, "--method", "diloco")
    assert row["step_parts"]["shards"] < 10
    assert row["layout"] != "one device"


# ------------------------------------------------------------------ 2: one question has one answer

ONE_ANSWER = {
    "local_steps=2": "--model 10b --method diloco --sites 4 --accelerators 1 --accelerator B200 "
    "--bandwidth 100Mbit --bits 8 --micro-batch 2 --rtt-ms 300 --batch-tokens 67108864 "
    "--fragments 5 --overlap-steps 1",
    "bandwidth=100Gbit": "--model proxy-54m --method ddp --sites 2 --accelerators 32 "
    "--accelerator A100 --micro-batch 2",
}


@pytest.mark.parametrize(("axis", "flags"), ONE_ANSWER.items())
def test_a_sweep_of_one_point_is_the_single_answer(axis, flags):
    name, value = axis.split("=")
    alone = project(*flags.split(), f"--{name.replace('_', '-')}", value)
    (swept,) = project(*flags.split(), "--sweep", axis)
    assert swept == {key: alone[key] for key in swept}


# -------------------------------------------------------------- 3: solved is least, plans come back


def test_the_solved_local_steps_are_the_least():
    flags = [*SITE, "--method", "spes"]
    solved = project(*flags, "--solve", "local_steps", "--utilisation", "0.95")["local_steps"]
    assert project(*flags, "--local-steps", solved)["utilisation"] >= 0.95
    assert project(*flags, "--local-steps", solved - 1)["utilisation"] < 0.95


def test_every_plan_row_is_reproduced_by_its_command():
    question = ["--cluster", THREE, "--model", "100b-moe", "--tokens", "2e12"]
    outcome = fomoe("plan", *question, "--json")
    assert outcome.status == 0, outcome.err
    rows = outcome.json["pareto"]
    assert rows
    for row in rows:
        again = fomoe(*row["command"].split()[1:], "--json").json
        assert {key: again[key] for key in row if key != "command"} == {
            key: value for key, value in row.items() if key != "command"
        }


# -------------------------------------------------------------- 4: failures reach days and money


def test_failures_reach_days_and_cost_and_the_risk_is_printed():
    calm = project(*SITE, "--mtbf-hours", "1e6")
    rough = project(*SITE, "--mtbf-hours", "10", "--repair-hours", "1")
    assert calm["days"] == pytest.approx(calm["days_without_failures"], rel=0.01)
    assert rough["days"] > 1.5 * rough["days_without_failures"]
    assert rough["cost_usd"] > 1.5 * calm["cost_usd"]
    assert rough["lost_hours_per_failure"] > 0
    outcome = fomoe("project", *SITE, "--replication", "1")
    assert "an expert loses its last live holder with probability" in outcome.out.replace("\n ", "")


# ------------------------------------------------------------- 5: unequal sites share by speed


def test_unequal_sites_end_their_steps_together():
    flags = ["--cluster", THREE, "--model", "100b-moe", "--local-steps", "100"]
    fair, equal = project(*flags), project(*flags, "--split", "equal")
    times = fair["step_time_s_by_site"]
    assert max(times) < 1.05 * min(times)
    assert len(set(fair["tokens_per_step_by_site"])) == 3
    assert sum(fair["tokens_per_step_by_site"]) == pytest.approx(
        sum(equal["tokens_per_step_by_site"])
    )
    assert equal["step_time_s"] > 1.7 * fair["step_time_s"]


# ----------------------------------------------- 6, 7: validation is by the code that projects


@pytest.fixture(scope="module")
def report():
    return fomoe("validate", "--json").json


def test_the_gain_of_skipping_is_the_trainers_own(report):
    (table,) = [t for t in report["tables"] if t["name"] == "own-gains"]
    assert len(table["cells"]) == 3
    assert all(abs(cell["error"]) <= 0.05 for cell in table["cells"])


def test_published_runs_are_answered_by_evaluate(report, monkeypatch):
    (table,) = [t for t in report["tables"] if t["name"] == "runs"]
    names = " ".join(cell["row"] for cell in table["cells"])
    for run in ("405B, MFU given", "405B, predicted", "DeepSeek-V3, predicted", "8B on 128"):
        assert run in names
    total = step.total
    monkeypatch.setattr(step, "total", lambda found, degrees: 1.3 * total(found, degrees))
    layout.choose.cache_clear()
    assert fomoe("validate").status == 1
    layout.choose.cache_clear()


def test_identities_are_gone_and_the_score_is_printed(report):
    names = {table["name"] for table in report["tables"]}
    assert not names & {"intellect-1", "activations", "deepseek-v3-money", "deepseek-v3-days"}
    summaries = {table["name"]: table["summary"] for table in report["tables"]}
    assert summaries["streaming-diloco-4-held-out"].startswith("24 of 25 exact")
    assert summaries["scaling-laws-6-held-out"].startswith("17 of 25 exact")


# --------------------------------------------------------------------------- 8: memory


def test_deepseek_v3_fits_where_it_ran():
    flags = "--model deepseek-v3 --sites 1 --accelerators 2048 --accelerator H800 --method ddp"
    more = "--batch-tokens 62914560 --states mixed --adam bf16"
    assert project(*flags.split(), *more.split())["fits"]


def test_memory_has_the_parts_that_were_missing():
    flags = ["--model", "llama3-8b", "--sites", "1", "--accelerators", "8", "--method", "ddp"]
    degrees = ["--parallel", "tp=1,pp=1,shard=8,zero=3", "--batch-tokens", "131072"]
    parts = project(*flags, *degrees)["memory_parts"]
    for name in ("unsharded gradients", "gathered layers", "context", "checkpoint copy"):
        assert parts[name]["bytes"] > 0, name
    sizes = [
        project(*flags, *degrees, "--adam", adam)["memory_parts"]["inner optimizer"]["bytes"]
        for adam in ("fp32", "bf16", "8bit")
    ]
    assert sizes[0] == pytest.approx(2 * sizes[1]) == pytest.approx(4 * sizes[2])


def test_tensor_pipeline_and_context_ranks_lower_memory():
    flags = ["--model", "llama3-405b", "--sites", "1", "--accelerators", "512", "--method", "ddp"]
    flags += ["--recompute", "full", "--batch-tokens", str(512 * 8192)]
    wide = project(*flags, "--parallel", "tp=1,pp=1,zero=3")
    for degrees in ("tp=8,pp=1,zero=3", "tp=1,pp=1,cp=4,zero=3"):
        narrow = project(*flags, "--parallel", degrees)
        assert narrow["memory_bytes_per_accelerator"] < wide["memory_bytes_per_accelerator"]


# --------------------------------------------------------------------------- 9: small things


def test_bits_may_be_a_share_of_one():
    row = project(*SITE, "--bits", "0.11")
    full = project(*SITE)
    name = "payload_bytes_per_site_per_round"
    assert row[name] == pytest.approx(full[name] * 0.11 / 32, rel=1e-6)


def test_shares_and_money_stay_in_their_ranges():
    for rate in ("1Tbit", "100Tbit"):
        for method in ("diloco", "streaming", "ddp"):
            row = project(*SITE, "--method", method, "--bandwidth", rate)
            assert 0 < row["utilisation"] <= 1
            assert row["idle_usd"] >= 0


@pytest.mark.parametrize(
    "words",
    [
        ["project", *SITE, "--compare", "ddp,diloco,streaming,spes,ep,fomoe"],
        ["project", "--config", "configs/quickstart.yaml", "--compare", "ddp,diloco,fomoe"],
        ["project", "--model", "deepseek-v3", "--sites", "8", "--sweep", "replication=1,2,4"],
        ["plan", "--cluster", THREE, "--model", "100b-moe", "--tokens", "2e12"],
    ],
)
def test_no_line_is_wider_than_a_hundred_columns(words):
    outcome = fomoe(*words)
    assert outcome.status == 0, outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 100
    assert not re.search(r"[0-9]e[-+][0-9]", outcome.out), "a power of ten is no figure for people"


def test_a_plan_names_the_cheaper_ones_that_its_defaults_keep_out():
    text = " ".join(fomoe("plan", *SITE).out.split())
    assert "cheaper configurations break the executed share constraint; the cheapest:" in text


def test_out_is_refused_before_anything_is_printed(tmp_path):
    flags = ["--cluster", THREE, "--model", "deepseek-v3", "--out", tmp_path / "plan.yaml"]
    outcome = fomoe("plan", *flags)
    assert outcome.status == 2
    assert outcome.out == ""
    assert "--trainable leaves nothing" in outcome.err


def test_a_comparison_begins_with_the_same_accelerators_on_one_site():
    rows = project(*SITE, "--compare", "diloco,fomoe")
    assert [row["method"] for row in rows] == ["one-site", "diloco", "fomoe"]
    assert rows[0]["accelerators"] == rows[1]["accelerators"] == 256
    solved = project(*SITE, "--method", "fomoe", "--solve", "break_even")
    assert solved["days"] <= rows[0]["days"] / rows[0]["tokens"] * solved["tokens"] * (1 + 1e-9)
    slower = project(*SITE, "--bandwidth", f"{solved['bandwidth_bps'] / 1.01:.0f}")
    assert slower["days"] > solved["days"]


def test_the_one_site_of_unequal_sites_pays_no_egress_and_fails_no_more_often():
    flags = ["--cluster", THREE, "--model", "100b-moe", "--mtbf-hours", "500"]
    rows = project(*flags, "--compare", "fomoe")
    assert rows[0]["egress_usd_high"] == 0
    rows += project(*SITE, "--compare", "fomoe", "--mtbf-hours", "500")
    rates = [row["failures_per_run"] / (24 * row["days"]) for row in rows]
    assert rates == pytest.approx([3 / 500] * 2 + [8 / 500] * 2), "as many sites fail as often"
