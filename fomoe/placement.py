"""Expert placement: which sites hold, and which sites train, every expert (no torch).

Who holds what is a table, built once from the config and checked complete; nothing else in the
system decides it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fomoe.config import Config
from fomoe.errors import ConfigError

Sites = tuple[int, ...]
Table = tuple[tuple[Sites, ...], ...]  # per MoE layer, per expert: sites in ascending order


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The placement table.

    Attributes:
        num_sites: number of sites, K.
        moe_layers: index in the model of each MoE layer; the tables' first index follows it.
        holders: per MoE layer and expert, the sites that store it.
        trainers: per MoE layer and expert, the sites whose updates count; a subset of the holders.
    """

    num_sites: int
    moe_layers: tuple[int, ...]
    holders: Table
    trainers: Table

    def residents(self, site: int) -> dict[int, tuple[int, ...]]:
        """Expert ids that a site stores, per MoE layer."""
        return _experts_of(self.holders, self.moe_layers, site)

    def trained(self, site: int) -> dict[int, tuple[int, ...]]:
        """Expert ids that a site trains, per MoE layer."""
        return _experts_of(self.trainers, self.moe_layers, site)

    def num_residents(self, site: int) -> int:
        """Fewest experts that a site stores in any MoE layer; 0 without MoE layers."""
        return min((len(experts) for experts in self.residents(site).values()), default=0)

    @property
    def full(self) -> bool:
        """Whether every site stores and trains every expert."""
        everyone = tuple(range(self.num_sites))
        return all(sites == everyone for layer in self.trainers for sites in layer)

    @property
    def replication_factor(self) -> float:
        """Mean number of holders per expert; the number of sites without MoE layers."""
        counts = [len(sites) for layer in self.holders for sites in layer]
        return sum(counts) / len(counts) if counts else float(self.num_sites)


def _experts_of(table: Table, moe_layers: tuple[int, ...], site: int) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(expert for expert, sites in enumerate(row) if site in sites)
        for layer, row in zip(moe_layers, table, strict=True)
    }


def build_placement(config: Config) -> Placement:
    """Build and check the placement of a config.

    Raises:
        ConfigError: if an expert of any layer would have no holder, or the options contradict.
    """
    layers = config.model.moe_layers
    num_sites, num_experts = config.num_sites, config.model.num_experts
    options = config.placement
    _check_options(config)
    if options.kind == "table":
        assert options.table is not None
        table = read_table(
            options.table, num_layers=len(layers), num_experts=num_experts, num_sites=num_sites
        )
    elif options.kind == "common":
        assert options.num_common is not None
        table = common(len(layers), num_experts, num_sites, options.num_common)
    elif options.capacity is not None:
        slots = capacity_slots(options.capacity, num_experts, options.replication_factor)
        table = by_capacity(len(layers), num_experts, slots)
    else:
        assert options.replication_factor is not None
        table = cyclic(len(layers), num_experts, num_sites, options.replication_factor)
    everyone = tuple(range(num_sites))
    holders = table if options.store == "holders" else ((everyone,) * num_experts,) * len(layers)
    return Placement(num_sites=num_sites, moe_layers=layers, holders=holders, trainers=table)


def cyclic(num_layers: int, num_experts: int, num_sites: int, replication_factor: int) -> Table:
    """Expert e of layer l on r consecutive sites from e + l on, so that no site is favoured."""
    return tuple(
        tuple(
            tuple(sorted((expert + layer + i) % num_sites for i in range(replication_factor)))
            for expert in range(num_experts)
        )
        for layer in range(num_layers)
    )


def common(num_layers: int, num_experts: int, num_sites: int, num_common: int) -> Table:
    """The first experts on all sites, every other one on a single site."""
    everyone = tuple(range(num_sites))
    return tuple(
        tuple(
            everyone if expert < num_common else ((expert - num_common + layer) % num_sites,)
            for expert in range(num_experts)
        )
        for layer in range(num_layers)
    )


def capacity_slots(
    capacity: tuple[int, ...], num_experts: int, replication_factor: int | None
) -> tuple[int, ...]:
    """Experts per layer that each site will hold: all it can, or fewer where r asks for fewer.

    With r given, sites fill evenly up to their capacity until r x E slots are used.
    """
    slots = tuple(min(limit, num_experts) for limit in capacity)
    if replication_factor is None:
        return slots
    filled = [0] * len(slots)
    for _ in range(replication_factor * num_experts):
        open_sites = [site for site, limit in enumerate(slots) if filled[site] < limit]
        filled[min(open_sites, key=lambda site: (filled[site], site))] += 1
    return tuple(filled)


def by_capacity(num_layers: int, num_experts: int, slots: tuple[int, ...]) -> Table:
    """Each site takes the experts with the fewest holders so far; counts differ by at most one."""
    table = []
    for layer in range(num_layers):
        holders: list[list[int]] = [[] for _ in range(num_experts)]
        start = layer
        for site, count in enumerate(slots):
            order = sorted(
                range(num_experts), key=lambda e: (len(holders[e]), (e - start) % num_experts)
            )
            for expert in order[:count]:
                holders[expert].append(site)
            start += count
        table.append(tuple(tuple(sites) for sites in holders))
    return tuple(table)


def read_table(
    table: tuple[Any, ...], *, num_layers: int, num_experts: int, num_sites: int
) -> Table:
    """Check an explicit table: sites per expert, once for all MoE layers or once per layer."""
    field = "placement.table"
    per_layer = bool(table) and all(
        isinstance(row, list | tuple) and row and all(isinstance(x, list | tuple) for x in row)
        for row in table
    )
    rows = list(table) if per_layer else [table] * num_layers
    if len(rows) != num_layers:
        raise ConfigError(field, f"with {len(rows)} layers", f"must have {num_layers} MoE layers")
    checked = []
    for layer, row in enumerate(rows):
        if len(row) != num_experts:
            rule = f"must list {num_experts} experts"
            raise ConfigError(field, f"with {len(row)} experts in MoE layer {layer}", rule)
        checked.append(
            tuple(_read_sites(sites, layer, e, num_sites) for e, sites in enumerate(row))
        )
    return tuple(checked)


def _read_sites(sites: Any, layer: int, expert: int, num_sites: int) -> Sites:
    where = f"placement.table, MoE layer {layer}, expert {expert}:"
    if not isinstance(sites, list | tuple):
        raise ConfigError(where, sites, "must be a list of sites")
    if not sites:
        raise ConfigError(where, [], "leaves the expert without a holder")
    for site in sites:
        if type(site) is not int or not 0 <= site < num_sites:
            raise ConfigError(where, site, f"is not a site from 0 to {num_sites - 1}")
    site, times = Counter(sites).most_common(1)[0]
    if times > 1:
        raise ConfigError(where, list(sites), f"names site {site} twice")
    return tuple(sorted(sites))


def _check_options(config: Config) -> None:
    """Each kind has its own options; one that would do nothing is refused."""
    options, num_sites, num_experts = config.placement, config.num_sites, config.model.num_experts
    r = options.replication_factor
    if r is not None and r > num_sites:
        rule = f"exceeds the {num_sites} sites (num_sites)"
        raise ConfigError("placement.replication_factor", r, rule)
    if options.kind == "cyclic":
        if r is None and options.capacity is None:
            rule = "must be set for cyclic placement, or placement.capacity"
            raise ConfigError("placement.replication_factor", "null", rule)
        if options.capacity is not None:
            _check_capacity(options.capacity, num_sites, num_experts, r)
    elif r is not None:
        rule = f"has no meaning for {options.kind} placement; set it to null"
        raise ConfigError("placement.replication_factor", r, rule)
    owners = {"capacity": "cyclic", "num_common": "common", "table": "table"}
    for name, kind in owners.items():
        value = getattr(options, name)
        if value is not None and options.kind != kind:
            rule = f"is an option of {kind} placement, not of {options.kind}"
            raise ConfigError(f"placement.{name}", value, rule)
        if value is None and options.kind == kind and kind != "cyclic":
            raise ConfigError(f"placement.{name}", "null", f"must be set for {kind} placement")
    if options.num_common is not None and options.num_common > num_experts:
        rule = f"exceeds the {num_experts} experts (model.num_experts)"
        raise ConfigError("placement.num_common", options.num_common, rule)


def _check_capacity(
    capacity: tuple[int, ...], num_sites: int, num_experts: int, replication_factor: int | None
) -> None:
    field, value = "placement.capacity", list(capacity)
    if len(capacity) != num_sites:
        raise ConfigError(field, value, f"must give one number for each of the {num_sites} sites")
    if min(capacity) < 0:
        raise ConfigError(field, value, "must not be negative")
    slots = sum(min(limit, num_experts) for limit in capacity)
    if slots < num_experts:
        rule = f"has {slots} slots and leaves an expert of {num_experts} without a holder"
        raise ConfigError(field, value, rule)
    if replication_factor is not None and slots < replication_factor * num_experts:
        rule = (
            f"has {slots} slots; {num_experts} experts with placement.replication_factor "
            f"{replication_factor} need {replication_factor * num_experts} (null fills all slots)"
        )
        raise ConfigError(field, value, rule)
