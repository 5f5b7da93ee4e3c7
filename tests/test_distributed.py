"""One site per process against all sites in one: the same numbers, bytes and replicas.

And what must be equal at all sites before they start: a site that differs is refused.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    LAYOUTS,
    RandomStream,
    all_good,
    make_run,
    one_round,
    over_gloo,
    parameters_of,
    tiny_config,
    whole_model,
)
from helpers_cli import MEASURED
from safetensors.torch import load_file

from fomoe.data.dataset import build_data
from fomoe.errors import DataError, FomoeError, SiteMismatchError
from fomoe.load import load_config
from fomoe.merging import merge
from fomoe.planning import plan_run, planned_summary
from fomoe.rundir import agreed, compare_configs, compare_fingerprints
from fomoe.sync.transport import InMemoryTransport
from fomoe.training import merged_loss

CONFIG = """
num_sites: 4
local_steps: 2
rounds: 4
model: {num_layers: 2, d_model: 16, num_heads: 2, num_experts: 8, expert_ffn_dim: 12,
        shared_expert_ffn_dim: 8, init_std: 0.1}
placement: {kind: cyclic, replication_factor: 2}
inner: {lr: 1e-2, batch_size: 2}
router: {balance: both}
data: {source: "SOURCE", seq_len: 32, held_out_sequences: 11}
run: {eval_merged_every: 2, checkpoint_every: 4}
"""
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_config(folder: Path, *, source: str | None = None) -> Path:
    """A config and the text that it reads: sentences of numbered words."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = [
        " ".join(f"{word}{random.integers(1000)}" for word in ("one", "two", "three"))
        for _ in range(12_000)
    ]
    (folder / "text.txt").write_text("\n".join(lines))
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SOURCE", source or str(folder / "text.txt")))
    return path


def start(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.Popen:
    """Start a Python process as a user would, with one thread and without an accelerator."""
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launch}
    path = os.pathsep.join([str(ROOT), inherited.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=inherited | ENVIRONMENT | {"PYTHONPATH": path} | environment,
        cwd=folder,
    )


def finish(process: subprocess.Popen, seconds: float = 120.0) -> str:
    """What a process printed; it is killed, and the test fails, if it hangs."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hangs; it printed: {process.communicate()[0]}")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Every metrics record of a run, of all sites."""
    return [
        json.loads(line)
        for path in sorted(run_dir.glob("metrics*.jsonl"))
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same config as a proxy run and under torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder)
    found = {}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    for name, launcher in {"proxy": [], "distributed": torchrun}.items():
        found[name] = folder / name
        process = start(*launcher, "-m", "fomoe", "train", str(config), f"run.dir={found[name]}")
        output = finish(process)
        assert process.returncode == 0, output
    return found


def test_proxy_and_torchrun_have_the_same_summary(runs):
    """Losses to 1e-5, counts and bytes exactly."""
    proxy, distributed = (json.loads((runs[n] / "summary.json").read_text()) for n in runs)
    machine = {"peak_memory_bytes", "peak_accelerator_memory_bytes"}
    machine |= {"run_dir", "tokens_per_s", *MEASURED}
    assert len(distributed.pop("links")["pairs"]) == 6, "a proxy run has none to measure"
    for name in proxy.keys() | distributed.keys():
        if name.removesuffix("_by_site") in machine:
            continue
        left, right = proxy[name], distributed[name]
        if "loss" in name:
            assert left == pytest.approx(right, abs=1e-5), name
        else:
            assert left == right, name
    assert proxy["val_loss_merged"] < np.log(257) - 0.5, "nothing was learned"
    assert len(proxy["val_loss_local"]) == 4
    assert 0.2 < proxy["skipped_fraction"] < 0.8


def test_counted_bytes_are_the_planned_bytes(runs):
    config = load_config(runs["distributed"] / "config.yaml")
    planned = planned_summary(plan_run(config))
    for run_dir in runs.values():
        summary = json.loads((run_dir / "summary.json").read_text())
        for name, value in planned.items():
            assert summary[name] == value, name
        assert summary["payload_bytes_per_site_per_round"] > 0
        assert summary["evaluation_payload_bytes_per_site"] > 0, "counted apart from sync"


def test_every_step_and_round_has_the_same_record(runs):
    proxy, distributed = (records(run_dir) for run_dir in runs.values())

    def key(record: dict[str, Any]) -> tuple:
        return tuple(record.get(name, -1) for name in ("kind", "round", "step", "site"))

    expected = {key(record): record for record in proxy}
    assert len(expected) == len(proxy) == 4 * 4 * (2 + 1) + 2
    assert expected.keys() == {key(record) for record in distributed}
    for record in distributed:  # every site has its own copy of what was measured together
        other = expected[key(record)]
        assert record.keys() == other.keys()
        for field in record.keys() - MEASURED:
            if isinstance(record[field], float):
                assert record[field] == pytest.approx(other[field], abs=1e-5), (other, field)
            else:
                assert record[field] == other[field], (other, field)


def test_replica_hashes_are_equal_at_all_holders_in_every_round(runs):
    config = load_config(runs["distributed"] / "config.yaml")
    buckets = [b for b in plan_run(config).segment_plan.buckets if len(b.holders) > 1]
    rounds = [r for r in records(runs["distributed"]) if r["kind"] == "round"]
    assert {(r["round"], r["site"]) for r in rounds} == {(i, s) for i in range(4) for s in range(4)}
    seen = set()
    for round_idx in range(4):
        by_site = {r["site"]: r["replica_hashes"] for r in rounds if r["round"] == round_idx}
        for bucket in buckets:
            hashes = {by_site[site][str(bucket.index)] for site in bucket.holders}
            assert len(hashes) == 1
            seen |= hashes
        for site, hashes in by_site.items():
            assert set(hashes) == {str(b.index) for b in buckets if site in b.holders}
    assert len(seen) == 4 * len(buckets), "every bucket changes in every round"


def test_the_checkpoints_of_both_runs_are_bitwise_the_same(runs):
    for site in range(4):
        parts = [
            load_file(run_dir / f"checkpoints/round-000004/site-{site}.safetensors")
            for run_dir in runs.values()
        ]
        parts = [{n: t for n, t in part.items() if n != "rng"} for part in parts]
        assert parts[0].keys() == parts[1].keys()
        for name, tensor in parts[0].items():
            assert torch.equal(tensor, parts[1][name]), name


def test_the_merged_evaluation_is_that_of_the_merged_model(runs, tmp_path):
    """`fomoe merge` into one whole model, run in the ordinary way on the held-out part."""
    config = load_config(runs["proxy"] / "config.yaml")
    whole = {}
    for name, run_dir in runs.items():
        whole[name] = load_file(merge(run_dir, out=tmp_path / name))
    assert whole["proxy"].keys() == whole["distributed"].keys()
    assert all(torch.equal(t, whole["distributed"][n]) for n, t in whole["proxy"].items())
    model = whole_model(config, whole["proxy"])
    biases = {n: t for n, t in whole["proxy"].items() if n.endswith("balance_bias")}
    for name, bias in biases.items():
        model.moe(int(name.split(".")[1])).router.balance_bias_E.copy_(bias)
    assert len(biases) == 2
    data = build_data(config, [0])
    held_out = torch.from_numpy(data.held_out)
    assert held_out.shape == (11, 33)
    with torch.no_grad():
        output = model(held_out[:, :-1], held_out[:, 1:])
    for run_dir in runs.values():
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["val_loss_merged"] == pytest.approx(float(output.loss), abs=1e-5)
        last = [r for r in records(run_dir) if r["kind"] == "merged" and r["round"] == 3]
        load = [s.selected_E.tolist() for s in output.stats.values()]
        assert last
        assert all(record["load"] == load for record in last)


# -------------------------------------------------------------------------------- merged evaluation


@pytest.mark.parametrize(
    "layout", ["cyclic", "one holder, local", "dense first layer", "capacity", "spes", "dense"]
)
def test_the_merged_model_is_evaluated_alike_in_memory_and_over_gloo(layout):
    """Whatever the placement, and although no site holds it."""
    config = tiny_config({**LAYOUTS[layout], "model.init_std": 0.2})

    def work(transport) -> tuple[Any, dict]:
        run = make_run(config, transport)
        one_round(run)
        merged = merged_loss(run)
        return merged, {name: value for (_, name), value in parameters_of(run).items()}

    results = all_good(over_gloo(config.num_sites, work))
    proxy, parameters = work(InMemoryTransport(range(config.num_sites)))
    assert all(merged == proxy for merged, _ in results)
    whole = whole_model(config, parameters)
    held_out = torch.from_numpy(RandomStream(config, 7).next_batch(5))
    with torch.no_grad():
        output = whole(held_out[:, :-1], held_out[:, 1:])
    assert proxy.loss == pytest.approx(float(output.loss), abs=1e-5)
    if config.model.moe_layers:
        assert proxy.load_LE == [s.selected_E.tolist() for s in output.stats.values()]


def test_evaluation_bytes_are_counted_apart_and_alike():
    config = tiny_config(placement__replication_factor=1)

    def work(transport) -> dict[int, Any]:
        run = make_run(config, transport)
        merged_loss(run)
        return {site: counts.state() for site, counts in transport.counts.items()}

    counted = {s: c for own in all_good(over_gloo(4, work)) for s, c in own.items()}
    proxy = work(InMemoryTransport(range(4)))
    for site in range(4):
        for kind in ("payload", "wire"):
            assert counted[site][kind]["evaluation"] == proxy[site][kind]["evaluation"]
            assert not counted[site][kind].get("shared", 0)
            assert not counted[site][kind].get("expert", 0)
    expert = 3 * 16 * 12 * 4
    assert sum(c["payload"]["evaluation"] for c in proxy.values()) == 2 * 8 * 3 * expert


# --------------------------------------------------------------- sites that are started differently


def two_sites(configs: list[Path]) -> list[tuple[int, str]]:
    """A site for each config, started in its folder as on machines of their own: status, output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        start(
            *["-m", "fomoe", "train", path.name, "num_sites=2", "run.dir=run"],
            folder=path.parent,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(len(configs)),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank, path in enumerate(configs)
    ]
    outputs = [finish(process) for process in processes]
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize("differs", ["config", "data"])
def test_a_site_that_differs_is_refused_with_the_fields_that_differ(tmp_path, differs):
    """One clear line at every site, a failing exit status, and nobody waits for nobody."""
    paths = [write_config(tmp_path / name, source="text.txt") for name in ("a", "b")]
    if differs == "config":
        changed = paths[1].read_text().replace("1e-2", "2e-2").replace("rounds: 4", "rounds: 5")
        paths[1].write_text(changed)
        words = ["inner.lr (0.02, not 0.01)", "rounds (5, not 4)", "config hash"]
    else:
        with (tmp_path / "b" / "text.txt").open("a") as file:
            file.write("\none line more")
        words = ["data split"]
    for code, output in two_sites(paths):
        assert code == 1
        lines = [line for line in output.splitlines() if line.startswith("fomoe: error")]
        assert len(lines) == 1, output
        assert "site 1 differs from site 0 in" in lines[0]
        assert all(word in lines[0] for word in words), lines[0]
        assert "Traceback" not in output
    assert not list(tmp_path.rglob("metrics*.jsonl"))
    assert not list(tmp_path.rglob("summary.json"))


DIFFERENT_CONFIGS = {
    "seed": ({"seed": 1}, "seed (1, not 0)"),
    "placement": ({"placement.replication_factor": 3}, "placement.replication_factor (3, not 2)"),
    "a model option": ({"model.qk_norm": "full"}, "model.qk_norm (full, not none)"),
    "when to evaluate": ({"run.eval_merged_every": 2}, "run.eval_merged_every (2, not 0)"),
    "when to save": ({"run.checkpoint_every": 2}, "run.checkpoint_every (2, not 1)"),
}


@pytest.mark.parametrize("case", DIFFERENT_CONFIGS)
def test_any_option_that_matters_is_compared(case):
    options, words = DIFFERENT_CONFIGS[case]

    def work(transport):
        config = tiny_config(options if transport.sites == (2,) else {})
        with pytest.raises(SiteMismatchError) as caught:
            compare_configs(config, transport, "new")
        return str(caught.value)

    messages = all_good(over_gloo(4, work))
    assert len(set(messages)) == 1
    assert f"site 2 differs from site 0 in {words}" in messages[0].replace(_hash(messages[0]), "")
    assert "site 1" not in messages[0]


def _hash(message: str) -> str:
    """The part of a message that names the config's hash, where there is one."""
    start, end = message.find("config hash"), message.find("), ") + 3
    return message[start:end] if start >= 0 else ""


def test_options_that_do_not_matter_may_differ():
    def work(transport):
        (site,) = transport.sites
        config = tiny_config({"run.dir": f"runs/{site}", "run.log_every": site + 1})
        compare_configs(config, transport, "new")
        return config.fingerprint()

    assert len(set(all_good(over_gloo(4, work)))) == 1


def test_the_mode_of_starting_is_compared():
    def work(transport):
        mode = "resume" if transport.sites == (1,) else "new"
        with pytest.raises(SiteMismatchError, match="mode of starting \\(resume, not new\\)"):
            compare_configs(tiny_config(), transport, mode)

    all_good(over_gloo(2, work))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data.source": "b.txt"}, "data split"),
        ({"data.held_out_sequences": 3}, "held-out part"),
        ({"data.tokenizer": "bpe", "data.bpe_vocab_size": 300}, "tokenizer"),
        ({"seed": 5}, "held-out part"),
    ],
)
def test_tokenizer_split_and_held_out_part_are_compared(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    (tmp_path / "a.txt").write_text((tmp_path / "text.txt").read_text())
    (tmp_path / "b.txt").write_text((tmp_path / "text.txt").read_text() + "\none line more")
    same = {"data.source": "a.txt", "data.tokenizer": "byte", "model.vocab_size": 400}

    def work(transport):
        (site,) = transport.sites
        config = tiny_config(same | (options if site == 1 else {}))
        data = build_data(config, [site])
        with pytest.raises(SiteMismatchError, match=f"site 1 differs from site 0 in .*{words}"):
            compare_fingerprints(data.fingerprints, transport)

    all_good(over_gloo(2, work))


def test_equal_sites_are_not_refused(tmp_path):
    config = load_config(write_config(tmp_path))

    def work(transport):
        (site,) = transport.sites
        compare_configs(config, transport, "new")
        data = build_data(config, [site])
        compare_fingerprints(data.fingerprints, transport)
        return data.fingerprints

    first, *others = all_good(over_gloo(4, work))
    assert sorted(first) == ["data split", "held-out part", "tokenizer"]
    assert others == [first] * 3


def test_a_site_that_cannot_read_its_data_stops_all_sites(tmp_path):
    def work(transport):
        def read() -> None:
            if transport.sites == (2,):
                raise DataError("data source x does not exist")

        with pytest.raises(FomoeError, match="data source x does not exist") as caught:
            agreed(transport, read)
        return str(caught.value)

    messages = all_good(over_gloo(3, work))
    assert messages == [f"{who}data source x does not exist" for who in ("site 2: ",) * 2 + ("",)]
