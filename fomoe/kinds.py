"""The kinds of placement: each is a class with its options and a function that makes its table.

A new kind is one more class here, named in `PlacementConfig` (no torch).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from fomoe.errors import ConfigError
from fomoe.options import (
    AnyTuple,
    Fraction,
    IntTuple,
    KindOptions,
    NonNegative,
    Positive,
    default_kind,
)

Sites = tuple[int, ...]
Table = tuple[tuple[Sites, ...], ...]  # per MoE layer, per expert: sites in ascending order


class PlacementKind(KindOptions):
    """Which site holds which expert: what every kind has."""

    store: Literal["holders", "all"] = "holders"
    """holders: a site stores the experts that it trains. all: every site stores every expert,
    and the placement says only who trains it (SPES)."""

    @abstractmethod
    def assign(self, num_layers: int, num_experts: int, num_sites: int) -> Table:
        """The sites of every expert, for `num_layers` MoE layers.

        Raises:
            ConfigError: if the options do not fit these numbers, or leave an expert without a site.
        """

    def most_sites(self, num_sites: int) -> int:
        """An upper bound on the sites of one expert, known before any table is made."""
        return num_sites

    def num_sets(self, num_sites: int) -> int:
        """Sets of experts that are copies of one another, of which a site holds one; 1: none."""
        return 1


class CyclicPlacement(PlacementKind):
    """Every expert on r consecutive sites, or as many on every site as it can hold."""

    kind: Literal["cyclic"] = "cyclic"
    replication_factor: Positive | None = None
    """[sites] Holders per expert, r; null: as `capacity` allows."""
    capacity: IntTuple | None = None
    """[experts per layer] Most experts that each site can hold; null: no limit."""

    def assign(self, num_layers: int, num_experts: int, num_sites: int) -> Table:
        field, r = "placement.replication_factor", self.replication_factor
        if r is not None and r > num_sites:
            raise ConfigError(field, r, f"exceeds the {num_sites} sites (num_sites)")
        if self.capacity is not None:
            _check_capacity(self.capacity, num_sites, num_experts, r)
            slots = capacity_slots(self.capacity, num_experts, r)
            return by_capacity(num_layers, num_experts, slots)
        if r is None:
            rule = "must be set for cyclic placement, or placement.capacity"
            raise ConfigError(field, "null", rule)
        return cyclic(num_layers, num_experts, num_sites, r)

    def most_sites(self, num_sites: int) -> int:
        return min(self.replication_factor or num_sites, num_sites)


class CommonPlacement(PlacementKind):
    """Some experts on every site, the others on one site each."""

    kind: Literal["common"] = "common"
    num_common: NonNegative | None = None
    """[experts] Experts that every site holds."""

    def assign(self, num_layers: int, num_experts: int, num_sites: int) -> Table:
        field, num_common = "placement.num_common", self.num_common
        if num_common is None:
            raise ConfigError(field, "null", "must be set for common placement")
        if num_common > num_experts:
            rule = f"exceeds the {num_experts} experts (model.num_experts)"
            raise ConfigError(field, num_common, rule)
        return common(num_layers, num_experts, num_sites, num_common)


class TablePlacement(PlacementKind):
    """The sites of every expert as the user lists them."""

    kind: Literal["table"] = "table"
    table: AnyTuple | None = None
    """Sites per expert, for all layers or per MoE layer."""

    def assign(self, num_layers: int, num_experts: int, num_sites: int) -> Table:
        if self.table is None:
            raise ConfigError("placement.table", "null", "must be set for table placement")
        return read_table(
            self.table, num_layers=num_layers, num_experts=num_experts, num_sites=num_sites
        )


class CopiesPlacement(PlacementKind):
    """Every site holds one set of experts; the sets are copies that start equal and part later."""

    kind: Literal["copies"] = "copies"
    replication_factor: Positive = 1
    """[sites] That hold the same set, r."""
    grow_at: Fraction = 0.5
    """Share of the schedule's steps after which the copies part."""
    couple: Fraction = 0.5
    """Weight of the mean over all copies in a copy's update, once they part."""

    def num_sets(self, num_sites: int) -> int:
        return max(1, num_sites // self.replication_factor)

    def assign(self, num_layers: int, num_experts: int, num_sites: int) -> Table:
        r, sets = self.replication_factor, self.num_sets(num_sites)
        if num_sites % r:
            rule = f"does not divide the {num_sites} sites (num_sites) into sets of copies"
            raise ConfigError("placement.replication_factor", r, rule)
        if num_experts % sets:
            rule = (
                f"must be a multiple of the {sets} sets of copies (num_sites / replication_factor)"
            )
            raise ConfigError("model.num_experts", num_experts, rule)
        size = num_experts // sets
        holders = [tuple(range(i * r, (i + 1) * r)) for i in range(sets)]
        return (tuple(holders[expert // size] for expert in range(num_experts)),) * num_layers

    def most_sites(self, num_sites: int) -> int:
        return min(self.replication_factor, num_sites)


PlacementConfig = Annotated[
    CyclicPlacement | CommonPlacement | TablePlacement | CopiesPlacement,
    Field(discriminator="kind"),
    default_kind("cyclic"),
]


def cyclic(num_layers: int, num_experts: int, num_sites: int, replication_factor: int) -> Table:
    """Expert e of layer l on r consecutive sites from e + l on, so that no site is favoured."""
    return tuple(
        tuple(
            tuple(sorted((expert + layer + i) % num_sites for i in range(replication_factor)))
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
