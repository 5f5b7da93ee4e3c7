"""The sync: means over holders, the outer step, and a commit on all sites or on none.

The seven rules of the design are `test_rule_1_...` to `test_rule_7_...`; what else can go wrong
between sites follows.
"""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import (
    LAYOUTS,
    RandomStream,
    all_good,
    anchors_of,
    assert_same_bits,
    make_run,
    make_site,
    make_sync,
    named_view,
    one_round,
    over_gloo,
    parameters_of,
    tiny_config,
)
from torch import Tensor

from fomoe.errors import ConfigError, FomoeError, SyncError
from fomoe.planning import plan_run
from fomoe.rules import ELEMENTWISE_OPTIMIZERS
from fomoe.run import Run
from fomoe.segments import Bucket, Plan, RoundCounts, Segment, holder_bytes
from fomoe.state import entry
from fomoe.sync.buckets import Contribution, chunks_of, split_bucket, weigh
from fomoe.sync.exchange import (
    Item,
    agreed,
    check_sites,
    fetch,
    gather,
    mean_over_holders,
    share,
)
from fomoe.sync.gloo import GlooTransport
from fomoe.sync.sync import Prepared
from fomoe.sync.transport import InMemoryTransport, Transport
from fomoe.training import merged_loss, run_local_steps, synchronize

# What a failure says that came with the timeout; one that is noticed at once does not.
TIMED_OUT = "no word from"

PLAIN_MEAN = {"outer.lr": 1.0, "outer.momentum": 0.0, "sync.weight": "uniform"}


def random_counts(config, seed: int) -> RoundCounts:
    """Executed assignments, about a third of them zero."""
    rng = random.Random(seed)
    executed = {
        (layer, expert): rng.choice([0, rng.randint(1, 50), rng.randint(1, 50)])
        for layer in config.model.moe_layers
        for expert in range(config.model.num_experts)
    }
    return RoundCounts(tokens=rng.randint(1, 100), executed=executed)


@torch.no_grad()
def move_randomly(run: Run, scale: float = 0.1) -> None:
    """Local training as far as the sync is concerned: every site's parameters move."""
    for site, own in run.sites.items():
        generator = torch.Generator().manual_seed(1000 + site)
        for parameter in own.parameters.values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def means_by_segment(run: Run, counts: dict[int, RoundCounts]) -> dict[str, Tensor]:
    means = run.sync.exchange(prepared(run, counts)).means
    found = {}
    for bucket in run.sync.buckets:
        if bucket.index in means:
            found |= split_bucket(bucket, means[bucket.index])
    return found


def prepared(run: Run, counts: dict[int, RoundCounts]) -> Prepared:
    """A round that ended with these counts."""
    return Prepared({site: own.end_round() for site, own in run.sites.items()}, counts)


def segments_of(plan: Plan) -> list[Segment]:
    return [segment for bucket in plan.buckets for segment in bucket.segments]


# ---------------------------------------------------------------------------------- the seven rules


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule_1_one_reduction_per_bucket_and_no_holder_set_twice(layout):
    """Equal holders (and trainers) are reduced together, by exactly the holders."""
    config = tiny_config(LAYOUTS[layout])
    run = make_run(config)
    reduced: list[Bucket] = []

    def watch(buckets, contribute, real=run.sync.reduce):
        reduced.extend(buckets)
        return real(buckets, contribute)

    run.sync.reduce = watch
    average_gradients_or_parameters(run)
    keys = [(b.is_expert, b.holders, b.trainers, bool(b.copies)) for b in reduced]
    assert len(set(keys)) == len(keys)
    assert [b.index for b in reduced] == sorted(b.index for b in reduced)
    if config.placement.kind == "cyclic" and config.placement.capacity is None:
        assert len({b.holders for b in reduced}) <= config.num_sites + 1


def average_gradients_or_parameters(run: Run) -> None:
    if run.config.sync.average == "gradients":
        run_local_steps(replace(run, config=run.config.model_copy(update={"local_steps": 1})), 0)
    else:
        counts = {site: random_counts(run.config, site) for site in run.sites}
        means_by_segment(run, counts)


@pytest.mark.parametrize("rule", ["presence", "tokens", "uniform"])
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "ddp" and "copies" not in n])
def test_rule_2_the_mean_is_over_contributors_and_everyone_who_holds_receives(layout, rule):
    """Against a plain loop in fp64, with random weights and with experts that nobody used."""
    config = tiny_config(LAYOUTS[layout], sync__weight=rule)
    run = make_run(config)
    before = parameters_of(run)
    move_randomly(run)
    counts = {site: random_counts(config, site) for site in run.sites}
    if config.model.moe_layers:
        unused = (config.model.moe_layers[0], 0)
        for own in counts.values():
            own.executed[unused] = 0  # type: ignore[index]
    means = means_by_segment(run, counts)
    placement, rows = run.plan.placement, config.sync.router_rows == "holders"
    checked = 0
    for segment in segments_of(run.plan.segment_plan):
        holders = range(config.num_sites)
        if segment.is_expert:
            row = placement.moe_layers.index(segment.layer)
            holders = placement.holders[row][segment.expert]
        if len(holders) == 1 and config.sync.single_holder == "local":
            assert segment.name not in means
            continue
        total, weights = torch.zeros(segment.shape, dtype=torch.float64), 0.0
        for site in holders:
            weight = 1.0
            if segment.expert is not None:
                row = placement.moe_layers.index(segment.layer)
                trains = site in placement.trainers[row][segment.expert]
                if not trains and (segment.is_expert or rows):
                    continue
            executed = counts[site].tokens
            if segment.is_expert:
                executed = counts[site].executed[segment.layer, segment.expert]
            if rule == "presence":
                weight = 1.0 if executed else 0.0
            elif rule == "tokens":
                weight = float(executed)
            local = run.sites[site].view(segment)
            total += weight * (before[site, segment.name] - local).double()
            weights += weight
        expected = total / weights if weights else torch.zeros_like(total)
        torch.testing.assert_close(means[segment.name].double(), expected, rtol=1e-5, atol=1e-7)
        if segment.is_expert and rule != "uniform" and (segment.layer, segment.expert) == unused:
            assert (means[segment.name] == 0).all()
        checked += segment.numel
    assert checked == sum(b.numel for b in run.sync.buckets)


def test_rule_2_a_site_whose_expert_saw_no_token_does_not_dilute_but_receives():
    config = tiny_config(num_sites=2, placement__replication_factor=2, outer__momentum=0.0)
    run = make_run(config)
    name = "layers.0.moe.experts.3.down"
    anchor = named_view(run.sites[0], name).clone()
    move_randomly(run)
    local = named_view(run.sites[0], name).clone()
    used = {(layer, e): 5 for layer in (0, 1) for e in range(8)}
    counts = {0: RoundCounts(10, used), 1: RoundCounts(10, used | {(0, 3): 0})}
    run.sync.commit(run.sync.exchange(prepared(run, counts)))
    expected = anchor - 0.7 * (anchor - local)
    for site in (0, 1):
        torch.testing.assert_close(named_view(run.sites[site], name), expected)


def test_rule_2_a_value_of_weight_zero_is_never_read():
    """0 x NaN is NaN: what an idle holder stores must not reach the sum."""
    segment = segments_of(plan_run(tiny_config()).segment_plan)[0]
    bucket = Bucket(index=0, holders=(0,), trainers=(0,), is_expert=True, segments=(segment,))
    size = bucket.numel
    own = Contribution(bucket, [0.0], lambda s, i, j: torch.full((j - i,), torch.nan))
    assert (own.values(0, size) == 0).all()
    own = Contribution(bucket, [2.0], lambda s, i, j: torch.ones(j - i))
    (chunk,) = chunks_of(bucket)
    assert (weigh(chunk, own.values(0, size), own.weights) == 2).all()


def test_a_contribution_is_the_same_in_any_pieces():
    bucket = random_bucket(random.Random(5), 0, 3)
    own = random_contribution(bucket, 1)
    whole = own.values(0, bucket.numel)
    for size in (1, 2, 5, bucket.numel):
        starts = range(0, bucket.numel, size)
        parts = [own.values(i, min(i + size, bucket.numel)) for i in starts]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("SGD", 0.7), ("Adam", 0.01), ("Adagrad", 0.1), ("NAdam", 0.01)]
)
def test_rule_3_an_expert_step_depends_on_no_other_segment(optimizer, lr):
    """Change everything else at every site by a factor of 1000: the expert gets the same bits."""
    config = tiny_config(outer__optimizer=optimizer, outer__lr=lr)
    name = "layers.1.moe.experts.5.gate_up"
    results = []
    for factor in (1.0, 1000.0):
        run = make_run(config)
        for _ in range(3):
            before = anchors_of(run)
            move_randomly(run)
            with torch.no_grad():
                for own in run.sites.values():
                    for segment in own.segments:
                        if segment.name != name:
                            own.view(segment).add_(factor)
            synchronize(run_with_counts(run))
        anchor = run.sync.anchors.values[name]
        assert not torch.equal(anchor, before[name])
        results.append({name: anchor})
    assert_same_bits(*results)


def run_with_counts(run: Run) -> Run:
    """Pretend that every resident expert executed tokens."""
    for own in run.sites.values():
        own.counter.executed_LE += 7
        own.counter.tokens += 7
    return run


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ddp"])
def test_rule_4_every_element_at_every_holder_is_reduced(layout):
    """Each site moves by its own constant; afterwards every single element shows the exact mean."""
    config = tiny_config({**LAYOUTS[layout], **PLAIN_MEAN})
    run = make_run(config)
    anchors = anchors_of(run)
    with torch.no_grad():
        for site, own in run.sites.items():
            for parameter in own.parameters.values():
                parameter += 2.0**site
    alone = parameters_of(run)
    synchronize(run_with_counts(run))
    for segment in segments_of(run.plan.segment_plan):
        local = len(segment.holders) == 1 and config.sync.single_holder == "local"
        for site in segment.holders:
            own = run.sites[site].view(segment)
            if local:
                assert torch.equal(own, alone[site, segment.name])
                continue
            trainers = segment.trainers
            if config.placement.kind == "copies":  # not a step is taken: they are tied
                trainers = tuple(run.sites)
            moved = sum(2.0**t for t in trainers) / len(trainers)
            torch.testing.assert_close(own - anchors[segment.name], torch.full_like(own, moved))


def test_rule_4_the_plan_covers_the_model_and_counted_bytes_are_planned_bytes():
    for layout, options in LAYOUTS.items():
        config = tiny_config(options)
        run = make_run(config)
        elements = {s.name: s.numel for own in run.sites.values() for s in own.segments}
        assert sum(elements.values()) == run.plan.segment_plan.numel, layout
        one_round(run)
        for site in run.sites:
            counted = run.transport.counts[site]
            planned = run.plan.traffic_of_sync(site, config.local_steps)
            syncs = run.plan.syncs_per_round
            assert counted.payload["shared"] == syncs * planned.payload_shared, layout
            assert counted.payload["expert"] == syncs * planned.payload_expert, layout
            assert counted.wire["shared"] == syncs * planned.wire_shared, layout
            assert counted.wire["expert"] == syncs * planned.wire_expert, layout


def test_rule_5_a_reduction_leaves_what_was_passed_in_alone():
    config = tiny_config()

    def work(transport) -> None:
        run = make_run(config, transport)
        move_randomly(run)
        parameters, anchors = parameters_of(run), anchors_of(run)
        counts = {site: random_counts(config, site) for site in run.sites}
        means_by_segment(run, counts)
        assert_same_bits(parameters, parameters_of(run))
        assert_same_bits(anchors, anchors_of(run))

    work(InMemoryTransport(range(4)))
    all_good(over_gloo(4, work))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rule_6_replicas_are_bit_identical_at_all_holders_after_every_sync(layout):
    """And the hashes say so: equal over gloo, equal to those of one process."""
    config = tiny_config(LAYOUTS[layout])

    def work(transport):
        run = make_run(config, transport)
        hashes = [one_round(run, round_idx) for round_idx in range(2)]
        return hashes, parameters_of(run)

    results = all_good(over_gloo(config.num_sites, work))
    proxy_hashes, proxy_parameters = work(InMemoryTransport(range(config.num_sites)))
    run_plan = plan_run(config)
    plan = run_plan.segment_plan
    everything = {key: value for _, own in results for key, value in own.items()}
    assert_same_bits(everything, proxy_parameters)
    for segment in segments_of(plan):
        first = everything[segment.holders[0], segment.name]
        for site in segment.holders[1:]:
            assert_same_bits({0: first}, {0: everything[site, segment.name]})
    for round_idx, everyone in enumerate(proxy_hashes):
        replicas = run_plan.replicas((round_idx + 1) * config.local_steps)
        assert set(everyone) == {b.index for b in replicas}
        if config.placement.kind != "copies":
            assert set(everyone) == {b.index for b in plan.buckets if len(b.holders) > 1}
        for site, (hashes, _) in enumerate(results):
            held = {b.index for b in replicas if site in b.holders}
            assert hashes[round_idx] == {index: everyone[index] for index in held}
    if proxy_hashes[0]:
        assert proxy_hashes[0] != proxy_hashes[1]


def test_rule_7_the_pseudo_gradient_is_anchor_minus_local():
    """Sites that moved up pull the anchor up; with lr 1 and no momentum it lands on their mean."""
    config = tiny_config(PLAIN_MEAN, method="fomoe", placement__replication_factor=4)
    run = make_run(config)
    anchors = anchors_of(run)
    with torch.no_grad():
        for site, own in run.sites.items():
            own.parameters["embedding.weight"] += 1.0 + site
    counts = {site: random_counts(config, site) for site in run.sites}
    means = means_by_segment(run, counts)
    torch.testing.assert_close(means["embedding.weight"], torch.full((32, 16), -2.5))
    synchronize(run_with_counts(run))
    moved = run.sync.anchors.values["embedding.weight"].detach() - anchors["embedding.weight"]
    torch.testing.assert_close(moved, torch.full((32, 16), 2.5))


def test_rule_7_anchor_and_momentum_are_fp32_copies_off_the_parameters_and_checkpointed():
    config = tiny_config()
    run = make_run(config)
    one_round(run)
    storages = {
        parameter.untyped_storage().data_ptr()
        for own in run.sites.values()
        for parameter in own.parameters.values()
    }
    plan = run.plan.segment_plan
    anchors = run.sync.anchors
    assert anchors.values.keys() == {s.name for s in segments_of(plan)}
    for anchor in anchors.values.values():
        momentum = anchors.optimizer.state[anchor]["momentum_buffer"]
        for tensor in (anchor, momentum):
            assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
            assert tensor.untyped_storage().data_ptr() not in storages
    for site in range(4):
        saved = run.sync.state_of(site)
        held = {s.name for s in segments_of(plan) if site in s.holders}
        assert {entry("anchor", name) for name in held} <= saved.keys()
        assert {entry("outer", "momentum_buffer", name) for name in held} <= saved.keys()
        assert len(saved) == 2 * len(held)


# ---------------------------------------------------------------------------------- DiLoCo, by hand


def hand_written_diloco(config, rounds: int, lr: float, momentum: float) -> dict[str, Tensor]:
    """K whole copies, H steps each, then Nesterov written out; no torch.optim outside."""
    sites = [make_site(config, site) for site in range(config.num_sites)]
    anchor = {s.name: sites[0].view(s).clone() for s in sites[0].segments}
    velocity = {name: torch.zeros_like(value) for name, value in anchor.items()}
    for _ in range(rounds):
        for own in sites:
            for _ in range(config.local_steps):
                own.apply(own.backward())
        for name in anchor:
            delta = sum(anchor[name] - named_view(own, name) for own in sites) / len(sites)
            velocity[name] = momentum * velocity[name] + delta
            anchor[name] = anchor[name] - lr * (delta + momentum * velocity[name])
            for own in sites:
                named_view(own, name).copy_(anchor[name])
    return anchor


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.4, 0.5)])
def test_full_replication_is_a_hand_written_diloco(lr, momentum):
    """Over several rounds, so that momentum and the kept inner state count."""
    config = tiny_config(
        method="diloco",
        num_sites=3,
        local_steps=3,
        rounds=4,
        outer__lr=lr,
        outer__momentum=momentum,
        sync__weight="uniform",
    )
    expected = hand_written_diloco(config, 4, lr, momentum)
    run = make_run(config)
    start = anchors_of(run)
    for round_idx in range(4):
        one_round(run, round_idx)
    for name, value in expected.items():
        torch.testing.assert_close(
            run.sync.anchors.values[name].detach(), value, rtol=1e-4, atol=1e-6
        )
        assert not torch.equal(value, start[name])


def test_the_first_sync_comes_after_exactly_h_steps_and_moves_the_anchor_at_once():
    config = tiny_config(method="diloco", local_steps=3, rounds=1, sync__weight="uniform")
    expected = hand_written_diloco(config, 1, 0.7, 0.9)
    run = make_run(config)
    one_round(run)
    assert {own.step_idx for own in run.sites.values()} == {3}
    for name, value in expected.items():
        torch.testing.assert_close(
            run.sync.anchors.values[name].detach(), value, rtol=1e-5, atol=1e-7
        )
        for own in run.sites.values():
            assert torch.equal(named_view(own, name), run.sync.anchors.values[name])


class Joined:
    """The streams of several sites as one: each batch holds theirs, one after the other."""

    def __init__(self, config, sites: int) -> None:
        self.streams = [RandomStream(config, 100 + site) for site in range(sites)]

    def next_batch(self, batch_size: int):
        import numpy as np

        share = batch_size // len(self.streams)
        return np.concatenate([stream.next_batch(share) for stream in self.streams])


ONE_BIG_BATCH = {
    "local_steps": 1,
    "rounds": 5,
    "inner.optimizer": "sgd",
    "inner.lr": 0.5,
    "inner.schedule": "constant",
    "inner.weight_decay": 0.0,
    "inner.clip_norm": 0.0,
    "router.lb_loss": 0.0,
    "router.z_loss": 0.0,
    "sync.weight": "uniform",
}


@pytest.mark.parametrize("method", ["photon", "ddp"])
def test_one_step_of_sgd_averaged_over_all_is_one_big_batch(method):
    """H = 1, r = K, outer SGD lr 1 without momentum: nothing is left of the split."""
    config = tiny_config(ONE_BIG_BATCH, method=method)
    run = make_run(config)
    alone = make_site(tiny_config(ONE_BIG_BATCH, method="single", inner__batch_size=8))
    alone.stream = Joined(config, 4)
    start = {n: p.detach().clone() for n, p in alone.parameters.items()}
    for round_idx in range(5):
        one_round(run, round_idx)
    alone.run_local_steps(5, lambda _: None)
    for name, value in alone.parameters.items():
        assert not torch.equal(value, start[name]), name
        for own in run.sites.values():
            torch.testing.assert_close(own.parameters[name], value, rtol=1e-4, atol=1e-6)


def test_inner_optimizer_state_is_kept_across_syncs():
    run = make_run(tiny_config())
    one_round(run)
    own = run.sites[0]
    kept = {n: own.optimizer.state[p]["exp_avg"].clone() for n, p in own.trainable.items()}
    synchronize(run_with_counts(run))
    for name, parameter in own.trainable.items():
        state = own.optimizer.state[parameter]
        assert torch.equal(state["exp_avg"], kept[name])
        assert float(state["step"]) == 2
    assert any((value != 0).any() for value in kept.values())


# ---------------------------------------------------------------------------------------------- DDP


def test_ddp_averages_every_gradient_and_keeps_sites_identical():
    config = tiny_config(method="ddp")
    run = make_run(config)
    for own in run.sites.values():
        own.backward()
    gradients = {
        name: torch.stack([own.parameters[name].grad.double() for own in run.sites.values()]).mean(
            0
        )
        for name in run.sites[0].parameters
    }
    run.sync.average_gradients()
    for own in run.sites.values():
        for name, parameter in own.parameters.items():
            torch.testing.assert_close(
                parameter.grad.double(), gradients[name], rtol=1e-5, atol=1e-7
            )

    def work(transport):
        own = make_run(config, transport)
        records = []
        for round_idx in range(2):
            records += run_local_steps(own, round_idx)[0]
            synchronize(own)
            own.sync.check_replicas()
        return own.sites[transport.sites[0]].parameters, records

    results = all_good(over_gloo(4, work))
    for parameters, records in results:
        assert_same_bits(parameters, results[0][0])
        assert len(records) == 4
    losses = {tuple(record["loss"] for record in records) for _, records in results}
    norms = {tuple(record["grad_norm"] for record in records) for _, records in results}
    assert len(losses) == 4, "the sites read different text"
    assert len(norms) == 1, "but they step with the same gradient"


# --------------------------------------------------------------------------------- outer optimizers


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("Adam", {"betas": [0.9, 0.99]}),
        ("AdamW", {"weight_decay": 0.1}),
        ("RMSprop", {"momentum": 0.5}),
        ("Adagrad", {}),
        ("ASGD", {}),
        ("SGD", {"weight_decay": 0.1}),
    ],
)
def test_any_elementwise_optimizer_steps_outside_and_replicas_stay_equal(optimizer, options):
    config = tiny_config(outer__optimizer=optimizer, outer__lr=0.05, outer__options=options)

    def work(transport):
        run = make_run(config, transport)
        before = anchors_of(run)
        for round_idx in range(2):
            one_round(run, round_idx)  # raises if replicas differ
        assert all(not torch.equal(a, before[n]) for n, a in run.sync.anchors.values.items())
        return parameters_of(run)

    results = all_good(over_gloo(4, work))
    everything = {key: value for own in results for key, value in own.items()}
    assert_same_bits(everything, work(InMemoryTransport(range(4))))


@pytest.mark.parametrize(
    ("optimizer", "options"), [("LBFGS", {}), ("Sgd", {}), ("Muon", {}), ("Adam", {"beta": 1})]
)
def test_an_optimizer_that_is_none_or_not_elementwise_is_refused(optimizer, options):
    with pytest.raises(ConfigError, match=r"outer\."):
        make_run(tiny_config(outer__optimizer=optimizer, outer__options=options))


def test_the_optimizers_that_are_allowed_are_torchs_elementwise_ones():
    """What is not allowed needs a closure, or sparse gradients or matrices only."""
    classes = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    others = {"LBFGS", "SparseAdam", "Muon", "Optimizer", "Adafactor"}
    assert classes - set(ELEMENTWISE_OPTIMIZERS) <= others
    for optimizer in ELEMENTWISE_OPTIMIZERS:
        run = make_run(
            tiny_config(num_sites=1, placement__replication_factor=1, outer__optimizer=optimizer)
        )
        assert type(run.sync.anchors.optimizer) is getattr(torch.optim, optimizer)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "NAdam"])
def test_outer_state_and_anchor_come_back_to_the_bit(optimizer):
    """Losing the anchor or the momentum would change the second round."""
    config = tiny_config(outer__optimizer=optimizer, outer__lr=0.05)

    def second_round(run: Run) -> dict:
        with torch.no_grad():
            for own in run.sites.values():
                for segment in own.segments:
                    own.view(segment).add_(0.01 * len(segment.name))
        synchronize(run_with_counts(run))
        return parameters_of(run) | anchors_of(run)

    run = make_run(config)
    move_randomly(run)
    synchronize(run_with_counts(run))
    saved = {site: {k: v.clone() for k, v in run.sync.state_of(site).items()} for site in run.sites}
    parameters = {
        site: {n: p.detach().clone() for n, p in own.parameters.items()}
        for site, own in run.sites.items()
    }
    expected = second_round(run)
    again = make_run(config)
    with torch.no_grad():
        for site, own in again.sites.items():
            for name, parameter in own.parameters.items():
                parameter.copy_(parameters[site][name])
            again.sync.load_state_of(site, saved[site])
    assert_same_bits(second_round(again), expected)


def test_single_holder_experts_step_alone_or_stay_local():
    for rule in ("outer", "local"):
        config = tiny_config(placement__replication_factor=1, sync__single_holder=rule)
        run = make_run(config)
        name = "layers.0.moe.experts.0.down"
        (site,) = run.plan.placement.holders[0][0]
        start = named_view(run.sites[site], name).clone()
        move_randomly(run)
        local = named_view(run.sites[site], name).clone()
        synchronize(run_with_counts(run))
        after = named_view(run.sites[site], name)
        if rule == "local":
            assert torch.equal(after, local)
        else:
            expected = start - 0.7 * (1 + 0.9) * (start - local)  # Nesterov's first step
            torch.testing.assert_close(after, expected)
        assert sum(c.payload["expert"] for c in run.transport.counts.values()) == 0


# --------------------------------------------------------------------------------------- transports


def random_bucket(rng: random.Random, index: int, num_sites: int) -> Bucket:
    """From one element on, so also fewer than there are holders."""
    holders = tuple(sorted(rng.sample(range(num_sites), rng.randint(1, num_sites))))
    segments = tuple(
        Segment(f"p{i}", f"p{i}", shape, 0, shape[0], True, 0, i, holders, holders, 0)
        for i, shape in enumerate(
            rng.choice([(1,), (2,), (3, 1), (5, 7), (4, 4, 4)]) for _ in range(rng.randint(1, 3))
        )
    )
    return Bucket(
        index=index,
        holders=holders,
        trainers=holders,
        is_expert=rng.random() < 0.5,
        segments=segments,
    )


def random_contribution(bucket: Bucket, site: int, exponent: int = 20) -> Contribution:
    """Values of very different size, so that the order of addition shows in the last bits."""
    generator = torch.Generator().manual_seed(97 * bucket.index + site)
    values = torch.randn(bucket.numel, generator=generator)
    scale = torch.randint(-exponent, exponent, (bucket.numel,), generator=generator)
    weights = torch.rand(len(bucket.segments), generator=generator, dtype=torch.float64)
    parts = split_bucket(bucket, values * 2.0**scale)
    return Contribution(
        bucket, weights.tolist(), lambda s, start, stop: parts[s.name].view(-1)[start:stop]
    )


@pytest.mark.parametrize("num_sites", [1, 2, 3, 5])
def test_gloo_and_memory_give_the_same_bits_and_count_the_same_bytes(num_sites):
    rng = random.Random(num_sites)
    buckets = tuple(random_bucket(rng, index, num_sites) for index in range(25))
    if num_sites > 2:
        assert any(bucket.numel < len(bucket.holders) for bucket in buckets)
        assert any(len(bucket.holders) == 1 for bucket in buckets)
    items = [Item(f"item {i}", (2, i + 1), bucket.holders) for i, bucket in enumerate(buckets[:9])]

    def work(transport):
        means = mean_over_holders(transport, buckets, random_contribution)
        messages = gather(transport, lambda site: b"\x00\xff" * site)
        shared = share(transport, lambda: b"made once")
        fetched = fetch(
            transport,
            items,
            lambda site, name: torch.full((2, int(name.split()[1]) + 1), float(len(name))),
        )
        counts = {site: counts.state() for site, counts in transport.counts.items()}
        return means, (messages, shared), fetched, counts

    memory = work(InMemoryTransport(range(num_sites)))
    results = all_good(over_gloo(num_sites, work))
    for site, (means, control, fetched, counts) in enumerate(results):
        assert set(means) == {b.index for b in buckets if site in b.holders}
        assert_same_bits(means, {index: memory[0][index] for index in means})
        assert control == memory[1]
        assert_same_bits(fetched, memory[2])
        own, proxy = counts[site], memory[3][site]
        for kind in ("shared", "expert", "evaluation", "control"):
            for name in ("payload", "wire"):
                assert own[name].get(kind, 0) == proxy[name].get(kind, 0), (kind, name)


def test_means_are_those_of_a_loop_over_the_holders_in_order():
    rng = random.Random(3)
    transport = InMemoryTransport(range(4))
    for index in range(20):
        bucket = random_bucket(rng, index, 4)
        (mean,) = mean_over_holders(transport, [bucket], random_contribution).values()
        values, weights = torch.zeros(bucket.numel), torch.zeros(len(bucket.segments)).double()
        for site in bucket.holders:
            own = random_contribution(bucket, site)
            share = own.values(0, bucket.numel)
            for part, weight in zip(split_bucket(bucket, share).values(), own.weights, strict=True):
                part *= float(weight)
            values += share
            weights += own.weights
        for part, weight in zip(split_bucket(bucket, values).values(), weights, strict=True):
            part /= float(weight)
        torch.testing.assert_close(mean, values, rtol=0, atol=0)


def test_counted_wire_bytes_are_the_planned_ones_for_each_holder():
    bucket = random_bucket(random.Random(7), 0, 4)
    assert len(bucket.holders) == 3

    def work(transport):
        mean_over_holders(transport, [bucket], random_contribution)
        return transport.counts[transport.sites[0]]

    kind = "expert" if bucket.is_expert else "shared"
    for site, counts in enumerate(all_good(over_gloo(4, work))):
        if site in bucket.holders:
            position = bucket.holders.index(site)
            planned = holder_bytes(bucket.numel, len(bucket.holders), position)
            assert (counts.payload[kind], counts.wire[kind]) == planned
            assert planned[0] == 4 * bucket.numel
        else:
            assert not counts.payload


def test_sites_may_have_any_numbers_and_groups_do_not_mix():
    """A membership is a store and a list of members, so a later one can leave a site out."""
    bucket = Bucket(
        index=0,
        holders=(2, 7),
        trainers=(2, 7),
        is_expert=True,
        segments=(Segment("p", "p", (5,), 0, 5, True, 0, 0, (2, 7), (2, 7), 0),),
    )

    def work(transport):
        def contribute(bucket, site):
            return Contribution(bucket, [1.0], lambda s, i, j: torch.full((j - i,), float(site)))

        means = mean_over_holders(transport, [bucket], contribute)
        return {index: mean.tolist() for index, mean in means.items()}

    assert all_good(over_gloo([2, 5, 7], work)) == [{0: [4.5] * 5}, {}, {0: [4.5] * 5}]


def test_nothing_is_unpickled_from_the_wire(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle on the wire")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)

    def work(transport):
        run = make_run(tiny_config(router__balance="both"), transport)
        one_round(run)
        return parameters_of(run)

    replicas: dict[str, list[torch.Tensor]] = {}
    for site in all_good(over_gloo(4, work)):
        for (_, name), value in site.items():
            replicas.setdefault(name, []).append(value)
    assert {len(values) for values in replicas.values()} == {2, 4}
    assert all(torch.equal(values[0], value) for values in replicas.values() for value in values)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["cyclic", "one holder, local", "spes, router rows"])
def test_uninitialised_memory_does_not_reach_a_sync(layout):
    config = tiny_config(LAYOUTS[layout])

    def work(transport):
        run = make_run(config, transport)
        for round_idx in range(2):
            one_round(run, round_idx)
        return parameters_of(run) | anchors_of(run)

    for own in [*all_good(over_gloo(4, work)), work(InMemoryTransport(range(4)))]:
        assert all(tensor.isfinite().all() for tensor in own.values())


# ----------------------------------------------------------------------------------------- failures


class Snapshot:
    """A run's parameters, anchors and outer state; `unchanged` compares them to the bit."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before = self._read()

    def _read(self) -> dict:
        state = {
            (site, name): tensor.clone()
            for site in self.run.sites
            for name, tensor in self.run.sync.state_of(site).items()
        }
        return parameters_of(self.run) | state

    def assert_unchanged(self) -> None:
        assert_same_bits(self.before, self._read())


def failing_sync(
    config,
    spoil: Callable[[Run, int], None],
    expected: type[Exception],
    transport: Transport,
    *,
    first_round: bool = True,
) -> str:
    """A good round, local steps, something spoiled, then a sync that fails and changes nothing."""
    run = make_run(config, transport)
    if first_round:
        one_round(run)
    run_local_steps(run, 1)
    for site in run.sites:
        spoil(run, site)
    snapshot = Snapshot(run)
    with pytest.raises(expected) as caught:
        synchronize(run)
    snapshot.assert_unchanged()
    return str(caught.value)


_REST = "--resume continues from the newest checkpoint"
NOWHERE = f"; nothing of this sync is committed at any site, {_REST}"
NOT_HERE = f"; nothing of this sync is committed at this site, {_REST}"


@torch.no_grad()
def diverge(run: Run, site: int) -> None:
    if site == 2:
        next(iter(run.sites[2].parameters.values()))[0, 0] = torch.nan


@torch.no_grad()
def diverge_in_an_expert(run: Run, site: int) -> None:
    """Infinite in one element of an expert that not all sites hold."""
    if site == 2:
        name = next(n for n in run.sites[2].parameters if ".experts." in n)
        run.sites[2].parameters[name][0, 0] = torch.inf
        run_with_counts(run)


@torch.no_grad()
def poison_adam(run: Run, site: int) -> None:
    """The parameters are still finite; no later step would be."""
    if site == 2:
        name, parameter = next(iter(run.sites[2].trainable.items()))
        run.sites[2].optimizer.state[parameter]["exp_avg_sq"][0, 0] = torch.nan
        assert run.sites[2].parameters[name].isfinite().all()


@torch.no_grad()
def poison_a_bias(run: Run, site: int) -> None:
    if site == 2:
        run.sites[2].model.moe(1).router.execute_bias.fill_(-torch.inf)


FAILING = {
    **{name: LAYOUTS[name] for name in ("cyclic", "one holder, local", "ddp", "spes")},
    "int8": {"sync.codec": "int8", "placement.replication_factor": 3},
    "bf16": {"sync.codec": "bf16"},
}


@pytest.mark.parametrize("layout", ["cyclic", "one holder, local", "ddp", "int8", "bf16"])
@pytest.mark.parametrize("spoil", [diverge, diverge_in_an_expert, poison_adam, poison_a_bias])
def test_a_site_that_is_not_finite_stops_the_sync_at_all_sites(spoil, layout):
    """Also where no peer holds what is spoiled, and nothing is committed anywhere."""
    work = partial(failing_sync, tiny_config(FAILING[layout]), spoil, SyncError)
    for message in [*all_good(over_gloo(4, work)), work(InMemoryTransport(range(4)))]:
        assert "site 2" in message
        assert "not finite" in message
        assert "site 1" not in message


def test_an_outer_step_that_overflows_reaches_no_site():
    """Finite parameters, a finite mean, and a step beyond the largest number."""
    config = tiny_config(outer__lr=1e38, num_sites=3)

    def work(transport):
        run = make_run(config, transport)
        move_randomly(run, scale=10.0)
        before = parameters_of(run)
        with pytest.raises(SyncError, match=r"its anchors are not finite \(.*diverged") as caught:
            synchronize(run_with_counts(run))
        assert_same_bits(parameters_of(run), before)
        return str(caught.value)

    messages = all_good(over_gloo(3, work))
    assert set(messages) == {work(InMemoryTransport(range(3)))}


def miscount(run: Run, site: int) -> None:
    """One site sends more than the plan says, in the exchange that comes."""
    if site == 2:
        real = run.transport.move

        def counted_twice(what, messages):
            if what == "summing over the holders":
                run.transport.counts[2].add("expert", payload=4, wire=8)
            return real(what, messages)

        run.transport.move = counted_twice


@pytest.mark.parametrize("layout", ["cyclic", "spes", "int8"])
def test_bytes_that_were_not_planned_stop_the_sync_before_it_is_committed(layout):
    """At all sites, although one alone has counted them."""
    work = partial(failing_sync, tiny_config(FAILING[layout]), miscount, SyncError)
    for message in [*all_good(over_gloo(4, work)), work(InMemoryTransport(range(4)))]:
        assert message.startswith("site 2: it sent (payload, wire) = (")
        assert "bytes in this sync, but the plan says (" in message
        assert message.endswith(NOT_HERE)


def test_a_bucket_that_is_left_out_of_a_sync_stops_it_before_the_commit():
    """Its bytes are missed: they are compared with the run's plan, not with what was reduced."""

    def forget(run: Run, site: int) -> None:
        run.sync.buckets = run.sync.buckets[1:]
        run.sync.anchors.buckets = run.sync.anchors.buckets[1:]

    work = partial(failing_sync, tiny_config(), forget, SyncError)
    for message in [*all_good(over_gloo(4, work)), work(InMemoryTransport(range(4)))]:
        assert message.startswith("site 0: it sent (payload, wire) = (")
        assert message.endswith(NOT_HERE)


def test_bytes_of_gradients_are_compared_too():
    config = tiny_config(LAYOUTS["ddp"])

    def work(transport):
        run = make_run(config, transport)
        if 2 in run.sites:
            miscount(run, 2)
        run_local_steps(run, 0)
        with pytest.raises(SyncError, match=r"^site 2: it sent .* but the plan says \([^)]*\)$"):
            synchronize(run)

    all_good(over_gloo(4, work))
    work(InMemoryTransport(range(4)))


def test_only_a_failed_sync_says_that_nothing_of_it_is_committed():
    """An exchange at the start, for an evaluation or after the commit has nothing to commit."""
    config = tiny_config(sync__weight="uniform")

    def at_start(run):
        agreed(run.transport, lambda: None)

    def after_commit(run):
        run.sync.check_replicas()

    def leave_and_see(act, transport):
        run = make_run(config, transport)
        run_local_steps(run, 0)
        if transport.sites == (3,):
            raise OSError("the disk is full")
        with pytest.raises(SyncError) as caught:
            act(run)
        return str(caught.value)

    for act in (at_start, merged_loss, after_commit, synchronize):
        *messages, _ = over_gloo(4, partial(leave_and_see, act))
        for message in all_good(messages):
            assert "site 3 stopped: OSError: the disk is full" in message
            assert ("committed" in message) == (act is synchronize)
            assert act is not synchronize or message.endswith(NOWHERE)


@pytest.mark.parametrize("layout", ["cyclic", "int8"])
def test_a_sync_goes_on_after_a_refused_one(layout):
    """The agreement leaves no message behind that a later sync would take for its own."""
    config = tiny_config(FAILING[layout])

    def work(transport):
        run = make_run(config, transport)
        run_local_steps(run, 0)
        held = {s: x.parameters["embedding.weight"] for s, x in run.sites.items()}
        good = {site: value.detach().clone() for site, value in held.items()}
        spoil = 2 in held
        if spoil:
            held[2].data.fill_(torch.nan)
        with pytest.raises(SyncError):
            synchronize(run)
        if spoil:
            held[2].data.copy_(good[2])
        synchronize(run_with_counts(run))
        run.sync.check_replicas()
        return parameters_of(run)

    results = all_good(over_gloo(4, work))
    everything = {key: value for own in results for key, value in own.items()}
    assert_same_bits(everything, work(InMemoryTransport(range(4))))


@pytest.mark.parametrize(("at_bucket", "layout"), [(0, "cyclic"), (2, "cyclic"), (2, "int8")])
def test_an_error_at_one_site_in_the_middle_changes_nothing_anywhere(at_bucket, layout):
    """That site raises its own error; the others notice at once and name what they were doing."""
    config = tiny_config(FAILING[layout])

    def work(transport):
        run = make_run(config, transport)
        one_round(run)
        run_local_steps(run, 1)
        snapshot = Snapshot(run)
        real, calls = run.sync.reduce, iter(range(100))

        def broken(buckets, contribute):
            def fail(bucket, site):
                if site == 1 and next(calls) == at_bucket:
                    raise MemoryError("out of memory")
                return contribute(bucket, site)

            return real(buckets, fail)

        run.sync.reduce = broken
        with pytest.raises((SyncError, MemoryError)) as caught:
            synchronize(run)
        snapshot.assert_unchanged()
        return caught.type, str(caught.value)

    kinds = all_good(over_gloo(4, work))
    assert [kind for kind, _ in kinds] == [SyncError, MemoryError, SyncError, SyncError]
    assert not any(TIMED_OUT in message for _, message in kinds)
    assert work(InMemoryTransport(range(4)))[0] is MemoryError


def test_a_peer_that_is_gone_raises_before_the_timeout_and_the_group_stays_dead():
    config = tiny_config()

    def work(transport):
        run = make_run(config, transport)
        one_round(run)
        run_local_steps(run, 1)
        if transport.sites[0] == 3:
            return None
        snapshot = Snapshot(run)
        messages = []
        for _ in range(2):  # a dead group is not used again as if nothing had happened
            with pytest.raises(SyncError, match="failed") as caught:
                synchronize(run)
            messages.append(str(caught.value))
        snapshot.assert_unchanged()
        return messages

    *survivors, gone = all_good(over_gloo(4, work))
    assert gone is None
    assert not any(TIMED_OUT in message for messages in survivors for message in messages)


def test_a_silent_peer_raises_at_the_timeout():
    noticed = threading.Event()

    def work(transport):
        if transport.sites[0] == 1:
            return noticed.wait(20)
        with pytest.raises(SyncError, match=f"exchanging messages failed: {TIMED_OUT} site 1"):
            gather(transport, lambda _: b"hello")
        noticed.set()
        return True

    assert all_good(over_gloo(2, work, timeout_s=1.0)) == [True, True]


def test_a_member_that_never_comes_raises_at_the_timeout():
    with pytest.raises(
        SyncError, match="joining the other sites failed: site 1 did not join within 1 s"
    ):
        GlooTransport(dist.HashStore(), [0, 1], 0, timeout_s=1.0)


KILLED = """
    import os, signal, sys
    import torch.distributed as dist
    from fomoe.errors import SyncError
    from fomoe.sync.exchange import gather
    from fomoe.sync.gloo import GlooTransport

    site = int(sys.argv[2])
    transport = GlooTransport(dist.FileStore(sys.argv[1], 2), range(2), site, timeout_s=60)
    gather(transport, lambda _: b"ready")
    if site == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        gather(transport, lambda _: b"again")
    except SyncError as error:
        print(error)
"""


def test_a_killed_process_raises_at_the_survivor(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "store")]
    sites = [
        subprocess.Popen([*command, str(site)], stdout=subprocess.PIPE, text=True)
        for site in range(2)
    ]
    survivor, killed = (site.communicate(timeout=120)[0].strip() for site in sites)
    assert killed == ""
    assert survivor.startswith("exchanging messages failed: lost site 1")
    assert TIMED_OUT not in survivor


def test_all_members_raise_if_one_has_a_problem():
    def work(transport):
        check_sites(transport, lambda _: "")
        with pytest.raises(SyncError, match="site 1: the disk is full"):
            check_sites(transport, lambda site: "the disk is full" if site == 1 else "")
        with pytest.raises(FomoeError, match="no tokenizer"):
            share(transport, fail)

    def fail() -> bytes:
        raise SyncError("no tokenizer")

    all_good(over_gloo(3, work))
    work(InMemoryTransport(range(3)))


# ----------------------------------------------------------------------------------------- replicas


@pytest.mark.parametrize("name", ["final_norm.weight", "expert"])
def test_one_bit_in_one_replica_is_found_by_all_sites(name):
    """Also by sites that do not hold the segment: no site may go on alone."""
    config = tiny_config()

    def work(transport):
        run = make_run(config, transport)
        one_round(run)
        run.sync.check_replicas()
        if 2 in run.sites:
            wanted = next(n for n in run.sites[2].parameters if name in n)
            bits = run.sites[2].parameters[wanted].data.view(torch.int32)
            bits.view(-1)[-1] ^= 1
        with pytest.raises(SyncError, match="replicas differ"):
            run.sync.check_replicas()

    all_good(over_gloo(4, work))
    work(InMemoryTransport(range(4)))


def test_a_site_with_other_initial_weights_is_found_at_the_first_sync():
    config = tiny_config()

    def work(transport):
        run = make_run(config, transport)
        if transport.sites[0] == 1:
            run.sites[1].parameters["final_norm.weight"].data[0] += 1e-6
            run.sync = make_sync(run.plan, run.sites, transport)
        with pytest.raises(SyncError, match="replicas differ"):
            one_round(run)

    all_good(over_gloo(4, work))


def test_hashes_are_of_the_parameters_themselves():
    """Not of the anchors: a publish that did not reach the model must show."""
    run = make_run(tiny_config())
    one_round(run)
    before = run.sync.check_replicas()
    for own in run.sites.values():
        own.parameters["final_norm.weight"].data[3] += 1
    after = run.sync.check_replicas()
    changed = [index for index in before if before[index] != after[index]]
    (bucket,) = (b for b in run.plan.segment_plan.buckets if b.index in changed)
    assert "final_norm.weight" in {s.parameter for s in bucket.segments}


def test_means_are_given_only_for_buckets_held_here():
    config = tiny_config(placement__replication_factor=1)
    plan = plan_run(config).segment_plan

    def work(transport):
        def contribute(bucket, site):
            weights = [1.0] * len(bucket.segments)
            return Contribution(bucket, weights, lambda s, i, j: torch.full((j - i,), 1.0))

        return set(mean_over_holders(transport, plan.buckets, contribute))

    for site, found in enumerate(all_good(over_gloo(4, work))):
        assert found == {b.index for b in plan.buckets if site in b.holders}


@pytest.mark.parametrize("layout", ["spes", "cyclic"])
def test_balance_bias_stays_equal_at_all_sites_over_gloo(layout):
    """Its counts are of all sites, so every site moves it the same way."""
    config = tiny_config(LAYOUTS[layout], router__balance="both")

    def work(transport):
        run = make_run(config, transport)
        for round_idx in range(3):
            one_round(run, round_idx)
        (own,) = run.sites.values()
        return {layer: own.model.moe(layer).router.balance_bias_E for layer in (0, 1)}

    results = all_good(over_gloo(4, work))
    assert results[0][0].abs().sum() > 0
    for other in results[1:]:
        assert_same_bits(results[0], other)
