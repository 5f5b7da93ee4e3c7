"""Presets: totals and active parameters against what vendors publish, and against the trainer."""

from __future__ import annotations

import pytest

from fomoe.config import build_config
from fomoe.errors import ConfigError
from fomoe.shapes import parameter_specs
from fomoe_sim.cluster import load_cluster
from fomoe_sim.flops import token_flops
from fomoe_sim.hardware import central, read_rate, read_up_down
from fomoe_sim.presets import MODELS, model_preset, shape_from_config

EXACT = {
    "olmoe-1b-7b": 6_919_161_856,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "dbrx": 131_596_523_520,
    "deepseek-v3": 671_026_419_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "glm-4.5": 352_797_829_024,
    "llama-4-scout": 107_769_861_120,
}
# Where only digits are published: total, and the relative error that those digits allow.
ROUNDED = {
    "kimi-k2": (1.04e12, 0.015),
    "qwen3-235b-a22b": (235e9, 0.005),
    "gpt-oss-120b": (116.8e9, 0.001),
    "glm-4.5-air": (106e9, 0.01),
    "llama3-405b": (405e9, 0.005),
    "10b": (10e9, 0.03),
    "100b": (100e9, 0.01),
    "100b-moe": (100e9, 0.02),
    "proxy-54m": (55.7e6, 0.001),
}
# Active parameters in 1e9, by each vendor's convention.
ACTIVE = {
    "olmoe-1b-7b": (1.3, 0.05),
    "mixtral-8x7b": (12.9, 0.05),
    "mixtral-8x22b": (39, 0.5),
    "dbrx": (36, 0.6),
    "deepseek-v3": (37, 0.6),
    "kimi-k2": (32, 1.0),
    "qwen3-30b-a3b": (3.353032704, 1e-12),
    "qwen3-235b-a22b": (22, 0.3),
    "gpt-oss-120b": (5.13, 0.01),
    "glm-4.5": (32, 0.2),
    "glm-4.5-air": (12, 0.3),
    "llama-4-scout": (17, 0.3),
}


@pytest.mark.parametrize(("name", "total"), EXACT.items())
def test_total_equals_the_published_integer(name, total):
    assert model_preset(name).total == total


@pytest.mark.parametrize(("name", "published"), ROUNDED.items())
def test_total_agrees_with_published_digits(name, published):
    total, tolerance = published
    assert model_preset(name).total == pytest.approx(total, rel=tolerance)


@pytest.mark.parametrize(("name", "published"), ACTIVE.items())
def test_active_parameters_follow_the_vendor(name, published):
    billions, tolerance = published
    assert model_preset(name).active / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_closed_forms_equal_the_list_of_parameters(name):
    shape = model_preset(name)
    specs = shape.parameter_specs()
    assert sum(spec.numel for spec in specs) == shape.total
    experts = [spec.numel for spec in specs if spec.kind == "expert"]
    assert sum(experts) == shape.expert_total
    for layer in {0, shape.num_layers - 1}:
        shared = sum(s.numel for s in specs if s.layer == layer and s.kind != "expert")
        assert shared == shape.layer_shared[layer]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_embeddings": True, "qk_norm": "full", "num_kv_heads": 2},
        {"num_dense_layers": 2, "dense_ffn_dim": 100, "shared_expert_ffn_dim": 64},
        {"ffn": "dense", "num_dense_layers": 1, "dense_ffn_dim": 40, "expert_ffn_scale": 0.5},
    ],
)
def test_a_config_has_the_parameters_that_the_trainer_builds(model):
    config = build_config({"placement": {"replication_factor": 2}, "model": model})
    shape = shape_from_config(config, "small")
    ours = [(s.name, s.shape, s.kind, s.layer, s.expert) for s in shape.parameter_specs()]
    theirs = [(s.name, s.shape, s.kind, s.layer, s.expert) for s in parameter_specs(config)]
    assert ours == theirs
    assert sum(s.numel for s in shape.parameter_specs()) == shape.total


def test_flops_of_a_dense_model_are_six_per_parameter():
    """Without the embedding, whose look-up costs nothing, and attention scores."""
    shape = model_preset("llama3-405b")
    table = shape.vocab_size * shape.d_model
    scores = 3 * shape.num_layers * shape.attention.score_width * shape.seq_len
    expected = 6 * (shape.total - table) + scores
    assert token_flops(shape).full == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1Gbit", 1e9),
        ("100Mbit/s", 1e8),
        ("2.5 Gbps", 2.5e9),
        ("1Gb", 1e9),
        ("1gb/s", 1e9),
        ("10GbE", 1e10),
        (5e8, 5e8),
        ("1e9", 1e9),
    ],
)
def test_rates_are_read_as_people_write_them(text, rate):
    assert read_rate(text, "link") == rate


@pytest.mark.parametrize("text", ["1GB/s", "1GB", "1GBps", "1 gigabyte/s", "10 MBytes"])
def test_bytes_are_not_taken_for_bits(text):
    with pytest.raises(ConfigError, match="is in bytes"):
        read_rate(text, "link")


def test_a_price_range_from_zero_has_a_central_price():
    assert central((1.0, 4.0)) == 2.0
    assert central((0.0, 4.0)) == 2.0


def test_up_and_down_rates():
    assert read_up_down("100Mbit/1Gbit", "link") == (1e8, 1e9)
    assert read_up_down("1Gbit/s", "link") == (1e9, 1e9)


BAD_CLUSTERS = {
    "sites: []": "sites",
    "sites: [{name: a, accelerator: H10, count: 1, link: 1Gbit}]": "did you mean H100?",
    "sites: [{name: a, accelerator: H100, count: 1, link: 0Gbit}]": "bandwidth above 0",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, price_per_hour: -1}]": "price",
    "sites: [{name: a, accelerator: H100, cout: 1, link: 1Gbit}]": "did you mean",
    "sites: [{name: a, accelerator: H100, count: 1}]": "up is missing: give link",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, up: 1Gbit}]": "contradicts link",
    "sites: [{name: a, accelerator: H100, count: 1, up: 1Gbit}]": "a.down is missing",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1GB/s}]": "capital B",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, egress_per_gb: [0, .inf]}]": "low",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, price_per_hour: .inf}]": "price",
    f"sites: [{{name: a, accelerator: H100, count: {'9' * 400}, link: 1Gbit}}]": "count",
    "topology: mesh\nsites: [{name: a, accelerator: H100, count: 1, link: 1Gbit}]": "ring, star",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, uplink: x}]": "shared_uplinks",
}


@pytest.mark.parametrize(("text", "words"), BAD_CLUSTERS.items())
def test_a_bad_cluster_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_example_clusters_load():
    three = load_cluster("configs/clusters/three-sites.yaml")
    assert three.num_sites == 3
    assert three.sites[2].up_bps == 1e9
    assert three.sites[2].down_bps == 1e10
    assert load_cluster("configs/clusters/shared-uplink.yaml").uplinks == (("campus", 1e10),)
