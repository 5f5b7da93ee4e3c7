"""Adapters of different ranks: layers, prefixes, the mean of a range of rows, the plan's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import all_good, assert_same_bits, over_gloo, parameters_of
from helpers_adapters import RANKS, adapter_config, base_folder, client_of, client_run, fill
from torch import Tensor, nn
from torch.nn import functional as F

from fomoe.adapters.layers import AdaptedModel, LoraLinear, inputs_and_targets, read_model
from fomoe.adapters.nesting import participants, passes_per_step, row_ranks, truncations
from fomoe.planning import plan_run
from fomoe.training import run_local_steps, synchronize

SCALE = 2.0


def plain_logits(tokens: Tensor) -> Tensor:
    model = read_model("base", base_folder(), torch.float32)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ layers


def test_new_adapters_give_the_logits_of_the_base(tokens: Tensor) -> None:
    """To the last bit, at every rank: B is 0."""
    client = client_of(client_run(adapter_config()), 3)
    for rank in (0, 1, 2, 4):
        client.adapted.put(client.parameters, rank)
        assert_same_bits({"": client.adapted.logits(tokens)}, {"": plain_logits(tokens)})


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("scaling", ["constant", "alpha/r", "alpha/sqrt(r)"])
def test_a_truncation_is_the_base_plus_its_product(tokens: Tensor, rank: int, scaling: str) -> None:
    client = client_of(client_run(adapter_config(adapters__scaling=scaling)), 3)
    values = fill(client)
    client.adapted.put(client.parameters, rank)
    got = client.adapted.logits(tokens)
    model = read_model("base", base_folder(), torch.float32)
    factor = {"constant": SCALE, "alpha/r": SCALE / rank, "alpha/sqrt(r)": SCALE / rank**0.5}
    for name in client.adapted.layers:
        a, b = values[f"{name}.lora_A"][:rank], values[f"{name}.lora_B"][:rank]
        model.get_submodule(name).weight.data += factor[scaling] * b.T @ a
    torch.testing.assert_close(got, model(input_ids=tokens).logits, atol=2e-5, rtol=1e-4)


def test_a_rank_per_sequence_is_each_sequence_at_its_rank(tokens: Tensor) -> None:
    client = client_of(client_run(adapter_config()), 3)
    fill(client)
    alone = []
    for row, rank in zip(tokens, (4, 1, 2), strict=True):
        client.adapted.put(client.parameters, rank)
        alone.append(client.adapted.logits(row[None]))
    client.adapted.put(client.parameters, 4, [4, 1, 2])
    torch.testing.assert_close(client.adapted.logits(tokens), torch.cat(alone))


def test_beyond_a_truncation_the_gradient_is_zero() -> None:
    client = client_of(client_run(adapter_config()), 3)
    fill(client)
    for rows in (None, [2, 1]):
        client.adapted.put(client.parameters, 2, rows)
        windows = torch.from_numpy(client.stream.next_batch(2))
        for parameter in client.parameters.values():
            parameter.grad = None
        client.adapted.loss(windows).backward()
        for parameter in client.parameters.values():
            assert parameter.grad is not None
            assert not parameter.grad[2:].any()
            assert parameter.grad[:2].any()


def test_the_base_has_no_gradients_and_is_not_saved() -> None:
    run = client_run(adapter_config())
    before = {n: p.clone() for n, p in client_of(run, 0).adapted.model.named_parameters()}
    run_local_steps(run, 0)
    synchronize(run)
    client = client_of(run, 0)
    after = dict(client.adapted.model.named_parameters())
    assert_same_bits(before, after)
    assert all(p.grad is None and not p.requires_grad for p in after.values())
    assert all("lora_" in name for name in client.state()[0])
    assert all("lora_" in name for name in run.sync.state_of(0))


def test_clients_of_a_process_share_the_base() -> None:
    run = client_run(adapter_config())
    assert len({id(client_of(run, site).adapted) for site in run.sites}) == 1


def test_a_bf16_base_keeps_fp32_adapters(tokens: Tensor) -> None:
    client = client_of(client_run(adapter_config(adapters__base_dtype="bf16")), 3)
    fill(client)
    client.adapted.put(client.parameters, 4)
    assert client.adapted.logits(tokens).dtype == torch.bfloat16
    assert {p.dtype for p in client.parameters.values()} == {torch.float32}
    client.adapted.loss(tokens).backward()
    assert client.parameters["model.layers.0.self_attn.q_proj.lora_A"].grad.dtype == torch.float32


def test_other_families_of_models_are_adapted(tokens: Tensor) -> None:
    folder = str(base_folder("gpt_neox"))
    config = adapter_config(adapters__base=folder, adapters__targets=["query_key_value", "dense*"])
    client = client_of(client_run(config), 3)
    assert len(client.adapted.layers) == 2 * 4  # query_key_value, dense, dense_h_to_4h, ..._to_h
    fill(client)
    client.adapted.put(client.parameters, 2)
    assert client.adapted.logits(tokens).isfinite().all()


def test_a_target_that_is_no_linear_layer_is_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(4, 4)})
    with pytest.raises(ValueError, match="names table, which is no linear layer"):
        AdaptedModel(adapter_config().adapters, model, ["table"])


def test_a_layer_adds_what_the_server_merged() -> None:
    layer, x = LoraLinear(nn.Linear(3, 2)), torch.randn(4, 3)
    before = layer(x)
    layer.merged = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), before + x @ layer.merged.T)


def test_only_completions_are_targets() -> None:
    """A coded token is read as it is, and is not a target."""
    windows = torch.tensor([[-1 - 7, -1 - 9, 5, 256, -1]])
    inputs, targets = inputs_and_targets(windows)
    assert inputs.tolist() == [[7, 9, 5, 256]]
    assert targets.tolist() == [[-100, 5, 256, -100]]
    client = client_of(client_run(adapter_config()), 0)
    client.adapted.put(client.parameters, 0)
    logits = plain_logits(inputs)
    expected = F.cross_entropy(logits[0, 1:3], torch.tensor([5, 256]))
    torch.testing.assert_close(client.adapted.loss(windows), expected)


# ------------------------------------------------------------------------------- ranks of the loss


def choices(nesting: str, client: int, steps: int = 40) -> set[tuple[int, ...]]:
    adapters = adapter_config(adapters__nesting=nesting, adapters__ranks=[1, 2, 4, 8]).adapters
    return {truncations(adapters, client, seed=0, step=step) for step in range(steps)}


@pytest.mark.parametrize(
    ("nesting", "smallest", "largest", "passes"),
    [
        ("none", {(1,)}, {(8,)}, 1),
        ("rows", {(1,)}, {(8,)}, 1),
        ("all", {(1,)}, {(8, 1, 2, 4)}, 4),
        ("full+1", {(1,)}, {(8, 1), (8, 2), (8, 4)}, 2),
        ("sandwich", {(1,)}, {(8, 1, 2), (8, 1, 4)}, 3),
    ],
)
def test_truncations(
    nesting: str, smallest: set[tuple[int, ...]], largest: set[tuple[int, ...]], passes: int
) -> None:
    """The own rank is always there, so that no row is ever left without a gradient."""
    assert choices(nesting, 0) == smallest
    assert choices(nesting, 3) == largest
    adapters = adapter_config(adapters__nesting=nesting, adapters__ranks=[1, 2, 4, 8]).adapters
    assert passes_per_step(adapters, 3) == passes


def test_rows_draw_their_ranks() -> None:
    adapters = adapter_config(adapters__nesting="rows", adapters__ranks=[1, 2, 4, 8]).adapters
    drawn = [row_ranks(adapters, 3, 4, seed=0, step=step) for step in range(40)]
    assert all(rows and rows[0] == 8 and len(rows) == 4 for rows in drawn)
    assert {rank for rows in drawn if rows for rank in rows[1:]} == {1, 2, 4, 8}
    assert row_ranks(adapters, 0, 4, seed=0, step=0) is None


def test_the_loss_is_the_mean_over_the_truncations() -> None:
    """One step of SGD moves by the mean of the gradients at every rank."""
    run = client_run(adapter_config(adapters__nesting="all", inner__optimizer="sgd"))
    client = client_of(run, 3)
    values = fill(client)
    windows = client.stream.next_batch(2)
    client.stream.next_batch = lambda _: windows  # type: ignore[method-assign]
    client.backward()
    got = {name: p.grad.clone() for name, p in client.parameters.items() if p.grad is not None}
    mean = {name: torch.zeros_like(value) for name, value in values.items()}
    for rank in (4, 1, 2):
        client.optimizer.zero_grad()
        client.adapted.put(client.parameters, rank)
        client.adapted.loss(torch.from_numpy(windows)).backward()
        for name, parameter in client.parameters.items():
            assert parameter.grad is not None
            mean[name] += parameter.grad / 3
    for name, grad in got.items():
        torch.testing.assert_close(grad, mean[name])


# ------------------------------------------------------------------------------------ between them


def test_ranges_of_rows_and_their_holders() -> None:
    plan = plan_run(adapter_config()).segment_plan
    rows = {(s.start, s.stop): s.holders for b in plan.buckets for s in b.segments}
    assert rows == {(0, 1): (0, 1, 2, 3), (1, 2): (1, 2, 3), (2, 4): (3,)}
    assert plan.numel == 4 * (16 + 16) * 4  # q and v of two layers, four rows of A and of B


def test_all_start_from_the_same_prefix() -> None:
    run = client_run(adapter_config())
    largest = run.sites[3].parameters
    for site, rank in enumerate(RANKS):
        for name, parameter in run.sites[site].parameters.items():
            assert torch.equal(parameter, largest[name][:rank])
            assert parameter.any() == name.endswith("lora_A")


def trained_run(**options: Any) -> tuple[Any, dict[tuple[int, str], Tensor], dict[str, Tensor]]:
    """A run after the local steps of a round; the clients' rows; the server's before the sync."""
    run = client_run(adapter_config(**options))
    run_local_steps(run, 0)
    before = {name: a.detach().clone() for name, a in run.sync.anchors.values.items()}
    return run, parameters_of(run), before


def test_a_range_is_the_mean_over_its_holders() -> None:
    run, local, before = trained_run()
    synchronize(run)
    for bucket in run.plan.segment_plan.buckets:
        for segment in bucket.segments:
            own = [local[site, segment.name] for site in bucket.holders]
            mean = torch.stack(own).double().mean(0).float()  # equal tokens
            for site in bucket.holders:
                torch.testing.assert_close(run.sites[site].view(segment), mean)
            assert not torch.equal(before[segment.name], mean)


def test_a_range_is_weighted_by_the_tokens_of_its_holders() -> None:
    """Clients that have trained on other numbers of tokens, through the whole sync."""
    sizes = [1, 4, 2, 3]
    run, local, _ = trained_run()
    for site, size in enumerate(sizes):
        run.sites[site].counter.tokens = 16 * size
    synchronize(run)
    for bucket in run.plan.segment_plan.buckets:
        weights = torch.tensor([sizes[site] for site in bucket.holders], dtype=torch.float64)
        for segment in bucket.segments:
            own = torch.stack([local[site, segment.name] for site in bucket.holders]).double()
            mean = (own * weights[:, None, None]).sum(0) / weights.sum()
            for site in bucket.holders:
                torch.testing.assert_close(run.sites[site].view(segment), mean.float())
            if len(bucket.holders) > 1:
                assert not torch.allclose(own.mean(0), mean, atol=1e-5)


def test_records_say_how_far_the_product_is_from_the_mean_product() -> None:
    sizes = [1, 4, 2, 3]
    run, local, _ = trained_run()
    assert run.sync.figures() == {}
    for site, size in enumerate(sizes):
        run.sites[site].counter.tokens = 16 * size
    synchronize(run)
    mean: dict[str, Tensor] = {}
    for site, client in run.sites.items():
        for name in client_of(run, site).adapted.layers:
            rows = [
                torch.cat(
                    [
                        local[site, segment.name]
                        for segment in sorted(client.segments, key=lambda s: s.start)
                        if segment.parameter == f"{name}.{which}"
                    ]
                ).double()
                for which in ("lora_A", "lora_B")
            ]
            mean[name] = mean.get(name, 0) + sizes[site] / 10 * rows[1].T @ rows[0]
    server = {name: p.detach().double() for name, p in run.sites[3].parameters.items()}
    got = {name: server[f"{name}.lora_B"].T @ server[f"{name}.lora_A"] for name in mean}
    wrong = sum(float((got[name] - mean[name]).square().sum()) for name in mean)
    whole = sum(float(mean[name].square().sum()) for name in mean)
    error = run.sync.figures()["product_error"]
    assert error == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
    assert error > 0.1


def test_a_download_is_the_servers_prefix() -> None:
    run, _, _ = trained_run()
    synchronize(run)
    largest = run.sites[3].parameters
    for site, rank in enumerate(RANKS):
        for name, parameter in run.sites[site].parameters.items():
            assert_same_bits({name: parameter}, {name: largest[name][:rank]})


def test_equal_ranks_without_nesting_are_plain_averaging() -> None:
    """To the last bit: the anchor minus the mean of the differences, in the sites' order."""
    run, local, before = trained_run(adapters__ranks=[4, 4, 4, 4], adapters__nesting="none")
    synchronize(run)
    weight = float(2 * 2 * 16)  # tokens of a client in a round
    for name, anchor in before.items():
        total = torch.zeros_like(anchor)
        for site in range(4):
            total += (anchor - local[site, name]) * weight
        mean = anchor - total / (4 * weight)
        assert_same_bits({name: run.sync.anchors.values[name].detach()}, {name: mean})


def test_counted_bytes_are_those_planned() -> None:
    run, _, _ = trained_run()
    synchronize(run)  # refuses other bytes
    width = 4 * (16 + 16) * 4  # bytes of one rank dimension
    for site, rank in enumerate(RANKS):
        counted = run.transport.counts[site].payload["shared"]
        assert counted == run.plan.traffic[site].payload == width * min(rank, 2)


def test_over_a_network_the_bits_are_the_same() -> None:
    config = adapter_config(adapters__participation=0.75)  # of three the order of a sum shows
    torch.manual_seed(123)
    proxy = client_run(config)
    drawn = torch.get_rng_state()
    torch.manual_seed(4)
    client_run(config)
    assert torch.equal(torch.get_rng_state(), drawn)
    for round_idx in range(2):
        run_local_steps(proxy, round_idx)
        synchronize(proxy)
    whole = proxy.system.evaluate_whole(proxy.plan, proxy.sites, proxy.transport, proxy.data)

    def work(transport: Any) -> Any:
        run = client_run(config, transport)
        for round_idx in range(2):
            run_local_steps(run, round_idx)
            synchronize(run)
        found = run.system.evaluate_whole(run.plan, run.sites, transport, run.data)
        return parameters_of(run), found

    parts = all_good(over_gloo(4, work))
    assert_same_bits({k: v for part, _ in parts for k, v in part.items()}, parameters_of(proxy))
    for _, found in parts:
        assert found.loss == whole.loss
        assert found.more == whole.more


def test_a_client_of_weight_zero_changes_nothing() -> None:
    """Whatever its rows hold: they are not read."""

    def means(value: float) -> dict[int, Tensor]:
        run, _, _ = trained_run()
        prepared = run.sync.prepare()
        prepared.counts[1] = type(prepared.counts[1])(tokens=0, executed={})
        with torch.no_grad():
            for parameter in run.sites[1].parameters.values():
                parameter.fill_(value)
        return run.sync._average(prepared)

    assert_same_bits(means(float("nan")), means(0.0))


# ---------------------------------------------------------------------------------------- sampling


def test_participants_are_drawn_from_the_seed() -> None:
    adapters = adapter_config(adapters__participation=0.5).adapters
    drawn = [participants(adapters, 0, round_idx) for round_idx in range(30)]
    assert all(len(clients) == 2 for clients in drawn)
    assert {client for clients in drawn for client in clients} == {0, 1, 2, 3}
    assert drawn == [participants(adapters, 0, round_idx) for round_idx in range(30)]
    assert participants(adapter_config().adapters, 0, 0) == (0, 1, 2, 3)


def test_who_does_not_take_part_only_receives() -> None:
    config = adapter_config(adapters__participation=0.5)
    there = participants(config.adapters, config.seed, 0)
    run = client_run(config)
    records, _, _ = run_local_steps(run, 0)
    assert {record["site"] for record in records} == set(there)
    local = parameters_of(run)
    synchronize(run)
    for bucket in run.plan.segment_plan.buckets:
        for segment in bucket.segments:
            own = [local[site, segment.name] for site in bucket.holders if site in there]
            for site in bucket.holders if own else ():
                torch.testing.assert_close(run.sites[site].view(segment), torch.stack(own).mean(0))
    assert {site.step_idx for site in run.sites.values()} == {config.local_steps}
