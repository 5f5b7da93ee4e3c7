"""Memory and step time of a site: the trainer's own count, monotone in r, verdicts that say why."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe.load import load_config
from fomoe.memory import site_memory
from fomoe.planning import plan_run
from fomoe_sim import layout, step
from fomoe_sim.cluster import accelerator_preset
from fomoe_sim.evaluate import answer_one, evaluate
from fomoe_sim.options import Ask
from fomoe_sim.question import build
from fomoe_sim.shape import model_preset
from fomoe_sim.sites import grid
from fomoe_sim.step import Inside, SiteWork
from fomoe_sim.trainer import ConfigError, read_data

CONFIG = """
num_sites: 3
model: {num_layers: 3, d_model: 32, num_heads: 4, expert_ffn_dim: 24, num_experts: 7}
placement: {replication_factor: 2}
data: {seq_len: 64}
"""


def work(name="100b-moe", count=32, tokens=0.0, residents=0.0, **inside):
    shape = model_preset(name)
    options = {
        "shape": shape,
        "device": accelerator_preset("H100"),
        "count": count,
        "inside": Inside(seq_len=4096, **inside),
        "tokens": tokens or count * 4.0 * 4096,
        "executed": 1.0,
        "residents": residents or float(shape.num_experts),
        "experts": float(shape.expert_total),
        "shared": float(shape.shared_total),
        "trained": float(shape.total),
    }
    return SiteWork(**options)


@pytest.mark.parametrize("method", ["fomoe", "diloco", "photon", "ddp", "spes"])
def test_states_of_a_config_are_the_trainers(tmp_path, method):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    config = load_config(path, [f"method={method}"])
    plan = plan_run(config).segment_plan
    row = answer_one(build(Ask(config=str(path)), method))
    parts = {name: part["bytes"] for name, part in row["memory_parts"].items()}
    trainers = [site_memory(config, plan, site) for site in range(3)]
    found = [parts[n] for n in ("parameters", "gradients", "inner optimizer")]
    assert found in [[t.parameters, t.gradients, t.inner_optimizer] for t in trainers]
    assert parts.get("anchor", 0) in [t.anchor for t in trainers]
    assert parts.get("outer momentum", 0) in [t.outer_optimizer for t in trainers]


MOES = [n for n in read_data("models") if model_preset(n).num_experts and n != "proxy-54m"]


@pytest.mark.parametrize("name", MOES)
def test_memory_and_time_never_grow_when_replication_falls(name):
    """With the degrees held, which a search is free to change."""
    degrees = "tp=1,pp=1,ep=1,shard=64,zero=3"
    asked = [
        Ask(
            model=name,
            sites=8,
            replication=r,
            parallel=degrees,
            micro_batch=1,
            recompute="full",
            batch_tokens=float(8 * 64 * 8192),
        )
        for r in range(1, 9)
    ]
    rows = evaluate([grid(build(ask, "fomoe")) for ask in asked]).rows()
    for column in ("memory_bytes_per_accelerator", "memory_bytes_per_site", "step_time_s"):
        values = [row[column] for row in rows]
        assert values == sorted(values), column


def test_presets_keep_sixteen_bytes_per_parameter_and_eight_outside():
    """fp32 parameter, gradient, two moments on accelerators; anchor and momentum off them."""
    row = answer_one(build(Ask(model="100b-moe", parallel="tp=1,pp=1,ep=1,zero=3"), "diloco"))
    parts = {name: part["bytes"] for name, part in row["memory_parts"].items()}
    total = row["params_total"]
    states = sum(parts[n] for n in ("parameters", "gradients", "inner optimizer"))
    assert states == pytest.approx(16 * total / 64, rel=1e-9)
    outer = sum(parts[n] for n in ("anchor", "outer momentum", "fragment buffer"))
    assert outer == pytest.approx((4 + 4 + 4) * total)
    assert parts["checkpoint copy"] == 12 * total
    ddp = answer_one(build(Ask(model="100b-moe"), "ddp"))
    assert "anchor" not in ddp["memory_parts"]


def test_low_bits_and_fragments_change_the_buffers():
    rows = {m: answer_one(build(Ask(model="100b-moe"), m)) for m in ("diloco", "streaming")}
    plain, stream = (rows[m]["memory_parts"] for m in ("diloco", "streaming"))
    assert "error feedback" not in plain
    assert stream["error feedback"]["bytes"] == stream["anchor"]["bytes"]
    sixteenth = plain["fragment buffer"]["bytes"] / 16
    assert stream["fragment buffer"]["bytes"] == pytest.approx(sixteenth)


def test_outer_state_lives_where_it_is_put():
    rows = {
        where: answer_one(build(Ask(model="olmoe-1b-7b", outer_on=where), "fomoe"))
        for where in ("host", "accelerator", "disk")
    }
    hosts = {where: row["host_bytes_per_site"] for where, row in rows.items()}
    assert hosts["host"] > hosts["disk"] > hosts["accelerator"]
    assert rows["accelerator"]["memory_parts"]["outer states"]["bytes"] > 0


def test_recomputation_saves_activations_and_costs_products():
    fixed = (("ep", 1), ("pp", 1), ("shard", 32), ("tp", 1), ("zero", 3))
    steps = {
        name: layout.choose(work(recompute=(name,), parallel=fixed, micro_batch=1))
        for name in step.RECOMPUTE
    }
    kept = {name: found.parts["activations"] for name, found in steps.items()}
    assert kept["none"] > kept["selective"] > kept["half"] > kept["full"]
    assert kept["none"] > kept["experts"]
    products = {name: found.seconds["products"] for name, found in steps.items()}
    assert products["full"] == pytest.approx(4 / 3 * products["selective"])
    assert products["half"] == pytest.approx(3.5 / 3 * products["selective"])


def test_few_rows_per_expert_run_slower():
    """More experts resident leave each fewer rows, and the same FLOPs take longer."""
    fixed = (("ep", 1), ("pp", 1), ("shard", 32), ("tp", 1), ("zero", 3))
    times = [
        layout.choose(work(residents=float(r), parallel=fixed, micro_batch=1)).seconds["experts"]
        for r in (1, 8, 64, 512)
    ]
    assert times == sorted(times)
    assert times[-1] > 2 * times[0]


def test_rings_are_slower_between_nodes_and_share_their_cards():
    device = accelerator_preset("H100")
    ranks, per_node = np.array([8.0, 32.0, 32.0]), np.array([8.0, 8.0, 1.0])
    inside, wide, narrow = step.ring_bytes_per_s(device, ranks, per_node)
    assert inside == pytest.approx(0.8 * device.nvlink)
    assert wide == pytest.approx(0.8 * min(device.nvlink, 8 * device.nic))
    assert narrow == pytest.approx(0.8 * device.nic)


def test_a_step_is_at_least_its_compute_and_the_parts_add_up():
    found = layout.choose(work())
    names = ("products", "attention scores", "experts", "values between products")
    assert found.step_s[1] >= sum(found.seconds[name] for name in names)
    low, middle, high = found.step_s
    assert low > middle > high, "the low share of peak is the slow end"
    assert found.bytes == pytest.approx(sum(found.parts.values()))


def test_the_search_fits_where_something_fits():
    found = layout.choose(work("deepseek-v3", 256))
    assert found.bytes <= accelerator_preset("H100").memory_bytes
    fixed = (("ep", 1), ("pp", 1), ("tp", 1), ("zero", 3))
    plain = layout.choose(work("deepseek-v3", 256, parallel=fixed, recompute=("none",)))
    assert plain.bytes > accelerator_preset("H100").memory_bytes


@pytest.mark.parametrize("count", [24, 48, 96])
def test_tensor_ranks_divide_a_node_and_the_heads(count):
    for name in ("llama3-70b", "mixtral-8x22b", "gpt-oss-120b"):
        tp = layout.choose(work(name, count)).degrees["tp"]
        assert 8 % tp == 0
        assert model_preset(name).attention.heads % tp == 0


def test_too_few_sequences_are_refused():
    with pytest.raises(ConfigError, match="leaves accelerators idle"):
        layout.choose(work(tokens=4096.0, parallel=(("pp", 1), ("tp", 1))))


def test_a_verdict_names_the_missing_bytes_and_the_cause():
    row = answer_one(build(Ask(model="deepseek-v3", accelerators=8), "fomoe"))
    assert not row["fits"]
    assert "each accelerator lacks" in row["memory_verdict"]
    assert "most of it inner optimizer" in row["memory_verdict"]


def test_every_part_has_its_words():
    rows = [
        answer_one(build(Ask(model="dbrx", states="mixed", **more), method))
        for method, more in (("streaming", {}), ("fomoe", {"outer_on": "accelerator"}))
    ]
    assert {name for row in rows for name in row["memory_parts"]} <= set(
        read_data("explain")["parts"]
    )
