"""Risk: downtime with what a site must fetch, donors and shared links, coverage."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from fomoe_sim.answer import answer
from fomoe_sim.cluster import load_cluster
from fomoe_sim.flags import add_question_flags
from fomoe_sim.question import Point, build_scenario
from fomoe_sim.rejoin import rejoin
from fomoe_sim.risk import RiskOptions, risk_columns


def scenario(method="fomoe", *flags):
    parser = argparse.ArgumentParser()
    add_question_flags(parser)
    return build_scenario(
        parser.parse_args(["--model", "olmoe-1b-7b", *flags]), Point(method=method)
    )


def risk(scenario_, **options):
    return risk_columns(scenario_, answer(scenario_), RiskOptions(**options))


def test_a_joiner_fetches_the_anchor_and_outer_momentum_or_parameters_and_moments():
    total = scenario().shape.total
    for method, width in (("diloco", 8), ("streaming", 8), ("photon", 4), ("spes", 4), ("ddp", 12)):
        amounts, _ = rejoin(scenario(method))
        assert amounts == pytest.approx(width * total), method


def test_what_nobody_else_holds_is_not_fetched():
    found = scenario("fomoe", "--replication", "1")
    assert rejoin(found)[0] == pytest.approx(8 * found.shape.shared_total)
    assert rejoin(scenario("ep"))[0] == pytest.approx(12 * found.shape.shared_total)
    assert not rejoin(scenario("fsdp"))[0].any()
    assert not rejoin(scenario("diloco", "--sites", "1"))[0].any()


def test_the_joiners_downlink_or_the_donors_uplinks_limit_a_rejoin():
    amount = 8 * 8 * scenario().shape.total
    for link, limit in (("1Gbit/100Mbit", 1e8), ("10Mbit/1Gbit", 3 * 1e7)):
        found = scenario("diloco", "--bandwidth", link)
        _, seconds = rejoin(found)
        assert seconds == pytest.approx(amount / (limit * found.cluster.efficiency)), link


def test_experts_come_from_their_other_holders_only():
    """Two holders per expert: half of the experts' bytes pass each of two uplinks at most."""
    found = scenario("fomoe", "--replication", "2", "--bandwidth", "10Mbit/1Tbit")
    shape = found.shape
    shared, experts = shape.shared_total / 3, shape.expert_total / 2 / 2
    expected = 8 * 8 * (shared + experts) / (1e7 * found.cluster.efficiency)
    assert rejoin(found)[1].max() == pytest.approx(expected, rel=1e-3)


def test_a_shared_uplink_carries_all_that_passes_it(tmp_path):
    path = tmp_path / "campus.yaml"
    site = "accelerator: H100, count: 64, link: 1Tbit"
    path.write_text(
        "shared_uplinks: {campus: 1Gbit}\n"
        f"sites: [{{name: a, {site}, uplink: campus}}, {{name: b, {site}, uplink: campus}}, "
        f"{{name: c, {site}}}]"
    )
    found = scenario("diloco")
    cluster = load_cluster(str(path))
    full = replace(scenario("diloco", "--sites", "3"), cluster=cluster)
    _, seconds = rejoin(full)
    assert seconds == pytest.approx(8 * 8 * found.shape.total / (1e9 * cluster.efficiency))


def test_downtime_is_repair_and_rejoin():
    """A slow link keeps a site away for longer, which costs availability and coverage."""
    slow, fast = (scenario("fomoe", "--bandwidth", rate) for rate in ("100Mbit", "1Tbit"))
    options = {"mtbf_hours": 200.0, "repair_hours": 0.1}
    away, back = (risk(s, **options) for s in (slow, fast))
    down = 0.1 + away["rejoin_time_s"] / 3600
    assert down > 0.5
    assert away["time_share_with_quorum"] == pytest.approx((200 / (200 + down)) ** 4)
    assert back["time_share_with_quorum"] > away["time_share_with_quorum"]
    days = answer(slow)["days"]
    assert away["days_with_failures"] == pytest.approx(days / away["time_share_with_quorum"])
    # Four pairs of holders; both are down for share q^2 of the time.
    q = down / (200 + down)
    assert away["coverage_pause_hours"] == pytest.approx(24 * days * 4 * q**2)
    assert away["coverage_loss_events"] == pytest.approx(24 * days * 4 * q**2 * 2 / down)


def test_a_config_stored_everywhere_counts_each_set_of_holders_once(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("num_sites: 3\nplacement: {replication_factor: 1, store: all}\n")
    parser = argparse.ArgumentParser()
    add_question_flags(parser)
    args = parser.parse_args(["--config", str(path)])
    found = build_scenario(args, Point(method="fomoe"))
    row = risk(found, mtbf_hours=1.0, repair_hours=1.0)
    q = 1 / (2 + row["rejoin_time_s"] / 3600)
    hours = 24 * answer(found)["days"]
    assert row["coverage_pause_hours"] == pytest.approx(hours * (1 - q) ** 3)
