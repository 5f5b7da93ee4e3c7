"""From flags to scenarios: which model, which sites, which method, and every default.

A preset's scenario is built from its shape. A config's scenario is built by the trainer's own
loader with the flags as overrides, so that whatever the trainer would refuse is refused here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fomoe.config import Config, load_config
from fomoe.errors import ConfigError
from fomoe.memory import SiteMemory, site_memory
from fomoe.placement import Placement, build_placement, by_capacity, capacity_slots
from fomoe.segments import build_plan
from fomoe.shapes import parameter_specs
from fomoe_sim.answer import default_tokens
from fomoe_sim.cluster import Cluster, load_cluster, uniform_cluster
from fomoe_sim.flags import PLACED
from fomoe_sim.hardware import read_up_down
from fomoe_sim.presets import model_preset, shape_from_config
from fomoe_sim.scenario import (
    BATCH_TOKENS,
    LAYERS_PER_FRAGMENT,
    MFU_DENSE,
    MFU_MOE,
    STREAMING_BITS,
    STREAMING_OVERLAP,
    Scenario,
    check_method,
)
from fomoe_sim.shape import ModelShape
from fomoe_sim.traffic import Holdings, cyclic_holdings, table_holdings

DEFAULT_SITES = 4
DEFAULT_REPLICATION = 2
DEFAULT_LOCAL_STEPS = 32
DEFAULT_BANDWIDTH = "1Gbit"
BIG_MODEL = 10**9  # from here on a site is 64 accelerators unless said, below it one
UNSEEN_BPS = 1e18
# Config methods that are settings of one of ours.
CONFIG_METHODS = {
    "resident-routing": "fomoe",
    "dense": "diloco",
    "diloco-half": "diloco",
    "single": "diloco",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """The options that a sweep may vary; None: the flags', the config's or our default."""

    method: str
    sites: int | None = None
    replication: int | None = None
    local_steps: int | None = None
    bandwidth: float | None = None
    bits: int | None = None
    fragments: int | None = None
    overlap_steps: int | None = None


def build_scenario(args: argparse.Namespace, point: Point) -> Scenario:
    """The scenario of one point.

    Raises:
        ConfigError: for any option that contradicts another or makes no sense.
    """
    config = _config(args, point) if args.config else None
    if config is not None:
        shape = shape_from_config(config, Path(args.config).stem)
        sites = config.num_sites
    else:
        shape = model_preset(args.model)
        sites = point.sites or args.sites
    cluster = _cluster(args, point, shape, sites)
    method = CONFIG_METHODS.get(point.method, point.method)
    holdings, replication = _holdings(args, point, shape, cluster, config)
    scenario = Scenario(
        shape=shape,
        cluster=cluster,
        method=check_method(method),
        holdings=holdings,
        replication_factor=replication,
        local_steps=_local_steps(args, point, config),
        tokens_per_step=_tokens_per_step(args, cluster, config),
        mfu=_mfu(args, shape),
        tokens=args.tokens or _run_tokens(config, shape),
        seq_len=args.seq_len or (config.data.seq_len if config else shape.seq_len),
        micro_batch=args.micro_batch or (config.inner.batch_size if config else 1),
        states=args.states,
        recompute=args.recompute or ("none" if config else "selective"),
        outer_on=args.outer_on,
        outer_vectors=0 if method in ("photon", "spes") else 1,
        step_time_s=args.step_time,
        trainer_states=_trainer_states(config, method, args.states),
        **_router(config),  # type: ignore[arg-type]
        **_sync(point, method, shape),  # type: ignore[arg-type]
    )
    return _calibrated(args, scenario)


def _stamp(path: str) -> int:
    """When a file last changed, so that a cache never answers from an old one."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0  # the loader says what is wrong with it


def _load(path: str, overrides: tuple[str, ...]) -> Config:
    return _load_at(path, overrides, _stamp(path))


@lru_cache(maxsize=512)
def _load_at(path: str, overrides: tuple[str, ...], _: int) -> Config:
    return load_config(path, overrides)


def _config(args: argparse.Namespace, point: Point) -> Config:
    """The config under the flags: what `fomoe train` would run, or refuse."""
    plain = _load(args.config, ())
    known = {"streaming": "diloco", "fsdp": "ddp", "ep": "ddp"}
    overrides = []
    if point.method != plain.method:
        overrides.append(f"method={known.get(point.method, point.method)}")
    if point.sites or args.sites:
        overrides.append(f"num_sites={point.sites or args.sites}")
    replication = point.replication or args.replication
    if replication and point.method in PLACED:
        overrides.append(f"placement.replication_factor={replication}")
    return _load(args.config, tuple(overrides))


def _cluster(
    args: argparse.Namespace, point: Point, shape: ModelShape, sites: int | None
) -> Cluster:
    rates = (point.bandwidth, point.bandwidth) if point.bandwidth else None
    if rates is None and args.bandwidth:
        rates = read_up_down(args.bandwidth, "--bandwidth")
    if args.cluster:
        cluster = _load_cluster(args.cluster)
        if sites is not None and sites != cluster.num_sites:
            rule = f"has {cluster.num_sites} sites, not {sites}"
            raise ConfigError("--cluster", args.cluster, rule)
        if args.config and cluster.capacities:
            rule = "states capacities; with --config they are placement.capacity of the config"
            raise ConfigError("--cluster", args.cluster, rule)
        cluster = cluster.with_bandwidth(*rates) if rates else cluster
    else:
        small = shape.total < BIG_MODEL
        up, down = rates or read_up_down(DEFAULT_BANDWIDTH, "--bandwidth")
        cluster = uniform_cluster(
            sites or DEFAULT_SITES,
            accelerator=args.accelerator or "H100",
            count=args.accelerators or (1 if small else 64),
            up_bps=up,
            down_bps=down,
            price=(args.price, args.price) if args.price is not None else None,
        )
    changes: dict[str, object] = {}
    if args.topology:
        changes["topology"] = args.topology
    if args.rtt_ms is not None:
        changes["rtt_s"] = args.rtt_ms / 1000
    return replace(cluster, **changes) if changes else cluster  # type: ignore[arg-type]


def _load_cluster(path: str) -> Cluster:
    return _load_cluster_at(path, _stamp(path))


@lru_cache(maxsize=16)
def _load_cluster_at(path: str, _: int) -> Cluster:
    return load_cluster(path)


def _holdings(
    args: argparse.Namespace,
    point: Point,
    shape: ModelShape,
    cluster: Cluster,
    config: Config | None,
) -> tuple[Holdings, float]:
    num_sites = cluster.num_sites
    if config is not None and point.method in PLACED:
        placement = build_placement(config)
        if config.placement.store == "all":
            placement = replace(placement, holders=placement.trainers)
        return table_holdings(shape, placement), placement.replication_factor
    wanted = point.replication or args.replication
    replication = wanted or min(DEFAULT_REPLICATION, num_sites)
    if replication > num_sites:
        rule = f"exceeds the {num_sites} sites (--sites or --cluster)"
        raise ConfigError("--replication", replication, rule)
    if cluster.capacities is None or not shape.num_experts:
        return cyclic_holdings(shape, num_sites, replication), float(replication)
    return _by_capacity(shape, cluster, wanted)


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


def _local_steps(args: argparse.Namespace, point: Point, config: Config | None) -> int:
    stated = point.local_steps or args.local_steps
    return stated or (config.local_steps if config else DEFAULT_LOCAL_STEPS)


def _tokens_per_step(args: argparse.Namespace, cluster: Cluster, config: Config | None) -> int:
    if args.batch_tokens:
        return max(1, round(args.batch_tokens / cluster.num_sites))
    return config.tokens_per_step if config else BATCH_TOKENS // cluster.num_sites


def _run_tokens(config: Config | None, shape: ModelShape) -> float:
    if config is None:
        return default_tokens(shape)
    steps = config.rounds * config.local_steps
    return float(config.num_sites * steps * config.tokens_per_step)


def _mfu(args: argparse.Namespace, shape: ModelShape) -> tuple[float, float, float]:
    if args.mfu is not None:
        return (args.mfu,) * 3
    return MFU_MOE if shape.num_moe_layers else MFU_DENSE


def _trainer_states(
    config: Config | None, method: str, states: str
) -> tuple[SiteMemory, ...] | None:
    """The trainer's own count for a method that it runs; the others are estimated."""
    if config is None or states != "fp32" or method in ("streaming", "fsdp", "ep"):
        return None
    specs = parameter_specs(config)
    placement = build_placement(config)
    plan = build_plan(specs, placement, router_rows=config.sync.router_rows)
    return tuple(site_memory(config, plan, site) for site in range(config.num_sites))


def _router(config: Config | None) -> dict[str, object]:
    if config is None:
        return {}
    precision = config.inner.precision  # auto: bf16 on accelerators, fp32 on CPU
    return {
        "at_least_one": config.router.at_least_one,
        "route_scope": config.router.route_scope,
        "compute_bytes": 4 if precision == "fp32" else 2,
        "cpu_compute_bytes": 2 if precision == "bf16" else 4,
    }


def _sync(point: Point, method: str, shape: ModelShape) -> dict[str, object]:
    """Bits, fragments and overlap; Streaming DiLoCo's own where nothing is said."""
    streaming = method == "streaming"
    fragments = -(-shape.num_layers // LAYERS_PER_FRAGMENT) if streaming else 1
    chosen = {
        "bits": (point.bits, STREAMING_BITS if streaming else 32),
        "fragments": (point.fragments, fragments),
        "overlap_steps": (point.overlap_steps, STREAMING_OVERLAP if streaming else 0),
    }
    options = {name: other if said is None else said for name, (said, other) in chosen.items()}
    if options["fragments"] > shape.num_layers:
        rule = f"exceeds the {shape.num_layers} layers"
        raise ConfigError("--fragments", options["fragments"], rule)
    return dict(options)


def _calibrated(args: argparse.Namespace, scenario: Scenario) -> Scenario:
    """Step time, link and fixed cost of a real run instead of our defaults."""
    if not args.calibration:
        return scenario
    from fomoe_sim.calibrate import load_calibration

    found = load_calibration(args.calibration)
    cluster = replace(scenario.cluster, sync_fixed_s=found.sync_fixed_s, rtt_s=0.0)
    if not args.bandwidth and not args.cluster:
        # No rate was seen: the link was too fast to matter.
        rate = found.effective_bps or UNSEEN_BPS
        cluster = replace(cluster.with_bandwidth(rate, rate), efficiency=1.0)
    elif found.link_efficiency is None:
        rule = "has no link efficiency: calibrate with --bandwidth to use it for another link"
        raise ConfigError("--calibration", args.calibration, rule)
    else:
        cluster = replace(cluster, efficiency=min(1.0, found.link_efficiency))
    if args.step_time:
        rule = "contradicts --calibration, which has a step time"
        raise ConfigError("--step-time", args.step_time, rule)
    if not args.config:
        # Another model's step time is not this model's; only the link is taken over.
        return replace(scenario, cluster=cluster)
    return replace(
        scenario,
        cluster=cluster,
        step_time_s=found.step_time_s,
        step_time_flops=found.step_flops,
        step_fixed_s=found.step_fixed_s,
    )


def methods_asked(args: argparse.Namespace) -> list[str]:
    """Methods of --compare or --method; else the config's own, else FoMoE."""
    if args.compare:
        names = [name.strip() for name in args.compare.split(",")]
        return [check_method(name) for name in names]
    if args.method:
        return [check_method(args.method)]
    return [_load(args.config, ()).method if args.config else "fomoe"]


def has_experts(args: argparse.Namespace) -> bool:
    """Whether the model of the flags has routed experts."""
    if args.config:
        return bool(_load(args.config, ()).model.moe_layers)
    return model_preset(args.model).num_experts > 0
