"""Presets: totals and active parameters against what vendors publish, and against the trainer."""

from __future__ import annotations

import pytest

from fomoe.errors import ConfigError
from fomoe.load import build_config
from fomoe.shapes import parameter_specs
from fomoe_sim.cluster import accelerator_names, accelerator_preset, read_cluster
from fomoe_sim.shape import model_preset, shape_from_config, token_work
from fomoe_sim.trainer import read_data
from fomoe_sim.units import central, duration, percent, read_rate, read_up_down, scaled

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


def test_every_preset_names_its_source():
    assert all(model_preset(name).source for name in read_data("models"))
    assert all(accelerator_preset(name).source for name in accelerator_names())


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
    specs = parameter_specs(config)
    assert sum(spec.numel for spec in specs) == shape.total
    assert sum(spec.numel for spec in specs if spec.kind == "expert") == shape.expert_total
    for layer in range(shape.num_layers):
        shared = sum(s.numel for s in specs if s.layer == layer and s.kind != "expert")
        assert shared == shape.layer_shared[layer]


def test_flops_of_a_dense_model_are_six_per_parameter():
    """Without the embedding, whose look-up costs nothing, and attention scores."""
    shape = model_preset("llama3-405b")
    table = shape.vocab_size * shape.d_model
    scores = 3 * shape.num_layers * shape.attention.score_width * shape.seq_len
    expected = 6 * (shape.total - table) + scores
    assert token_work(shape, shape.seq_len).full == pytest.approx(expected, rel=1e-4)


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
    "sites: [{name: a, accelerator: H100, count: 1, up: 1Gbit}]": "sites.a down is missing",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1GB/s}]": "capital B",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, egress_per_gb: [0, .inf]}]": "low",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, price_per_hour: .inf}]": "price",
    f"sites: [{{name: a, accelerator: H100, count: {'9' * 400}, link: 1Gbit}}]": "count",
    "topology: ring\nsites: [{name: a, accelerator: H100, count: 1, link: 1Gbit}]": "topology",
    "accelerators: {X: {nic: 1.0}}\nsites: [{name: a, accelerator: X, count: 1, link: 1Gbit}]": "X",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, uplink: x}]": "shared_uplinks",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, uplink: [x]}]": "shared_uplinks",
    "sites: [{name: a, accelerator: H100, count: 1, link: 1Gbit, host_memory_gb: x}]": "a number",
    "accelerators: [H100]\nsites: [{name: a, accelerator: H100, count: 1, link: 1Gbit}]": "mapping",
    "sites: [H100]": "must be a mapping",
}


@pytest.mark.parametrize(("text", "words"), BAD_CLUSTERS.items())
def test_a_bad_cluster_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_cluster(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_example_clusters_load():
    three = read_cluster("configs/clusters/three-sites.yaml")
    assert three.num_sites == 3
    assert three.sites[2].up_bps == 1e9
    assert three.sites[2].down_bps == 1e10
    assert read_cluster("configs/clusters/shared-uplink.yaml").uplinks == (("campus", 1e10),)


OWN_SHAPE = """
num_layers: 2
d_model: 64
vocab_size: 1000
attention: {heads: 4, kv_heads: 4, head_dim: 16}
num_experts: 4
top_k: 2
expert_ffn: 32
"""


def test_a_model_may_be_a_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN_SHAPE)
    shape = model_preset(str(path))
    assert shape.name == "own"
    assert shape.num_moe_layers == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("num_layers: 2", "num_layer: 2"), "num_layer is not an option; did you mean num_layers?"),
        (("num_layers: 2", "num_layers: two"), "num_layers two must be a whole number"),
        (("d_model: 64\n", ""), "d_model is needed"),
        (("heads: 4", "heads: 0"), "heads 0 must be at least 1"),
        (("top_k: 2", "top_k: 9"), "top_k at most num_experts"),
        (("head_dim: 16", "head_dim: 16, qk_norm: x"), "qk_norm x must be one of none, head, full"),
        (("top_k: 2", "top_k: 2\nunsupported: 3"), "unsupported 3 must be a list"),
        (("top_k: 2", "top_k: 2\nunsupported: [3]"), "unsupported 3 must be text"),
        (("top_k: 2", "top_k: 2\nseq_len: 0"), "seq_len 0 must be at least 1"),
        (("attention: {", "attention: [{"), "is not valid YAML"),
    ],
)
def test_a_bad_model_file_is_refused_in_one_line(tmp_path, change, words):
    path = tmp_path / "own.yaml"
    path.write_text(OWN_SHAPE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        model_preset(str(path))
    assert words in str(caught.value)


def test_figures_are_those_that_people_write():
    assert (scaled(9.09e-11), scaled(0.0), scaled(1234.0), scaled(2.5e9, "B")) == (
        "<0.01",
        "0",
        "1.23 k",
        "2.5 GB",
    )
    assert [duration(s) for s in (2e-5, 0.5, 30, 600, 3e4, 1e6, 1e9)] == [
        "20 us",
        "500 ms",
        "30 s",
        "10 min",
        "8.33 h",
        "11.6 days",
        "31.7 years",
    ]
    assert (percent(0.874), percent(0.0002), percent(0.0)) == ("87.4%", "0.02%", "0.0%")
