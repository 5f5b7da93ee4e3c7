"""Risk: downtime with what a site must fetch, donors and shared links, coverage, lost work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fomoe_sim.cluster import read_cluster
from fomoe_sim.evaluate import answer_one
from fomoe_sim.options import Ask
from fomoe_sim.question import build
from fomoe_sim.risk import rejoin

HERE = np.array([np.nan])


def asked(method="fomoe", **more):
    return build(Ask(model="olmoe-1b-7b", **more), method)


def test_a_joiner_fetches_the_anchor_and_outer_momentum_or_parameters_and_moments():
    total = asked().shape.total
    for method, width in (("diloco", 8), ("streaming", 8), ("spes", 4), ("ddp", 12)):
        amounts, _ = rejoin(asked(method), HERE)
        assert amounts == pytest.approx(width * total), method


def test_what_nobody_else_holds_is_not_fetched():
    found = asked(replication=1)
    assert rejoin(found, HERE)[0] == pytest.approx(8 * found.shape.shared_total)
    assert rejoin(asked("ep"), HERE)[0] == pytest.approx(12 * found.shape.shared_total)
    assert not rejoin(asked("fsdp"), HERE)[0].any()
    assert not rejoin(asked("diloco", sites=1), HERE)[0].any()


def test_the_joiners_downlink_or_the_donors_uplinks_limit_a_rejoin():
    amount = 8 * 8 * asked().shape.total
    for link, limit in (("1Gbit/100Mbit", 1e8), ("10Mbit/1Gbit", 3 * 1e7)):
        found = asked("diloco", bandwidth=link)
        _, seconds = rejoin(found, HERE)
        assert seconds == pytest.approx(amount / (limit * found.cluster.efficiency)), link


def test_a_bandwidth_of_the_grid_is_that_of_every_link():
    found = asked("diloco", bandwidth="1Gbit")
    _, seconds = rejoin(asked("diloco"), np.array([1e9, 2e9]))
    np.testing.assert_allclose(seconds[0], rejoin(found, HERE)[1][0])
    np.testing.assert_allclose(seconds[0], 2 * seconds[1])


def test_experts_come_from_their_other_holders_only():
    """Two holders per expert: half of the experts' bytes pass each of two uplinks at most."""
    found = asked(replication=2, bandwidth="10Mbit/1Tbit")
    shape = found.shape
    shared, experts = shape.shared_total / 3, shape.expert_total / 2 / 2
    expected = 8 * 8 * (shared + experts) / (1e7 * found.cluster.efficiency)
    assert rejoin(found, HERE)[1].max() == pytest.approx(expected, rel=1e-3)


def test_a_shared_uplink_carries_all_that_passes_it(tmp_path):
    path = tmp_path / "campus.yaml"
    site = "accelerator: H100, count: 64, link: 1Tbit"
    path.write_text(
        "shared_uplinks: {campus: 1Gbit}\n"
        f"sites: [{{name: a, {site}, uplink: campus}}, {{name: b, {site}, uplink: campus}}, "
        f"{{name: c, {site}}}]"
    )
    cluster = read_cluster(str(path))
    full = replace(asked("diloco", sites=3), cluster=cluster)
    _, seconds = rejoin(full, HERE)
    expected = 8 * 8 * full.shape.total / (1e9 * cluster.efficiency)
    assert seconds == pytest.approx(expected)


def test_downtime_lost_work_and_copies_make_the_goodput():
    """A slow link keeps a site away for longer, which costs availability and coverage."""
    options = {"mtbf_hours": 200.0, "repair_hours": 0.1, "checkpoint_minutes": 6000.0}
    away = answer_one(asked(bandwidth="100Mbit", **options))
    back = answer_one(asked(bandwidth="1Tbit", **options))
    down = 0.1 + away["rejoin_time_s"] / 3600
    assert down > 0.5
    assert away["lost_hours_per_failure"] == 50, "half of what lies between two checkpoints"
    up = (200 / (200 + down)) ** 4
    assert away["goodput"] == pytest.approx(up / (1 + 4 / 200 * 50), rel=1e-3)
    assert back["goodput"] > away["goodput"]
    assert away["days"] == pytest.approx(away["days_without_failures"] / away["goodput"])
    assert away["failures_per_run"] == pytest.approx(24 * away["days"] * 4 / 200)
    # Four pairs of holders; a pair loses its last live one at the rate q^2 x 2 / downtime.
    q = down / (200 + down)
    events = 24 * away["days"] * 4 * q**2 * 2 / down
    assert away["coverage_loss_probability"] == pytest.approx(1 - np.exp(-events))


def test_a_round_is_lost_where_it_is_longer_than_a_checkpoint():
    row = answer_one(asked(bandwidth="1Mbit", checkpoint_minutes=1.0))
    assert row["lost_hours_per_failure"] == pytest.approx(row["round_time_s"] / 3600 / 2)


def test_risk_of_losing_an_expert_falls_with_replication():
    losses = [
        answer_one(build(Ask(model="100b-moe", sites=8, replication=r, mtbf_hours=100.0), "fomoe"))
        for r in (1, 2, 4)
    ]
    chances = [row["coverage_loss_probability"] for row in losses]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 100 * chances[2]


def test_a_config_stored_everywhere_counts_each_set_of_holders_once(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("num_sites: 3\nplacement: {replication_factor: 1, store: all}\n")
    row = answer_one(build(Ask(config=str(path), mtbf_hours=1.0, repair_hours=1.0), "fomoe"))
    down = 1 + row["rejoin_time_s"] / 3600
    q = down / (1 + down)
    events = 24 * row["days"] * q**3 * 3 / down
    assert row["coverage_loss_probability"] == pytest.approx(1 - np.exp(-events), rel=1e-6)
