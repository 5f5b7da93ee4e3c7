"""Segments, shapes and memory: arithmetic from the config against counting and built objects."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from conftest import LAYOUTS, all_good, make_run, make_site, one_round, over_gloo, tiny_config
from torch import Tensor

from fomoe.codecs import CODECS
from fomoe.kinds import cyclic
from fomoe.memory import SiteMemory, site_memory
from fomoe.model.transformer import Transformer
from fomoe.placement import Placement
from fomoe.planning import plan_run, planned_summary
from fomoe.segments import (
    Piece,
    build_plan,
    chunk_bounds,
    full_payload,
    holder_bytes,
    placement_rule,
    sync_traffic,
    takes_outer_step,
)
from fomoe.shapes import ParameterSpec, parameter_specs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_stands_in_exactly_one_segment(layout):
    config = tiny_config(LAYOUTS[layout])
    plan = plan_run(config).segment_plan
    painted = {
        spec.name: torch.zeros(spec.shape, dtype=torch.int) for spec in parameter_specs(config)
    }
    for bucket in plan.buckets:
        for segment in bucket.segments:
            rows = painted[segment.parameter][segment.start : segment.stop]
            assert rows.view(segment.shape).shape == (rows[0] if segment.is_expert else rows).shape
            assert rows.numel() == segment.numel
            rows += 1
    for name, counts in painted.items():
        assert (counts == 1).all(), name
    assert plan.numel == sum(counts.numel() for counts in painted.values())
    names = [segment.name for bucket in plan.buckets for segment in bucket.segments]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_held_by_the_placement_and_the_rest_by_all(layout):
    config = tiny_config(LAYOUTS[layout])
    run = plan_run(config)
    everyone = tuple(range(config.num_sites))
    row_of = {layer: row for row, layer in enumerate(run.placement.moe_layers)}
    for bucket in run.segment_plan.buckets:
        for segment in bucket.segments:
            assert (segment.holders, segment.trainers) == (bucket.holders, bucket.trainers)
            assert segment.is_expert == bucket.is_expert == (".experts." in segment.parameter)
            if segment.is_expert:
                row = row_of[segment.layer]
                prefix = f"layers.{segment.layer}.moe.experts."
                assert segment.parameter in (f"{prefix}gate_up", f"{prefix}down")
                part = segment.parameter.removeprefix(prefix)
                assert segment.name == f"{prefix}{segment.expert}.{part}"
                assert (segment.start, segment.stop) == (segment.expert, segment.expert + 1)
                assert segment.holders == run.placement.holders[row][segment.expert]
                assert segment.trainers == run.placement.trainers[row][segment.expert]
                continue
            if config.placement.kind == "copies" and "router" in segment.parameter:
                row = row_of[segment.layer]
                own = range(segment.start, segment.stop)  # the rows of one set
                assert {run.placement.holders[row][e] for e in own} == {segment.holders}
                assert len(own) * run.placement.num_sets == config.model.num_experts
                continue
            assert segment.holders == everyone
            rows = config.sync.router_rows == "holders" and "router" in segment.parameter
            if rows:
                assert (segment.start, segment.stop) == (segment.expert, segment.expert + 1)
                row = row_of[segment.layer]
                assert segment.trainers == run.placement.trainers[row][segment.expert]
            else:
                assert segment.trainers == everyone


def test_cyclic_placement_gives_at_most_one_bucket_per_site_and_one_shared():
    for seed in range(60):
        rng = random.Random(seed)
        num_sites, num_experts = rng.randint(1, 6), rng.randint(1, 13)
        r, layers = rng.randint(1, num_sites), tuple(range(rng.randint(1, 4)))
        table = cyclic(len(layers), num_experts, num_sites, r)
        placement = Placement(num_sites=num_sites, moe_layers=layers, holders=table, trainers=table)
        specs = [ParameterSpec("embedding.weight", (7, 3), "embedding")]
        for layer in layers:
            specs.append(ParameterSpec(f"router.{layer}", (num_experts, 3), "router", layer))
            specs.append(
                ParameterSpec(f"layers.{layer}.down", (num_experts, 3, 2), "expert", layer)
            )
        plan = build_plan(specs, num_sites, placement_rule(placement))
        assert len(plan.buckets) <= num_sites + 1
        rows = build_plan(specs, num_sites, placement_rule(placement, router_rows="holders"))
        assert len({bucket.holders for bucket in rows.buckets}) <= num_sites + 1


def test_bucket_order_is_the_same_at_every_site():
    """Peers meet because the plan does not depend on who makes it, nor on the specs' order."""
    config = tiny_config()
    placement = plan_run(config).placement
    rule = placement_rule(placement)
    plan = build_plan(parameter_specs(config), 4, rule)
    shuffled = build_plan(reversed(parameter_specs(config)), 4, rule)
    order = [(b.index, b.is_expert, b.holders, b.trainers) for b in plan.buckets]
    assert order == [(b.index, b.is_expert, b.holders, b.trainers) for b in shuffled.buckets]
    assert [index for index, *_ in order] == list(range(len(plan.buckets)))


# ------------------------------------------------------------------------------------------ bytes


def messages_sent(numel: int, num_holders: int) -> list[int]:
    """Elements sent by each holder, by writing down every message of the exchange."""
    owner = [-1] * numel
    bounds = chunk_bounds(numel, num_holders)
    for part in range(num_holders):
        for element in range(bounds[part], bounds[part + 1]):
            owner[element] = part
    assert -1 not in owner
    sent = [0] * num_holders
    for element in range(numel):
        for holder in range(num_holders):
            if holder != owner[element]:
                sent[holder] += 1  # its value goes to the owner of the chunk
                sent[owner[element]] += 1  # the sum comes back
    return sent


@pytest.mark.parametrize("num_holders", [1, 2, 3, 4, 7])
def test_wire_elements_count_every_message_and_sum_to_the_ring_formula(num_holders):
    for numel in [0, 1, 2, 3, 5, 6, 7, 8, 100, 101]:
        counted = [holder_bytes(numel, num_holders, p) for p in range(num_holders)]
        assert all(payload == 4 * numel for payload, _ in counted)
        planned = [wire // 4 for _, wire in counted]
        assert planned == messages_sent(numel, num_holders)
        assert sum(planned) == 2 * (num_holders - 1) * numel
        ring = Fraction(2 * (num_holders - 1) * numel, num_holders)
        assert all(abs(elements - ring) <= num_holders for elements in planned)


@pytest.mark.parametrize(("codec", "element_bytes"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_payload_is_shared_plus_the_replicated_share_of_the_experts(r, codec, element_bytes):
    """b (N_s + N_e r / K); with one holder, only the shared part."""
    config = tiny_config(placement__replication_factor=r)
    specs = parameter_specs(config)
    experts = sum(spec.numel for spec in specs if spec.kind == "expert")
    shared = sum(spec.numel for spec in specs) - experts
    plan = plan_run(config).segment_plan
    for site in range(4):
        traffic = sync_traffic(plan, site, codec=CODECS[codec])
        assert traffic.payload_shared == element_bytes * shared
        assert traffic.payload_expert == (element_bytes * experts * r // 4 if r > 1 else 0)
        assert traffic.payload == traffic.payload_shared + traffic.payload_expert
    wire = sum(sync_traffic(plan, s, codec=CODECS[codec]).wire for s in range(4))
    held = 0 if r == 1 else experts
    assert wire == element_bytes * (2 * 3 * shared + 2 * (r - 1) * held)


def test_diloco_pays_for_the_whole_model_and_ddp_at_every_step():
    diloco = planned_summary(plan_run(tiny_config(method="diloco")))
    ddp = planned_summary(plan_run(tiny_config(method="ddp", local_steps=5)))
    assert diloco["payload_bytes_per_site_per_round"] == 4 * diloco["params_total"]
    assert diloco["ratio_vs_diloco"] == 1.0
    assert ddp["payload_bytes_per_site_per_round"] == 5 * 4 * ddp["params_total"]
    assert (ddp["ratio_vs_ddp"], ddp["ratio_vs_diloco"]) == (1.0, 0.2)


def test_a_site_alone_sends_nothing_and_has_no_ratio():
    single = planned_summary(plan_run(tiny_config(method="single")))
    assert single["payload_bytes_per_site_per_round"] == 0
    assert single["ratio_vs_ddp"] is single["ratio_vs_diloco"] is None
    assert full_payload(1000, 1) == 0


# ------------------------------------------------------------------------- arithmetic versus built


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_the_config_are_those_of_the_built_model(layout):
    config = tiny_config(LAYOUTS[layout])
    everything = {
        layer: tuple(range(config.model.num_experts)) for layer in config.model.moe_layers
    }
    model = Transformer(config, everything)
    built = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert sorted(built) == sorted((spec.name, spec.shape) for spec in parameter_specs(config))
    assert len(list(model.parameters())) == len(built), "a parameter has two names"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_site_builds_what_the_plan_says_it_holds_and_no_more(layout):
    config = tiny_config(LAYOUTS[layout])
    run = plan_run(config)
    for site in range(config.num_sites):
        model = make_site(config, site).model
        held = {
            s.parameter for b in run.segment_plan.buckets if site in b.holders for s in b.segments
        }
        assert {n.replace("frozen_", "") for n, _ in model.named_parameters()} == held
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        stored = [b for b in run.segment_plan.buckets if site in b.holders and b.is_expert]
        assert frozen == sum(b.numel for b in stored if site not in b.trainers)
        assert sum(p.numel() for p in model.parameters()) == run.segment_plan.numel_at(site)
        # No absent expert may hide in a storage.
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        sizes = [storage.nbytes() for storage in storages.values()]
        assert sum(sizes) == sum(p.nbytes for p in model.parameters())


def test_shared_and_expert_elements_of_a_site_add_up():
    plan = plan_run(tiny_config()).segment_plan
    for site in range(4):
        parts = [plan.numel_at(site, is_expert=kind) for kind in (False, True)]
        assert sum(parts) == plan.numel_at(site)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def counted_memory(run, site: int) -> SiteMemory:
    """Bytes of the objects that a site's process keeps after a round."""
    own = run.sites[site]
    outer = run.sync.anchors.optimizer
    return SiteMemory(
        parameters=nbytes(own.model.parameters()),
        gradients=nbytes(p.grad for p in own.model.parameters()),
        inner_optimizer=nbytes(v for s in own.optimizer.state.values() for v in s.values()),
        anchor=nbytes(p for group in outer.param_groups for p in group["params"])
        if run.sync.anchors.values
        else 0,
        outer_optimizer=nbytes(v for s in outer.state.values() for v in s.values()),
        residuals=nbytes(run.sync.lanes.state_of(site).values()),
    )


MEMORY_CASES = {
    **LAYOUTS,
    "inner sgd": {"inner.optimizer": "sgd"},
    "inner sgd with momentum": {"inner.optimizer": "sgd", "inner.momentum": 0.9},
    "plain outer": {"outer.momentum": 0.0, "outer.nesterov": False},
    **{
        f"outer {name}": {"outer.optimizer": name, "outer.lr": 0.01, "outer.options": options}
        for name, options in {
            "Adam": {},
            "AdamW": {"amsgrad": True},
            "NAdam": {},
            "Adagrad": {},
            "RMSprop": {"momentum": 0.9, "centered": True},
            "ASGD": {},
            "Rprop": {},
            "Adadelta": {},
        }.items()
    },
    "photon": {"method": "photon"},
    "int8": {"sync.codec": "int8"},
    "int4, frozen copies": {"sync.codec": "int4", "method": "spes"},
    "bf16, copies": {**LAYOUTS["copies, apart"], "sync.codec": "bf16"},
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_planned_memory_is_the_bytes_of_the_built_objects(case):
    """Per site, after a real round over gloo; gradients are those that the last step left."""
    config = tiny_config(MEMORY_CASES[case])
    planned = plan_run(config).memory

    def work(transport) -> SiteMemory:
        run = make_run(config, transport)
        one_round(run)
        return counted_memory(run, transport.sites[0])

    counted = all_good(over_gloo(config.num_sites, work))
    assert counted == list(planned)


@pytest.mark.parametrize("layout", ["cyclic", "one holder", "common", "capacity"])
def test_absent_experts_have_no_bytes_anywhere(layout):
    """Not in the model, its buffers, gradients, inner state, anchors, outer state or checkpoint."""
    config = tiny_config(LAYOUTS[layout])
    placement = plan_run(config).placement

    def work(transport) -> set[tuple[int, int]]:
        (site,) = transport.sites
        run = make_run(config, transport)
        one_round(run)
        own = run.sites[site]
        saved = own.state()[0] | run.sync.state_of(site)
        built = own.model.state_dict() | dict(own.model.named_buffers())
        largest = max(config.model.num_experts, config.vocab_size) * config.model.d_model
        found = set()
        for name, tensor in {**saved, **built, **run.sync.anchors.values}.items():
            if name.endswith((".experts.gate_up", ".experts.down")):
                ids = own.model.get_submodule(name.rpartition(".")[0]).ids
                assert len(tensor) == len(ids)
                continue
            if ".experts." in name and name not in built:
                layer, _, _, expert = name.split("layers.")[1].split(".")[:4]
                found.add((int(layer), int(expert)))
            assert tensor.numel() <= largest, f"{name} could hide several experts"
        return found

    for site, found in enumerate(all_good(over_gloo(config.num_sites, work))):
        residents = placement.residents(site)
        assert found == {(layer, e) for layer, held in residents.items() for e in held}


# ------------------------------------------------------------------------------------------ rules


def test_frozen_rows_have_no_gradient_anchor_or_traffic():
    """A rule without trainers: one half of a matrix is trained, the other one stored only."""
    config = tiny_config()
    everyone = tuple(range(4))

    def rule(spec: ParameterSpec) -> list[Piece]:
        half = spec.shape[0] // 2
        return [Piece(0, half, everyone, everyone), Piece(half, spec.shape[0], everyone, ())]

    plan = build_plan([ParameterSpec("ffn", (6, 5), "ffn")], 4, rule)
    trained, frozen = sorted(plan.buckets, key=lambda bucket: not bucket.trainers)
    assert [s.name for b in (trained, frozen) for s in b.segments] == ["ffn[0:3]", "ffn[3:6]"]
    assert plan.numel == 30
    assert takes_outer_step(config, trained)
    assert not takes_outer_step(config, frozen)
    memory = site_memory(config, plan, 0)
    assert memory.parameters == 4 * 30
    assert memory.gradients == memory.anchor == 4 * 15
    assert sync_traffic(plan, 0).payload == 4 * 15


@pytest.mark.parametrize("pieces", [[(0, 2)], [(0, 2), (3, 6)], [(0, 4), (2, 6)], []])
def test_a_rule_that_leaves_rows_out_or_takes_them_twice_is_refused(pieces):
    def rule(spec: ParameterSpec) -> list[Piece]:
        return [Piece(start, stop, (0,), (0,)) for start, stop in pieces]

    with pytest.raises(AssertionError, match="the pieces of ffn"):
        build_plan([ParameterSpec("ffn", (6, 5), "ffn")], 1, rule)
