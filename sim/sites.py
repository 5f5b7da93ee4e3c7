"""From flags to sites: the cluster of a question, and who holds which experts on it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.placement import Placement, build_placement, by_capacity, capacity_slots
from fomoe_sim.cluster import Cluster, load_cluster, uniform_cluster
from fomoe_sim.flags import PLACED
from fomoe_sim.hardware import read_up_down
from fomoe_sim.ranges import MOST_SITES
from fomoe_sim.shape import ModelShape
from fomoe_sim.traffic import Holdings, cyclic_holdings, table_holdings

DEFAULT_SITES = 4
DEFAULT_REPLICATION = 2
DEFAULT_BANDWIDTH = "1Gbit"
BIG_MODEL = 10**9  # from here on a preset's site is 64 accelerators unless said


def stamp(path: str) -> int:
    """When a file last changed, so that a cache never answers from an old one."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0  # the loader says what is wrong with it


def question_cluster(
    args: argparse.Namespace,
    shape: ModelShape,
    *,
    sites: int | None,
    bandwidth: float | None,
) -> Cluster:
    """The cluster file or equal sites, with the flags on top.

    Args:
        sites: that the flags, a sweep or a config ask for; None: the file's, or our default.
        bandwidth: of every site's link instead of what the flags say.
    """
    rates = (bandwidth, bandwidth) if bandwidth else None
    if rates is None and args.bandwidth:
        rates = read_up_down(args.bandwidth, "--bandwidth")
    if args.cluster:
        cluster = _from_file(args, sites)
        cluster = cluster.with_bandwidth(*rates) if rates else cluster
    else:
        if sites is not None and sites > MOST_SITES:
            raise ConfigError("num_sites", sites, f"must be at most {MOST_SITES}")
        up, down = rates or read_up_down(DEFAULT_BANDWIDTH, "--bandwidth")
        # The trainer runs a site on one accelerator, so a config's site has one.
        several = args.model is not None and shape.total >= BIG_MODEL
        cluster = uniform_cluster(
            sites or DEFAULT_SITES,
            accelerator=args.accelerator or "H100",
            count=args.accelerators or (64 if several else 1),
            up_bps=up,
            down_bps=down,
            price=(args.price, args.price) if args.price is not None else None,
        )
    if args.topology:
        cluster = replace(cluster, topology=args.topology)
    return cluster if args.rtt_ms is None else replace(cluster, rtt_s=args.rtt_ms / 1000)


def _from_file(args: argparse.Namespace, sites: int | None) -> Cluster:
    cluster = _load_cluster(args.cluster, stamp(args.cluster))
    if sites is not None and sites != cluster.num_sites:
        rule = f"has {cluster.num_sites} sites, not {sites}"
        raise ConfigError("--cluster", args.cluster, rule)
    if args.config and cluster.capacities:
        rule = "states capacities; with --config they are placement.capacity of the config"
        raise ConfigError("--cluster", args.cluster, rule)
    return cluster


@lru_cache(maxsize=16)
def _load_cluster(path: str, _: int) -> Cluster:
    return load_cluster(path)


def question_holdings(
    shape: ModelShape,
    cluster: Cluster,
    *,
    replication: int | None,
    config: Config | None,
    method: str,
) -> tuple[Holdings, float]:
    """Who holds which experts, and the mean number of holders.

    Args:
        replication: r that the flags or a sweep ask for; a config has its own already.
        config: under the flags, or None for a preset.
        method: as the user named it.
    """
    if config is not None and method in PLACED:
        placement = build_placement(config)
        if method == "spes":
            # Every site stores all experts; what counts is which of them it trains.
            placement = replace(placement, holders=placement.trainers)
        return table_holdings(shape, placement), placement.replication_factor
    check_replication(replication, cluster.num_sites)
    if cluster.capacities is not None and shape.num_experts:
        return _by_capacity(shape, cluster, replication)
    chosen = replication or min(DEFAULT_REPLICATION, cluster.num_sites)
    return cyclic_holdings(shape, cluster.num_sites, chosen), float(chosen)


def check_replication(replication: int | None, num_sites: int) -> None:
    """Refuse more holders per expert than there are sites."""
    if replication is not None and replication > num_sites:
        rule = f"exceeds the {num_sites} sites (--sites or --cluster)"
        raise ConfigError("--replication", replication, rule)


def _by_capacity(
    shape: ModelShape, cluster: Cluster, replication: int | None
) -> tuple[Holdings, float]:
    """Placement by what each site can hold, as the trainer's `placement.capacity` does it."""
    capacity = cluster.capacities
    assert capacity is not None
    room = sum(min(limit, shape.num_experts) for limit in capacity)
    if room < shape.num_experts * (replication or 1):
        need = f"{shape.num_experts} experts with {replication or 1} holders each"
        raise ConfigError("--cluster", cluster.name, f"has capacity for {room} experts, {need}")
    slots = capacity_slots(capacity, shape.num_experts, replication)
    table = by_capacity(shape.num_moe_layers, shape.num_experts, slots)
    placement = Placement(
        num_sites=cluster.num_sites, moe_layers=shape.moe_layers, holders=table, trainers=table
    )
    return table_holdings(shape, placement), placement.replication_factor
