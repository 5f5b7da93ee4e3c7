"""Simulated against real: payload of small runs to the byte, and what their plans say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fomoe.cli import main as simulate
from fomoe.load import load_config
from fomoe.planning import plan_run, planned_summary

pytest.importorskip("fomoe.training", reason="the trainer is not part of this checkout")

CONFIG = """
local_steps: 2
rounds: 2
model: {{num_layers: 2, d_model: 32, num_heads: 4, num_experts: 6, top_k: 2, expert_ffn_dim: 24,
  vocab_size: 300}}
inner: {{batch_size: 1, precision: fp32}}
data: {{source: {text}, seq_len: 32, held_out_sequences: 2}}
run: {{dir: {run}, eval_every: 0, checkpoint_every: 0}}
"""
RUNS = {
    "fomoe": "num_sites: 4\nplacement: {replication_factor: 2}\n",
    "uneven": "num_sites: 3\nplacement: {capacity: [6, 4, 1]}\n",
    "ddp": "num_sites: 2\nmethod: ddp\n",
}
# Configs whose plan alone is compared, which is what the trainer's counters are held against.
PLANNED = {
    "stored everywhere": "num_sites: 3\nplacement: {replication_factor: 1, store: all}\n",
    "stored, by capacity": "num_sites: 3\nplacement: {capacity: [6, 4, 1], store: all}\n",
    "gradients": "num_sites: 2\nplacement: {replication_factor: 2}\nsync: {average: gradients}\n",
    "gradients of diloco": "num_sites: 3\nmethod: diloco\nsync: {average: gradients}\n",
    "one site": "num_sites: 4\nmethod: single\n",
    "half": "num_sites: 3\nmethod: diloco-half\n",
    "dense": "num_sites: 3\nmethod: dense\n",
}


def write_config(tmp_path, extra):
    text = tmp_path / "text.txt"
    documents = (" ".join(f"word{(i * j) % 97}" for j in range(400)) for i in range(60))
    text.write_text("\n\n".join(documents))
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(text=text, run=tmp_path / "run") + extra)
    return str(path)


def projected(capsys, path):
    capsys.readouterr()
    assert simulate(["project", "--config", path, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", RUNS)
def test_payload_equals_the_trainers_count(capsys, tmp_path, name):
    from fomoe.cli import main as trainer

    path = write_config(tmp_path, RUNS[name])
    assert trainer(["train", path, "--device", "cpu"]) == 0
    counted = json.loads((tmp_path / "run" / "summary.json").read_text())
    row = projected(capsys, path)
    for key in (
        "params_total",
        "params_per_site_by_site",
        "payload_bytes_per_site_per_round",
        "payload_bytes_per_site_per_round_by_site",
        "wire_bytes_per_site_per_round_by_site",
    ):
        assert row[key] == counted[key], key
    assert row["ratio_vs_ddp"] == pytest.approx(counted["ratio_vs_ddp"])
    assert row["ratio_vs_diloco"] == pytest.approx(counted["ratio_vs_diloco"])


@pytest.mark.parametrize("name", PLANNED)
def test_answers_equal_the_trainers_plan(capsys, tmp_path, name):
    """Payload, sent bytes, stored parameters and states, of every site."""
    path = write_config(tmp_path, PLANNED[name])
    run = plan_run(load_config(path))
    planned, row = planned_summary(run), projected(capsys, path)
    for key in (
        "method",
        "num_sites",
        "replication_factor",
        "params_total",
        "params_per_site_by_site",
        "payload_bytes_per_site_per_round_by_site",
        "wire_bytes_per_site_per_round_by_site",
        "ratio_vs_diloco",
    ):
        assert row[key] == planned[key], key
    states = ("parameters", "gradients", "inner optimizer", "anchor", "outer momentum")
    parts = row["memory_parts"]
    held = sum(parts[state]["bytes"] for state in states if state in parts)
    assert held in {memory.total for memory in run.memory}


def test_copies_of_experts_cost_what_a_site_exchanges_until_they_part(capsys, tmp_path):
    path = Path(write_config(tmp_path, "num_sites: 4\nmethod: diloco\n"))
    expected = projected(capsys, str(path))
    text = path.read_text().replace("method: diloco", "method: copies")
    path.write_text(text.replace("num_experts: 6", "num_experts: 24"))
    row = projected(capsys, str(path))
    assert (expected.pop("method"), row.pop("method")) == ("diloco", "copies")
    assert row == expected
