"""Placements worth trying: equal replication, and as many experts as each site's memory holds."""

from __future__ import annotations

from dataclasses import replace

from fomoe.errors import ConfigError
from fomoe.placement import Placement, by_capacity, capacity_slots
from fomoe_sim.memory import SiteMemory, site_memories
from fomoe_sim.scenario import Scenario
from fomoe_sim.traffic import cyclic_holdings, table_holdings


def placements(base: Scenario, replication: int | None) -> list[Scenario]:
    """The scenario under every replication factor, evenly and by memory capacity.

    Args:
        base: any placement of the method and sites.
        replication: keep to this r; None: all, and capacity filled without a fixed r.
    """
    num_sites = base.cluster.num_sites
    wanted: list[int] = [replication] if replication else list(range(1, num_sites + 1))
    found = []
    for r in wanted:
        if base.cluster.capacities is None:
            even = cyclic_holdings(base.shape, num_sites, r)
            found.append(replace(base, holdings=even, replication_factor=float(r)))
    capacity = base.cluster.capacities or memory_capacity(base)
    for target in [*wanted, *([] if replication else [None])]:
        slots = _slots(base, capacity, target)
        if slots is None:
            continue
        table = by_capacity(base.shape.num_moe_layers, base.shape.num_experts, slots)
        placement = Placement(
            num_sites=num_sites,
            moe_layers=base.shape.moe_layers,
            holders=table,
            trainers=table,
        )
        holdings = table_holdings(base.shape, placement)
        found.append(
            replace(base, holdings=holdings, replication_factor=placement.replication_factor)
        )
    if not found:
        rule = f"has capacity for too few of the {base.shape.num_experts} experts"
        raise ConfigError("--cluster", base.cluster.name, rule)
    return found


def _slots(
    base: Scenario, capacity: tuple[int, ...], replication: int | None
) -> tuple[int, ...] | None:
    """Experts per layer and site; None if the capacities leave an expert without a holder."""
    experts = base.shape.num_experts
    room = sum(min(limit, experts) for limit in capacity)
    if room < experts * (replication or 1):
        return None
    slots = capacity_slots(capacity, experts, replication)
    return None if replication and len(set(slots)) == 1 else slots  # even: cyclic has it


def memory_capacity(base: Scenario) -> tuple[int, ...]:
    """Experts per layer that each site's memory holds, [K].

    Memory grows by a constant per expert (its states, anchor, buffers), so two placements give the
    line; the share of memory that routing adds is small and is checked on the candidate itself.
    """
    num_sites, experts = base.cluster.num_sites, base.shape.num_experts
    ends = []
    for r in (1, num_sites):
        holdings = cyclic_holdings(base.shape, num_sites, r)
        scenario = replace(base, method="fomoe", holdings=holdings)
        ends.append((holdings.residents.mean(axis=0), site_memories(scenario)))
    (few, low), (many, high) = ends
    found = []
    for site in range(num_sites):
        limits = [experts]
        for name in ("per_accelerator", "host"):
            a, b = (_amount(memories[site], name) for memories in (low, high))
            per_expert = (b - a) / max(many[site] - few[site], 1e-9)
            room = _room(low[site], name) - a
            if per_expert > 0:
                limits.append(int(few[site] + room / per_expert))
        found.append(max(0, min(limits)))
    return tuple(found)


def _amount(memory: SiteMemory, name: str) -> float:
    return memory.per_accelerator if name == "per_accelerator" else memory.total("host")


def _room(memory: SiteMemory, name: str) -> float:
    accelerator = name == "per_accelerator"
    return memory.capacity_bytes if accelerator else memory.host_capacity_bytes
