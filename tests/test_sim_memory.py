"""Memory: equal to the trainer's count, monotone in r, and verdicts that say why."""

from __future__ import annotations

import argparse

import pytest

from fomoe.config import load_config
from fomoe.memory import site_memory
from fomoe.placement import build_placement
from fomoe.segments import build_plan
from fomoe.shapes import parameter_specs
from fomoe_sim.flags import add_question_flags
from fomoe_sim.memory import activations_per_token, site_memories
from fomoe_sim.presets import MODELS, model_preset
from fomoe_sim.question import Point, build_scenario

CONFIG = """
num_sites: 3
model: {num_layers: 3, d_model: 32, num_heads: 4, expert_ffn_dim: 24, num_experts: 7}
placement: {replication_factor: 2}
data: {seq_len: 64}
"""


def scenario(method="fomoe", *flags):
    parser = argparse.ArgumentParser()
    add_question_flags(parser)
    return build_scenario(parser.parse_args(flags), Point(method=method))


def parts_of(memory):
    return {part.name: part.site_bytes for part in memory.parts}


@pytest.mark.parametrize("method", ["fomoe", "diloco", "photon", "ddp", "spes"])
def test_states_of_a_config_are_the_trainers(tmp_path, method):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    config = load_config(path, [f"method={method}"])
    plan = build_plan(parameter_specs(config), build_placement(config))
    found = site_memories(scenario(method, "--config", str(path)))
    for site, memory in enumerate(found):
        trainer, parts = site_memory(config, plan, site), parts_of(memory)
        assert parts["parameters"] == trainer.parameters
        assert parts["gradients"] == trainer.gradients
        assert parts["inner optimizer"] == trainer.inner_optimizer
        assert parts.get("anchor", 0) == trainer.anchor
        assert parts.get("outer momentum", 0) == trainer.outer_optimizer


@pytest.mark.parametrize("name", [n for n, shape in MODELS.items() if shape.num_experts])
def test_memory_never_grows_when_replication_falls(name):
    totals, fullest = [], []
    for r in range(1, 9):
        memories = site_memories(
            scenario("fomoe", "--model", name, "--sites", "8", "--replication", str(r))
        )
        totals.append(max(memory.site_bytes for memory in memories))
        fullest.append(max(memory.per_accelerator for memory in memories))
    assert totals == sorted(totals)
    assert fullest == sorted(fullest)


def test_presets_keep_sixteen_bytes_per_parameter_and_eight_outside():
    """fp32 parameter, gradient, two moments on accelerators; anchor and momentum off them."""
    found = scenario("diloco", "--model", "100b-moe")
    memory = site_memories(found)[0]
    parts, total = parts_of(memory), found.shape.total
    assert parts["parameters"] + parts["gradients"] + parts["inner optimizer"] == 16 * total
    assert memory.total("host") == (4 + 4 + 4) * total  # anchor, momentum, the reduced copy
    ddp = site_memories(scenario("ddp", "--model", "100b-moe"))[0]
    assert ddp.total("host") == 0


def test_mixed_states_trade_parameters_for_masters():
    found = scenario("diloco", "--model", "100b-moe", "--states", "mixed")
    parts = parts_of(site_memories(found)[0])
    assert parts["master weights"] == 2 * parts["parameters"] == 4 * found.shape.total


def test_low_bits_need_error_feedback_and_fragments_shrink_buffers():
    plain = parts_of(site_memories(scenario("diloco", "--model", "100b-moe"))[0])
    stream = parts_of(site_memories(scenario("streaming", "--model", "100b-moe"))[0])
    assert "error feedback" not in plain
    assert stream["error feedback"] == stream["anchor"]
    assert stream["fragment buffer"] == pytest.approx(plain["fragment buffer"] / 16)


def test_outer_state_lives_where_it_is_put():
    on = {
        where: site_memories(scenario("fomoe", "--model", "100b-moe", "--outer-on", where))[0]
        for where in ("host", "accelerator", "disk")
    }
    assert on["accelerator"].total("host") == 0
    assert on["accelerator"].per_accelerator > on["host"].per_accelerator
    assert on["disk"].total("disk") > on["disk"].total("host") > 0


def test_recomputation_saves_activations():
    shape = model_preset("100b-moe")
    kept = [
        activations_per_token(shape, executed=8, element_bytes=2, recompute=choice)
        for choice in ("none", "selective", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    # Layer inputs of all layers, and one whole layer.
    whole = activations_per_token(shape, executed=8, element_bytes=2, recompute="none")
    expected = 2 * shape.d_model * shape.num_layers + whole / shape.num_layers
    assert kept[2] == pytest.approx(expected)


def test_a_verdict_names_the_missing_bytes_and_the_cause():
    small = site_memories(scenario("fomoe", "--model", "deepseek-v3", "--accelerators", "8"))[0]
    assert not small.fits
    words = small.verdict("site-0")
    assert "lacks" in words
    assert "inner optimizer" in words
    assert small.missing_accelerator == small.per_accelerator - 80e9
