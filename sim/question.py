"""The question: what `evaluate` answers, all decided, built from what a user said.

A config's question is built by the trainer's own loader, so that whatever the trainer would refuse
is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fomoe_sim.calibrate import load_calibration
from fomoe_sim.cluster import Cluster, load_cluster, price_kinds, uniform_cluster
from fomoe_sim.methods import BASELINE, METHODS, Method, method_of
from fomoe_sim.options import MOST_LOCAL_STEPS, MOST_SITES, Ask, read_capacity, read_parallel
from fomoe_sim.shape import ModelShape, model_preset, shape_from_config
from fomoe_sim.step import Inside
from fomoe_sim.traffic import Holdings, cyclic_holdings, table_holdings
from fomoe_sim.trainer import (
    CODECS,
    FP32,
    Codec,
    Config,
    ConfigError,
    SiteMemory,
    build_placement,
    capacity_slots,
    load,
    plan_run,
    slots_placement,
)
from fomoe_sim.units import check_number, read_up_down

DEFAULT_SITES, DEFAULT_REPLICATION, DEFAULT_LOCAL_STEPS = 4, 2, 32
DEFAULT_BANDWIDTH = "1Gbit"
BIG_MODEL = 10**9  # from here on a preset's site is 64 accelerators unless said
BATCH_TOKENS = 4 * 2**20
OWN_RECOMPUTE = {"none": "none", "experts": "experts", "layers": "full"}  # model.recompute in ours
UNSEEN_BPS = 1e18  # of a calibration whose link was too fast to be seen


@dataclass(frozen=True, kw_only=True)
class Question:
    """One decided question; equal H at all sites.

    Attributes:
        ask: what a user said; taken as said are failures, prices, energy, `mfu` and `outer_on`.
        method, label: whose row of `METHODS`, and how the user named it.
        holdings, replication: who holds which experts, and the mean number of holders.
        batch_tokens: of one step over all sites; split: by the sites' speed, or equal.
        shares: of the step, per site, where a config says them; None: as `split` says.
        codec: the config's own, whose bytes are counted exactly; fp32 where bits are said.
        inside: how a site computes.
        counted: per site, what the trainer counts for a config; None for presets.
        router: options that decide what a site executes.
        step_time_s: given instead of predicted; step_flops, step_fixed_s: of a measured step.
    """

    ask: Ask
    shape: ModelShape
    cluster: Cluster
    method: Method
    label: str
    holdings: Holdings
    replication: float
    local_steps: int
    bits: float
    fragments: int
    overlap_steps: int
    tokens: float
    batch_tokens: float
    split: str = "speed"
    shares: tuple[float, ...] | None = None
    codec: Codec = FP32
    inside: Inside
    counted: tuple[SiteMemory, ...] | None = None
    router: tuple[tuple[str, Any], ...] = ()
    step_time_s: float | None = None
    step_flops: float | None = None
    step_fixed_s: float = 0.0


def build(ask: Ask, method: str, *, other_link: bool = False) -> Question:
    """The question of one method.

    Args:
        other_link: whether bandwidths are asked about beside the options' (a sweep, a search).

    Raises:
        ConfigError: for any option that contradicts another or makes no sense.
    """
    config = _config(ask, method) if ask.config else None
    shape = shape_of(ask, config)
    row = method_of(method, config=config is not None)
    if config is not None and not row.config_as and config.sync.average == "gradients":
        row = METHODS["ddp"]  # gradients of every step are DDP's, whatever the config's method
    cluster = _cluster(ask, shape, config)
    holdings, replication = _holdings(ask, shape, cluster, row, config)
    inside = _inside(ask, config, shape, max(site.count for site in cluster.sites))
    for device in {site.accelerator.name: site.accelerator for site in cluster.sites}.values():
        if not inside.peak(device):
            raise ConfigError("--precision", inside.precision, f"has no rate on {device.name}")
    if config is None:
        steps = ask.local_steps or DEFAULT_LOCAL_STEPS
        least = max(s.count for s in cluster.sites) * max(1, inside.micro_batch) * inside.seq_len
        batch = float(max(BATCH_TOKENS, least * cluster.num_sites))
        tokens = 20.0 * shape.active
    else:
        steps = ask.local_steps or config.local_steps
        check_number("local_steps", steps, 1, MOST_LOCAL_STEPS)
        batch = float(sum(config.tokens_per_step))
        tokens = batch * config.rounds * config.local_steps
    # The trainer's own count for a method that it runs; the others are estimated.
    own = config is not None and (ask.states, ask.adam) == ("fp32", "fp32")
    names = ("at_least_one", "route_scope", "execute_target")
    question = Question(
        ask=ask,
        shape=shape,
        cluster=cluster,
        method=row,
        label=method,
        holdings=holdings,
        replication=replication,
        local_steps=steps,
        **_sync(ask, row, shape, config),
        batch_tokens=ask.batch_tokens or batch,
        tokens=ask.tokens or tokens,
        split=ask.split or ("equal" if config else "speed"),
        shares=_shares(ask, config),
        inside=inside,
        counted=plan_run(config).memory
        if config and own and not METHODS[method].config_as
        else None,
        router=tuple((name, getattr(config.router, name)) for name in names) if config else (),
        step_time_s=ask.step_time,
    )
    return _calibrated(question, config, other_link or bool(ask.bandwidth or ask.cluster))


def baseline(question: Question) -> Question:
    """The same accelerators on one site, with the same batch and tokens: gradients every step."""
    sites, count = question.cluster.sites, sum(site.count for site in question.cluster.sites)
    alone = [replace(site, capacity=None, uplink=None) for site in sites]
    if len({site.accelerator for site in sites}) == 1:
        low, high = (sum(s.count * s.price_per_hour[end] for s in sites) / count for end in (0, 1))
        hosts = sum(site.host_bytes for site in sites) / 1e9
        one = replace(
            alone[0], name=BASELINE, count=count, host_memory_gb=hosts, price_per_hour=(low, high)
        )
        cluster = replace(question.cluster, sites=(one,))
    else:
        # Unequal accelerators stay as they are, joined by their own network cards.
        rates = [8 * site.count * site.accelerator.nic for site in sites]
        joined = tuple(
            replace(site, up_bps=rate, down_bps=rate, egress_per_gb=(0.0, 0.0))
            for site, rate in zip(alone, rates, strict=True)
        )
        cluster = replace(
            question.cluster, sites=joined, rtt_ms=0.0, sync_fixed_s=0.0, efficiency=0.8
        )
    count = cluster.num_sites
    mtbf = question.ask.mtbf_hours and question.ask.mtbf_hours * count / len(sites)
    return replace(
        question,
        ask=replace(question.ask, mtbf_hours=mtbf, token_overhead=1.0),
        cluster=replace(cluster, uplinks=(), name=BASELINE),
        method=METHODS["ddp"],
        label=BASELINE,
        holdings=cyclic_holdings(question.shape, count, count),
        replication=float(count),
        shares=None,
        bits=32.0,
        codec=FP32,
        fragments=1,
        overlap_steps=0,
        counted=None,
        step_flops=question.step_flops and question.step_flops * len(sites) / count,
    )


def shape_of(ask: Ask, config: Config | None) -> ModelShape:
    """The shape that the trainer builds for a config, or the preset's."""
    if config is None:
        return model_preset(str(ask.model))
    return shape_from_config(config, Path(str(ask.config)).stem)


def has_experts(ask: Ask) -> bool:
    """Whether the model asked about has routed experts."""
    if ask.config:
        return bool(load(ask.config).model.moe_layers)
    return shape_of(ask, None).num_experts > 0


def own_method(ask: Ask) -> str:
    """The method of a config, else ours."""
    return str(load(ask.config).method) if ask.config else "fomoe"


def _config(ask: Ask, method: str) -> Config:
    """The config under the options: what `fomoe train` would run, or refuse."""
    plain = load(str(ask.config))
    row = method_of(method, config=True)
    overrides = []
    if method != plain.method:
        overrides.append(f"method={row.config_as or method}")
    if ask.sites:
        overrides.append(f"num_sites={ask.sites}")
    if ask.replication and row.placed:
        overrides.append(f"placement.replication_factor={ask.replication}")
    return load(str(ask.config), tuple(overrides))


def _shares(ask: Ask, config: Config | None) -> tuple[float, ...] | None:
    """Shares of a config whose sites have batches of different size, unless --split is given."""
    if config is None or ask.split or len(set(config.batch_sizes)) == 1:
        return None
    return tuple(size / sum(config.batch_sizes) for size in config.batch_sizes)


def _cluster(ask: Ask, shape: ModelShape, config: Config | None) -> Cluster:
    """The cluster file or equal sites, with the options on top."""
    sites = config.num_sites if config else ask.sites
    rates = read_up_down(ask.bandwidth, "--bandwidth") if ask.bandwidth else None
    if ask.cluster:
        cluster = load_cluster(ask.cluster)
        if sites is not None and sites != cluster.num_sites:
            rule = f"has {cluster.num_sites} sites, not {sites}"
            raise ConfigError("--cluster", ask.cluster, rule)
        if config and cluster.capacities:
            rule = "states capacities; with --config they are placement.capacity of the config"
            raise ConfigError("--cluster", ask.cluster, rule)
        cluster = cluster.with_bandwidth(*rates) if rates else cluster
    else:
        if sites is not None and sites > MOST_SITES:
            raise ConfigError("num_sites", sites, f"must be at most {MOST_SITES}")
        up, down = rates or read_up_down(DEFAULT_BANDWIDTH, "--bandwidth")
        # The trainer runs a site on one accelerator, so a config's site has one.
        several = ask.model is not None and shape.total >= BIG_MODEL
        cluster = uniform_cluster(
            sites or DEFAULT_SITES,
            accelerator=ask.accelerator or "H100",
            count=ask.accelerators or (64 if several else 1),
            up_bps=up,
            down_bps=down,
            price=ask.price,
        )
    if ask.price_kind:
        cluster = cluster.at_share(*price_kinds()[ask.price_kind])
    return cluster if ask.rtt_ms is None else replace(cluster, rtt_ms=ask.rtt_ms)


def _holdings(
    ask: Ask, shape: ModelShape, cluster: Cluster, row: Method, config: Config | None
) -> tuple[Holdings, float]:
    """Who holds which experts, and the mean number of holders."""
    if config is not None and row.placed:
        placement = build_placement(config)
        if row.crosses == "server":
            # Every site stores all experts; what counts is which of them it trains.
            placement = replace(placement, holders=placement.trainers)
        return table_holdings(shape, placement), placement.replication_factor
    check_replication(ask.replication, cluster.num_sites)
    stated = read_capacity(ask.capacity) if ask.capacity else cluster.capacities
    if stated is not None and len(stated) != cluster.num_sites:
        rule = f"must give one number for each of the {cluster.num_sites} sites"
        raise ConfigError("--capacity", ask.capacity, rule)
    if stated is not None and shape.num_experts:
        room = sum(min(limit, shape.num_experts) for limit in stated)
        if room < shape.num_experts * (ask.replication or 1):
            need = f"{shape.num_experts} experts with {ask.replication or 1} holders each"
            flag, value = "--cluster", cluster.name
            if ask.capacity:
                flag, value = "--capacity", ask.capacity
            raise ConfigError(flag, value, f"has capacity for {room} experts, {need}")
        slots = capacity_slots(stated, shape.num_experts, ask.replication)
        return slot_holdings(shape, cluster.num_sites, slots)
    chosen = ask.replication or min(DEFAULT_REPLICATION, cluster.num_sites)
    return cyclic_holdings(shape, cluster.num_sites, chosen), float(chosen)


def slot_holdings(
    shape: ModelShape, num_sites: int, slots: tuple[int, ...]
) -> tuple[Holdings, float]:
    """Holdings where each site takes so many experts of every layer."""
    placement = slots_placement(num_sites, shape.moe_layers, shape.num_experts, slots)
    return table_holdings(shape, placement), placement.replication_factor


def check_replication(replication: int | None, num_sites: int) -> None:
    """Refuse more holders per expert than there are sites."""
    if replication is not None and replication > num_sites:
        rule = f"exceeds the {num_sites} sites (--sites or --cluster)"
        raise ConfigError("--replication", replication, rule)


def _sync(ask: Ask, row: Method, shape: ModelShape, config: Config | None) -> dict[str, Any]:
    """Bits, fragments and overlap; the config's or the method's own where nothing is said."""
    codec, own, overlap = FP32, 1, row.overlap_steps
    if config is not None and row.trained_as:
        codec = CODECS[config.sync.codec] if ask.bits is None else FP32
        own, overlap = config.sync.fragments, config.sync.overlap_steps
    sent = {"codec": codec, "bits": float(ask.bits or min(codec.mean_bits, row.bits))}
    if row.every_step:
        return {**sent, "fragments": 1, "overlap_steps": 0}
    check_fragments(ask.fragments, shape)
    if row.layers_per_fragment:
        own = -(-shape.num_layers // row.layers_per_fragment)
    overlap = overlap if ask.overlap_steps is None else ask.overlap_steps
    return {**sent, "fragments": ask.fragments or own, "overlap_steps": overlap}


def check_fragments(fragments: int | None, shape: ModelShape) -> None:
    """Refuse more fragments than a model has layers."""
    if fragments is not None and fragments > shape.num_layers:
        rule = f"exceeds the {shape.num_layers} layers of {shape.name}"
        raise ConfigError("--fragments", fragments, rule)


def _inside(ask: Ask, config: Config | None, shape: ModelShape, most: int) -> Inside:
    """How a site computes; `most`: accelerators of the largest."""
    given: dict[str, Any] = {
        "seq_len": ask.seq_len or shape.seq_len,
        "micro_batch": ask.micro_batch or 0,
        "parallel": read_parallel(ask.parallel),
        "states": ask.states,
        "adam": ask.adam,
        "precision": ask.precision or "bf16",
        "kernels": ask.kernels or "fused",
    }
    if config is not None:
        given |= {
            "micro_batch": ask.micro_batch or max(1, max(config.batch_sizes) // most),
            "precision": "fp32" if config.inner.precision == "fp32" else "bf16",
            "kernels": ask.kernels or "eager",
            "recompute": (OWN_RECOMPUTE[config.model.recompute],),
        }
    if ask.recompute:
        given["recompute"] = (ask.recompute,)
    return Inside(**given)


def _calibrated(question: Question, config: Config | None, other_link: bool) -> Question:
    """The question with what `fomoe calibrate` found, if a file of it is named."""
    path = question.ask.calibration
    if not path:
        return question
    found = load_calibration(path)
    cluster = replace(question.cluster, sync_fixed_s=found.sync_fixed_s, rtt_ms=0.0)
    if not other_link:
        # No rate was seen: the link was too fast to matter.
        rate = found.effective_bps or UNSEEN_BPS
        cluster = replace(cluster.with_bandwidth(rate, rate), efficiency=1.0)
    elif found.link_efficiency is None:
        rule = "has no link efficiency: calibrate with --bandwidth to use it for another link"
        raise ConfigError("--calibration", path, rule)
    else:
        cluster = replace(cluster, efficiency=min(1.0, found.link_efficiency))
    if config is None:
        # Another model's step time is not this model's; only the link is taken over.
        return replace(question, cluster=cluster)
    own = OWN_RECOMPUTE[config.model.recompute]
    if question.inside.recompute != (own,):
        rule = f"contradicts --calibration, whose step recomputes {own} (the config's)"
        raise ConfigError("--recompute", question.inside.recompute[0], rule)
    return replace(
        question,
        cluster=cluster,
        step_time_s=found.step_time_s,
        step_flops=found.step_flops,
        step_fixed_s=found.step_fixed_s,
    )
