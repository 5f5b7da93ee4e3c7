"""The baselines: what a server makes of adapters of different ranks, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import anchors_of, assert_same_bits, parameters_of
from helpers_adapters import RANKS, adapter_config, client_of, client_run, fill
from torch import Tensor

from fomoe.adapters.server import (
    RULES,
    Server,
    Upload,
    energy,
    flexlora,
    hetlora,
    product_error,
    product_norm,
    segment_means,
    segments_svd,
    stack,
    truncated,
    zero_pad_deltas,
    zero_pad_values,
)
from fomoe.training import run_local_steps, synchronize

R, INNER, OUT, S = 4, 7, 5, 2.0


def world(ranks: list[int], seed: int = 0) -> tuple[list[Upload], Server]:
    """Clients with random matrices and unequal weights, and a server that they started from."""
    torch.manual_seed(seed)
    start = torch.randn(R, INNER), torch.randn(R, OUT)
    uploads = [
        Upload(
            weight=1.0 + k,
            scale=S,
            a={"x": start[0][:r] + torch.randn(r, INNER)},
            b={"x": start[1][:r] + torch.randn(r, OUT)},
        )
        for k, r in enumerate(ranks)
    ]
    return uploads, Server(scale=S, a={"x": start[0]}, b={"x": start[1]})


def product(a: Tensor, b: Tensor) -> Tensor:
    return S * b.T @ a


def mean_product(uploads: list[Upload]) -> Tensor:
    total = sum(u.weight for u in uploads)
    return torch.stack([u.weight / total * product(u.a["x"], u.b["x"]) for u in uploads]).sum(0)


def test_zero_padded_values_are_the_segment_mean_diluted() -> None:
    """Times the holders' part of all weights."""
    uploads, server = world(RANKS)
    weights = torch.tensor([u.weight for u in uploads])
    share = (
        torch.tensor([sum(u.weight for u in uploads if len(u.a["x"]) > row) for row in range(R)])
        / weights.sum()
    )
    for padded, mean in zip(
        zero_pad_values(uploads, server), segment_means(uploads, server), strict=True
    ):
        torch.testing.assert_close(padded["x"], mean["x"] * share[:, None])


def test_zero_padded_deltas_only_dilute() -> None:
    """Where nobody moved, values shrink the rows of A every round and deltas leave them."""
    uploads, server = world(RANKS)
    still = [
        Upload(
            weight=u.weight,
            scale=S,
            a={"x": server.a["x"][: len(u.a["x"])]},
            b={"x": server.b["x"][: len(u.b["x"])]},
        )
        for u in uploads
    ]
    torch.testing.assert_close(zero_pad_deltas(still, server)[0]["x"], server.a["x"])
    shrunk = zero_pad_values(still, server)[0]["x"]
    assert torch.equal(shrunk[0], server.a["x"][0]) or torch.allclose(shrunk[0], server.a["x"][0])
    assert (shrunk[1:].norm(dim=1) < 0.95 * server.a["x"][1:].norm(dim=1)).all()


def test_the_stack_is_the_mean_of_the_products() -> None:
    uploads, _ = world(RANKS)
    a, b = stack(uploads, "x")
    assert len(a) == sum(RANKS)
    torch.testing.assert_close(b.T @ a, mean_product(uploads))


def test_flexlora_at_full_rank_is_the_stack() -> None:
    uploads, server = world([4, 4])
    whole = Server(scale=S, a={"x": torch.zeros(5, INNER)}, b={"x": torch.zeros(5, OUT)})
    a, b = flexlora(uploads, whole)
    torch.testing.assert_close(product(a["x"], b["x"]), mean_product(uploads))
    a, b = flexlora(uploads, server)
    best = mean_product(uploads)
    u, values, v = torch.linalg.svd(best)
    for rank in range(1, R + 1):
        expected = (u[:, :rank] * values[:rank]) @ v[:rank]
        torch.testing.assert_close(product(a["x"][:rank], b["x"][:rank]), expected)


def test_a_product_of_low_rank_leaves_rows_of_zero() -> None:
    a, b = truncated(torch.randn(1, INNER), torch.randn(1, OUT), 3, S)
    assert a[:1].any()
    assert not a[1:].any()
    assert not b[1:].any()


def test_rotated_segments_have_the_product_of_the_segments() -> None:
    uploads, server = world(RANKS)
    a, b = segment_means(uploads, server)
    turned = segments_svd(uploads, server)
    torch.testing.assert_close(
        product(turned[0]["x"], turned[1]["x"]), product(a["x"], b["x"]), atol=1e-5, rtol=1e-4
    )
    assert energy(*turned) == sorted(energy(*turned), reverse=True)


def test_the_mean_of_products_is_not_the_product_of_means() -> None:
    """Equal clients have no error; different ones have a large one."""
    uploads, server = world([4, 4, 4])
    a, b = segment_means(uploads, server)
    expected = (product(a["x"], b["x"]) - mean_product(uploads)).norm()
    error = product_error(uploads, server)
    assert error == pytest.approx(float(expected / mean_product(uploads).norm()))
    assert error > 0.2
    assert product_error([uploads[0], uploads[0]], server) < 1e-6


def test_hetlora_weights_by_the_norm_of_the_product() -> None:
    uploads, server = world([2, 4])
    norms = [float(product(u.a["x"], u.b["x"]).norm()) / S for u in uploads]
    assert [product_norm(u.a, u.b) for u in uploads] == pytest.approx(norms, rel=1e-5)
    got = hetlora(uploads, server)[0]["x"]
    first = torch.cat([uploads[0].a["x"], torch.zeros(2, INNER)])
    expected = (norms[0] * first + norms[1] * uploads[1].a["x"]) / sum(norms)
    torch.testing.assert_close(got, expected)


def test_hetlora_before_anything_is_learned_is_a_plain_mean() -> None:
    uploads, server = world([4, 4])
    still = [Upload(weight=1.0, scale=S, a=u.a, b={"x": 0 * u.b["x"]}) for u in uploads]
    torch.testing.assert_close(
        hetlora(still, server)[0]["x"], (uploads[0].a["x"] + uploads[1].a["x"]) / 2
    )


def test_energy_is_the_share_of_each_dimension() -> None:
    a, b = {"x": torch.eye(2, 3)}, {"x": torch.diag(torch.tensor([2.0, 1.0]))}
    assert energy(a, b) == pytest.approx([0.8, 0.2])


# -------------------------------------------------------------------------------------- in a round


@pytest.mark.parametrize("method", [*RULES, "flora"])
def test_a_server_gives_its_prefix_to_every_client(method: str) -> None:
    run = client_run(adapter_config(method=method))
    run_local_steps(run, 0)
    synchronize(run)
    largest = run.sites[3].parameters
    for site, rank in enumerate(RANKS):
        for name, parameter in run.sites[site].parameters.items():
            assert_same_bits({name: parameter}, {name: largest[name][:rank]})


def test_a_rule_decides_the_new_values() -> None:
    run = client_run(adapter_config(method="zero-pad-values"))
    run_local_steps(run, 0)
    local = parameters_of(run)
    synchronize(run)
    name = "model.layers.0.self_attn.q_proj.lora_A[2:4]"
    torch.testing.assert_close(anchors_of(run)[name], local[3, name] / 4)  # one holder of four


def test_flora_merges_the_mean_product_into_the_base() -> None:
    """After a round the base has moved by it, B is 0 and A is new."""
    run = client_run(adapter_config(method="flora"))
    for site in run.sites:
        fill(client_of(run, site), site)
    own = {site: {n: p.detach().clone() for n, p in s.parameters.items()}
           for site, s in run.sites.items()}  # fmt: skip
    sync: Any = run.sync
    name = "model.layers.1.self_attn.v_proj"
    for site in run.sites.values():
        site.counter.tokens = 8
    synchronize(run)
    products = [S * p[f"{name}.lora_B"].T @ p[f"{name}.lora_A"] for p in own.values()]
    torch.testing.assert_close(sync.merged[name], torch.stack(products).mean(0))
    client = client_of(run, 3)
    assert client.adapted.layers[name].merged is not None
    assert not client.parameters[f"{name}.lora_B"].any()
    assert client.parameters[f"{name}.lora_A"].any()
    # Without it the server's model would be the base again.
    more = run.system.evaluate_whole(run.plan, run.sites, run.transport, run.data).more
    assert len(set(more["val_loss_by_rank"].values())) == 1


def test_floras_merged_values_are_saved_and_loaded() -> None:
    config = adapter_config(method="flora")
    run, other = client_run(config), client_run(config)
    for round_idx in range(2):
        run_local_steps(run, round_idx)
        synchronize(run)
    assert {n: (tuple(t.shape), t.dtype) for n, t in run.sync.state_of(0).items()} == (
        run.sync.state_layout(0)
    )
    for site in run.sites:
        tensors, values = run.sites[site].state()
        other.sites[site].load_state({**tensors}, values | {"data": {}})
        other.sync.load_state_of(site, run.sync.state_of(site))
    for r in (run, other):
        for site in r.sites:
            r.sites[site].stream._random = np.random.default_rng(site)  # type: ignore[attr-defined]
        run_local_steps(r, 2)
        synchronize(r)
    assert_same_bits(parameters_of(other), parameters_of(run))
    left, right = other.sync, run.sync
    assert_same_bits(left.merged, right.merged)  # type: ignore[attr-defined]
