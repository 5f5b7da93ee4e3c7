"""Traffic: closed forms equal to the trainer's segments, and the identities of the methods."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe.load import build_config
from fomoe.planning import plan_run
from fomoe.segments import sync_traffic, wire_elements
from fomoe_sim.methods import METHODS
from fomoe_sim.shape import model_preset, shape_from_config
from fomoe_sim.traffic import cyclic_holdings, executed_share, method_traffic, table_holdings

SMALL = {"d_model": 24, "num_heads": 3, "expert_ffn_dim": 5}


def built(num_sites, placement, num_experts, num_layers):
    model = {**SMALL, "num_experts": num_experts, "num_layers": num_layers}
    config = build_config({"num_sites": num_sites, "placement": placement, "model": model})
    run = plan_run(config)
    return shape_from_config(config, "small"), run.placement, run.segment_plan


def hold_equal(shape, table, plan, holdings):
    traffic = method_traffic(shape, METHODS["fomoe"], holdings)
    for site in range(plan.num_sites):
        counted = sync_traffic(plan, site)
        assert counted.payload_shared == 4 * traffic.shared[site]
        assert counted.payload_expert == 4 * traffic.experts[site]
        assert counted.wire == 4 * traffic.sent[site]
        assert plan.numel_at(site) == traffic.held[site]
        residents = [len(experts) for experts in table.residents(site).values()]
        assert residents == traffic.residents[:, site].tolist()


@pytest.mark.parametrize(
    ("num_sites", "replication", "num_experts", "num_layers"),
    [
        (4, 2, 8, 3),
        (4, 4, 8, 3),
        (3, 2, 8, 5),
        (5, 1, 7, 2),
        (5, 3, 7, 2),
        (1, 1, 4, 2),
        (8, 3, 4, 2),
    ],
)
def test_cyclic_closed_form_equals_the_segments(num_sites, replication, num_experts, num_layers):
    placement = {"replication_factor": replication}
    shape, table, plan = built(num_sites, placement, num_experts, num_layers)
    hold_equal(shape, table, plan, cyclic_holdings(shape, num_sites, replication))
    hold_equal(shape, table, plan, table_holdings(shape, table))


@pytest.mark.parametrize(
    "placement",
    [
        {"capacity": [8, 5, 2]},
        {"capacity": [8, 5, 4], "replication_factor": 2},
        {"kind": "common", "num_common": 3},
        {"kind": "table", "table": [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2], [0], [2]]},
    ],
)
def test_any_placement_equals_the_segments(placement):
    shape, table, plan = built(3, placement, 8, 4)
    hold_equal(shape, table, plan, table_holdings(shape, table))


def proxy(method, num_sites=4, replication=2):
    shape = model_preset("proxy-54m")
    holdings = cyclic_holdings(shape, num_sites, replication)
    return shape, method_traffic(shape, METHODS[method], holdings)


def reduced(traffic):
    return traffic.shared + traffic.experts


def test_ddp_moves_what_diloco_moves():
    """Equal per exchange; DDP exchanges every step, DiLoCo every H steps."""
    _, ddp = proxy("ddp")
    _, diloco = proxy("diloco")
    np.testing.assert_array_equal(reduced(ddp), reduced(diloco))
    np.testing.assert_array_equal(ddp.sent, diloco.sent)


def test_full_replication_equals_diloco():
    _, fomoe = proxy("fomoe", replication=4)
    _, diloco = proxy("diloco")
    for name in ("shared", "experts", "sent", "received", "held"):
        np.testing.assert_array_equal(getattr(fomoe, name), getattr(diloco, name))


def test_one_holder_sends_shared_parameters_only():
    shape, traffic = proxy("fomoe", replication=1)
    assert not traffic.experts.any()
    assert set(traffic.shared) == {shape.shared_total}


def test_paper_ratio_on_the_proxy():
    """45.4 = H x N / N_synced, with 0.703 of the parameters synced (arXiv 2606.19025)."""
    shape, traffic = proxy("fomoe")
    synced = reduced(traffic)[0]
    assert synced / shape.total == pytest.approx(0.703, abs=1e-3)
    assert 32 * shape.total / synced == pytest.approx(45.44, rel=2e-3)


def test_payload_follows_the_formula_of_any_replication():
    shape = model_preset("deepseek-v3")
    for r in (2, 4, 8):
        traffic = method_traffic(shape, METHODS["fomoe"], cyclic_holdings(shape, 8, r))
        formula = shape.shared_total + shape.expert_total * r / 8
        np.testing.assert_allclose(reduced(traffic), formula, rtol=1e-9)


def test_fsdp_moves_half_as_much_again_as_ddp():
    _, ddp = proxy("ddp")
    _, fsdp = proxy("fsdp")
    np.testing.assert_allclose(fsdp.sent, 1.5 * ddp.sent)


def test_spes_sends_its_share_and_receives_everything():
    shape, traffic = proxy("spes")
    np.testing.assert_allclose(traffic.sent, shape.shared_total + shape.expert_total / 2)
    np.testing.assert_array_equal(traffic.received, shape.total)
    np.testing.assert_array_equal(traffic.held, shape.total)


def test_expert_parallelism_moves_tokens():
    shape, traffic = proxy("ep")
    tokens = 4 * shape.top_k * (1 - 1 / 4) * shape.d_model * 2 * shape.num_moe_layers
    assert traffic.token_bytes == pytest.approx(tokens)
    np.testing.assert_array_equal(traffic.shared, shape.shared_total)
    assert not traffic.experts.any()


@pytest.mark.parametrize("method", ["fomoe", "diloco", "ddp", "fsdp", "ep", "spes"])
def test_one_site_sends_nothing(method):
    _, traffic = proxy(method, num_sites=1, replication=1)
    assert not traffic.sent.any()
    assert not reduced(traffic).any()
    assert not traffic.token_bytes


@pytest.mark.parametrize("num_sites", [2, 5, 8])
def test_a_ring_sends_the_vector_2n_minus_2_times(num_sites):
    """A mean over n holders takes at least 2 (n - 1) vectors in all, and this takes no more."""
    shape, traffic = proxy("diloco", num_sites=num_sites, replication=1)
    assert traffic.sent.sum() == shape.total * 2 * (num_sites - 1)
    assert traffic.hops == 2 * (num_sites - 1)


def test_ring_equals_the_trainers_wire_elements():
    shape, traffic = proxy("diloco", num_sites=3, replication=1)
    full = [wire_elements(shape.shared_total, 3, i) for i in range(3)]
    experts = [wire_elements(shape.expert_total, 3, i) for i in range(3)]
    assert traffic.sent.tolist() == [a + b for a, b in zip(full, experts, strict=True)]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "residents", "plain", "at_least_one"),
    [(8, 2, 4, 0.5, 0.61), (64, 8, 32, 0.5, 0.5003)],
)
def test_executed_share(num_experts, top_k, residents, plain, at_least_one):
    model = {**SMALL, "num_experts": num_experts, "top_k": top_k}
    config = build_config({"placement": {"replication_factor": 2}, "model": model})
    shape = shape_from_config(config, "small")
    counts = np.full((3, 4), residents)
    assert executed_share(shape, counts, False)[0] == pytest.approx(plain)
    assert executed_share(shape, counts, True)[0] == pytest.approx(at_least_one, abs=0.005)


def test_more_replicas_execute_more():
    shape = model_preset("proxy-54m")
    shares = [
        executed_share(shape, cyclic_holdings(shape, 8, r).residents, True).min()
        for r in range(1, 9)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 1
