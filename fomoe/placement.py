"""Expert placement: which sites hold, and which sites train, every expert (no torch).

Who holds what is a table, built once from the config and checked complete; nothing else in the
system decides it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.config import Config
from fomoe.kinds import Table


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The placement table.

    Attributes:
        num_sites: number of sites, K.
        moe_layers: index in the model of each MoE layer; the tables' first index follows it.
        holders: per MoE layer and expert, the sites that store it.
        trainers: per MoE layer and expert, the sites whose updates count; a subset of the holders.
        num_sets: sets of experts that are copies of one another; 1: no expert has a copy.
    """

    num_sites: int
    moe_layers: tuple[int, ...]
    holders: Table
    trainers: Table
    num_sets: int = 1

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
    trainers = config.placement.assign(len(layers), num_experts, num_sites)
    everyone = tuple(range(num_sites))
    stored_by_all = config.placement.store == "all"
    holders = ((everyone,) * num_experts,) * len(layers) if stored_by_all else trainers
    return Placement(
        num_sites=num_sites,
        moe_layers=layers,
        holders=holders,
        trainers=trainers,
        num_sets=config.placement.num_sets(num_sites),
    )
