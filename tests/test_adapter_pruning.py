"""HetLoRA's self-pruning: the penalty, when a client's last rows go, and what remembers it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers_adapters import adapter_config, client_of, client_run, fill
from helpers_cli import fomoe, records, trained
from test_adapter_runs import write_adapter_config

from fomoe.adapters.pruning import rank_after, tail_norm
from fomoe.training import run_local_steps, synchronize

PRUNING = {"method": "hetlora", "adapters__prune_keep": 0.5}


def test_the_tails_norm_is_that_of_a_and_b_over_the_layers() -> None:
    a = torch.tensor([[9.0, 9.0], [3.0, 4.0]])
    b = torch.tensor([[9.0], [2.0]])
    matrices = {"x.lora_A": a, "x.lora_B": b, "y.lora_A": 2 * a, "y.lora_B": b}
    assert float(tail_norm(matrices, 1, 2)) == pytest.approx(5 * 2 + 10 * 2)
    assert float(tail_norm(matrices, 2, 2)) == 0


@pytest.mark.parametrize(
    ("rank", "share", "left"), [(16, 0.99, 15), (16, 0.5, 8), (3, 0.5, 1), (1, 0.5, 1)]
)
def test_a_share_of_the_rank_is_left(rank: int, share: float, left: int) -> None:
    assert rank_after(rank, share) == left


def test_the_penalty_adds_its_gradient_to_the_tail_only() -> None:
    def gradients(weight: float) -> dict[str, torch.Tensor]:
        run = client_run(adapter_config(**PRUNING, adapters__prune_weight=weight))
        client = client_of(run, 3)
        fill(client)
        client.backward()
        return {name: p.grad.clone() for name, p in client.parameters.items() if p.grad is not None}

    run = client_run(adapter_config(**PRUNING))
    values = fill(client_of(run, 3))
    plain, more = gradients(0.0), gradients(0.25)
    name = "model.layers.0.self_attn.v_proj"
    a, b = values[f"{name}.lora_A"][2:], values[f"{name}.lora_B"][2:]
    added = more[f"{name}.lora_A"] - plain[f"{name}.lora_A"]
    torch.testing.assert_close(added[2:], 0.25 * b.norm() * a / a.norm(), atol=1e-5, rtol=1e-3)
    assert not added[:2].any()


def test_rows_that_have_shrunk_are_no_longer_used_or_counted() -> None:
    """A heavy penalty: the tail shrinks, goes, and counts as zero in the server's mean."""
    run = client_run(adapter_config(**PRUNING, adapters__prune_weight=100.0))
    clients = [client_of(run, site) for site in run.sites]
    for client in clients:
        fill(client, seed=1)
        client.counter.tokens = 8
    synchronize(run)  # all have what the server has
    assert [client.kept for client in clients] == [1, 2, 2, 4]
    run_local_steps(run, 0)
    assert [client.kept for client in clients] == [1, 1, 1, 2]
    client = clients[3]
    own, windows = client.losses(run.data.held_out), run.data.held_out
    assert own == client.losses(windows, rank=2) != client.losses(windows, rank=4)
    name = "model.layers.0.self_attn.q_proj.lora_B"
    synchronize(run)
    server = clients[3].parameters[name]
    assert server[1].any()  # a client has it
    assert not server[2:].any()  # none has it
    again = client_run(run.config)
    for site in run.sites:
        tensors, values = run.sites[site].state()
        again.sites[site].load_state(tensors, values | {"data": {}})
    assert [client_of(again, site).kept for site in run.sites] == [1, 1, 1, 2]


def test_rows_that_have_grown_stay() -> None:
    """B starts at 0, so that the first round cannot shrink it."""
    run = client_run(adapter_config(**PRUNING))
    run_local_steps(run, 0)
    assert [client_of(run, site).kept for site in run.sites] == [1, 2, 2, 4]


def test_a_run_records_the_ranks_that_are_used(tmp_path: Path) -> None:
    words = ["method=hetlora", "adapters.prune_keep=0.5", "adapters.prune_weight=100"]
    path = write_adapter_config(tmp_path)
    summary = trained(path, *words, "rounds=4", "inner.lr=0.02", "run.eval_merged_every=1")
    kept = [record["kept_ranks"] for record in records(tmp_path / "run", "merged")]
    assert kept[0] == [1, 2, 2, 4]
    for before, after in pairwise(kept):
        assert all(new <= old for old, new in zip(before, after, strict=True))
    assert summary["kept_ranks"] == kept[-1] != kept[0]
    result = fomoe("eval", tmp_path / "run", "--json").json
    losses = [None if own is None else own["loss"] for own in result["clients"]]
    assert losses == summary["val_loss_by_client"]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("method=prelort adapters.prune_keep=0.5", "is for adapters.aggregate hetlora"),
        (
            "method=prelort adapters.aggregate=hetlora adapters.prune_keep=0.5",
            "adapters.prune_keep 0.5 does not fit adapters.nesting sandwich",
        ),
        ("method=hetlora adapters.prune_weight=1", "prune_weight 1.0 needs adapters.prune_keep"),
        ("method=hetlora adapters.prune_keep=1", "adapters.prune_keep 1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, word: str, reason: str) -> None:
    outcome = fomoe("train", write_adapter_config(tmp_path), *word.split(), "--dry-run")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert reason in outcome.err
