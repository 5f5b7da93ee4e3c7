"""From flags to scenarios: which model, which sites, which method, and every default.

A preset's scenario is built from its shape. A config's scenario is built by the trainer's own
loader with the flags as overrides, so that whatever the trainer would refuse is refused here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fomoe.config import Config, load_config
from fomoe.errors import ConfigError
from fomoe.memory import SiteMemory, site_memory
from fomoe.placement import build_placement
from fomoe.segments import build_plan
from fomoe.shapes import parameter_specs
from fomoe_sim.answer import default_tokens
from fomoe_sim.calibrated import calibrated
from fomoe_sim.cluster import Cluster
from fomoe_sim.flags import PLACED
from fomoe_sim.methods import ONLY_OURS, check_method, formulas_of
from fomoe_sim.presets import model_preset, shape_from_config
from fomoe_sim.ranges import RANGES, check_number
from fomoe_sim.scenario import (
    BATCH_TOKENS,
    LAYERS_PER_FRAGMENT,
    MFU_DENSE,
    MFU_MOE,
    STREAMING_BITS,
    STREAMING_OVERLAP,
    Scenario,
)
from fomoe_sim.shape import ModelShape
from fomoe_sim.sites import question_cluster, question_holdings, stamp
from fomoe_sim.traffic import EVERY_STEP

DEFAULT_LOCAL_STEPS = 32
RECOMPUTE = {"none": "none", "experts": "experts", "layers": "full"}  # model.recompute in our words


@dataclass(frozen=True, kw_only=True)
class Point:
    """The options that a sweep may vary; None: the flags', the config's or our default.

    Attributes:
        other_link: whether bandwidths are asked about beside the flags' (a sweep, a search).
    """

    method: str
    sites: int | None = None
    replication: int | None = None
    local_steps: int | None = None
    bandwidth: float | None = None
    bits: int | None = None
    fragments: int | None = None
    overlap_steps: int | None = None
    other_link: bool = False


def build_scenario(args: argparse.Namespace, point: Point) -> Scenario:
    """The scenario of one point.

    Raises:
        ConfigError: for any option that contradicts another or makes no sense.
    """
    config = _config(args, point) if args.config else None
    shape = shape_of(args, config)
    sites = config.num_sites if config else point.sites or args.sites
    cluster = question_cluster(args, shape, sites=sites, bandwidth=point.bandwidth)
    method = formulas_of(point.method, config)
    holdings, replication = question_holdings(
        shape,
        cluster,
        replication=point.replication or args.replication,
        config=config,
        method=point.method,
    )
    seq_len = args.seq_len or (config.data.seq_len if config else shape.seq_len)
    micro_batch = args.micro_batch or _micro_batch(cluster, config)
    scenario = Scenario(
        shape=shape,
        cluster=cluster,
        method=method,
        label=point.method,
        holdings=holdings,
        replication_factor=replication,
        local_steps=_local_steps(args, point, config),
        tokens_per_step=_tokens_per_step(args, cluster, config, micro_batch, seq_len),
        mfu=_mfu(args, shape),
        tokens=args.tokens or _run_tokens(config, shape),
        seq_len=seq_len,
        micro_batch=micro_batch,
        states=args.states,
        recompute=args.recompute or _recompute(config) or "selective",
        outer_on=args.outer_on or "host",
        outer_vectors=0 if method in ("photon", "spes") else 1,
        step_time_s=args.step_time,
        trainer_states=_trainer_states(config, point.method, args.states),
        **_router(config),
        **_sync(point, method, shape),
    )
    other_link = bool(args.bandwidth or args.cluster or point.bandwidth or point.other_link)
    return calibrated(args, scenario, own_recompute=_recompute(config), other_link=other_link)


# ----------------------------------------------------------------------------------------- config


def _load(path: str, overrides: tuple[str, ...]) -> Config:
    return _load_at(path, overrides, stamp(path))


@lru_cache(maxsize=512)
def _load_at(path: str, overrides: tuple[str, ...], _: int) -> Config:
    return load_config(path, overrides)


def _config(args: argparse.Namespace, point: Point) -> Config:
    """The config under the flags: what `fomoe train` would run, or refuse."""
    plain = _load(args.config, ())
    overrides = []
    if point.method != plain.method:
        overrides.append(f"method={ONLY_OURS.get(point.method, point.method)}")
    if point.sites or args.sites:
        overrides.append(f"num_sites={point.sites or args.sites}")
    replication = point.replication or args.replication
    if replication and point.method in PLACED:
        overrides.append(f"placement.replication_factor={replication}")
    return _load(args.config, tuple(overrides))


def shape_of(args: argparse.Namespace, config: Config | None) -> ModelShape:
    """The shape that the trainer builds for a config, or the preset's."""
    if config is None:
        return model_preset(args.model)
    return shape_from_config(config, Path(args.config).stem)


def _recompute(config: Config | None) -> Any:
    return RECOMPUTE[config.model.recompute] if config else None


def _run_tokens(config: Config | None, shape: ModelShape) -> float:
    if config is None:
        return default_tokens(shape)
    steps = config.rounds * config.local_steps
    return float(config.num_sites * steps * config.tokens_per_step)


def _trainer_states(
    config: Config | None, method: str, states: str
) -> tuple[SiteMemory, ...] | None:
    """The trainer's own count for a method that it runs; the others are estimated."""
    if config is None or states != "fp32" or method in ONLY_OURS:
        return None
    specs = parameter_specs(config)
    placement = build_placement(config)
    plan = build_plan(specs, placement, router_rows=config.sync.router_rows)
    return tuple(site_memory(config, plan, site) for site in range(config.num_sites))


def _router(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    precision = config.inner.precision  # auto: bf16 on accelerators, fp32 on CPU
    return {
        "at_least_one": config.router.at_least_one,
        "route_scope": config.router.route_scope,
        "execute_target": config.router.execute_target,
        "compute_bytes": 4 if precision == "fp32" else 2,
    }


# --------------------------------------------------------------------------------------- training


def _local_steps(args: argparse.Namespace, point: Point, config: Config | None) -> int:
    stated = point.local_steps or args.local_steps
    if stated is None and config is not None:
        check_number("local_steps", config.local_steps, RANGES["local_steps"])
        return config.local_steps
    return stated or DEFAULT_LOCAL_STEPS


def _micro_batch(cluster: Cluster, config: Config | None) -> int:
    """Sequences per accelerator; a config's micro-batch is the site's."""
    if config is None:
        return 1
    return max(1, config.inner.batch_size // max(site.count for site in cluster.sites))


def _tokens_per_step(
    args: argparse.Namespace,
    cluster: Cluster,
    config: Config | None,
    micro_batch: int,
    seq_len: int,
) -> int:
    """Tokens of one site's step: at least a micro-batch for each of its accelerators."""
    count = max(site.count for site in cluster.sites)
    least = count * micro_batch * seq_len
    if args.batch_tokens:
        tokens = max(1, round(args.batch_tokens / cluster.num_sites))
    elif config:
        tokens = config.tokens_per_step
    else:
        tokens = max(BATCH_TOKENS // cluster.num_sites, least)
    if tokens < least:
        rule = (
            f"is {tokens} per site and leaves accelerators idle: {count} x {micro_batch} sequences "
            f"of {seq_len} tokens (--micro-batch, --seq-len) need {least}"
        )
        raise ConfigError("--batch-tokens", tokens * cluster.num_sites, rule)
    return tokens


def _mfu(args: argparse.Namespace, shape: ModelShape) -> tuple[float, float, float]:
    if args.mfu is not None:
        return (args.mfu,) * 3
    return MFU_MOE if shape.num_moe_layers else MFU_DENSE


def _sync(point: Point, method: str, shape: ModelShape) -> dict[str, Any]:
    """Bits, fragments and overlap; Streaming DiLoCo's own where nothing is said."""
    streaming = method == "streaming"
    bits = point.bits or (STREAMING_BITS if streaming else 32)
    if method in EVERY_STEP:
        return {"bits": bits}
    fragments = point.fragments
    if fragments is not None and fragments > shape.num_layers:
        raise ConfigError("--fragments", fragments, f"exceeds the {shape.num_layers} layers")
    overlap = point.overlap_steps
    return {
        "bits": bits,
        "fragments": fragments or (-(-shape.num_layers // LAYERS_PER_FRAGMENT) if streaming else 1),
        "overlap_steps": (STREAMING_OVERLAP if streaming else 0) if overlap is None else overlap,
    }


# ---------------------------------------------------------------------------------------- methods


def methods_asked(args: argparse.Namespace) -> list[str]:
    """Methods of --compare or --method; else the config's own, else FoMoE."""
    config = args.config is not None
    if args.compare:
        names = [name.strip() for name in args.compare.split(",")]
        return [check_method(name, config=config, flag="--compare") for name in names]
    if args.method:
        return [check_method(args.method, config=config)]
    return [_load(args.config, ()).method if args.config else "fomoe"]


def has_experts(args: argparse.Namespace) -> bool:
    """Whether the model of the flags has routed experts."""
    if args.config:
        return bool(_load(args.config, ()).model.moe_layers)
    return model_preset(args.model).num_experts > 0
