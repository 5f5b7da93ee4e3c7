"""The question: what `evaluate` answers, all decided, built from what a user said.

A config's question is built by the trainer's own loader, so that whatever the trainer would refuse
is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fomoe_sim.cluster import Cluster, load_cluster, price_kinds, uniform_cluster
from fomoe_sim.methods import BASELINE, METHODS, Method, method_of
from fomoe_sim.options import Ask, read_capacity, read_parallel
from fomoe_sim.shape import ModelShape, model_preset, shape_from_config
from fomoe_sim.traffic import Holdings, cyclic_holdings, table_holdings
from fomoe_sim.trainer import (
    Config,
    ConfigError,
    SiteMemory,
    build_placement,
    capacity_slots,
    counted,
    load,
    slots_placement,
)
from fomoe_sim.units import MOST_LOCAL_STEPS, MOST_SITES, check_number, read_up_down

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
        method, label: whose row of `METHODS`, and how the user named it.
        holdings, replication: who holds which experts, and the mean number of holders.
        batch_tokens: of one step over all sites.
        recompute: what the layout may choose from; one where it is given.
        counted: per site, what the trainer counts for a config; None for presets.
        mfu, step_time_s: given instead of predicted; step_flops, step_fixed_s: of a measured step.
        element_bytes: per activation element; 4: products run in fp32.
        router: options that decide what a site executes.
        needs: abilities of the trainer that it needs, see `fomoe_sim.trainer.can_train`.
    """

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
    seq_len: int
    split: str = "speed"
    micro_batch: int = 0
    recompute: tuple[str, ...] = ("selective", "full")
    parallel: tuple[tuple[str, int], ...] = ()
    states: str = "fp32"
    adam: str = "fp32"
    kernels: str = "fused"
    outer_on: str = "host"
    element_bytes: int = 2
    counted: tuple[SiteMemory, ...] | None = None
    router: tuple[tuple[str, Any], ...] = ()
    mfu: float | None = None
    step_time_s: float | None = None
    step_flops: float | None = None
    step_fixed_s: float = 0.0
    quorum: int | None = None
    mtbf_hours: float | None = None
    repair_hours: float | None = None
    checkpoint_minutes: float | None = None
    token_overhead: float = 1.0
    pue: float = 1.2
    carbon: float = 0.414


def build(ask: Ask, method: str, *, other_link: bool = False) -> Question:
    """The question of one method.

    Args:
        other_link: whether bandwidths are asked about beside the options' (a sweep, a search).

    Raises:
        ConfigError: for any option that contradicts another or makes no sense.
    """
    config = _config(ask, method) if ask.config else None
    shape = shape_of(ask, config)
    row = _row(method, config)
    sites = config.num_sites if config else ask.sites
    cluster = _cluster(ask, shape, sites)
    holdings, replication = _holdings(ask, shape, cluster, row, config)
    if ask.quorum is not None and ask.quorum > cluster.num_sites:
        rule = f"must be between 1 and the {cluster.num_sites} sites"
        raise ConfigError("--quorum", ask.quorum, rule)
    question = Question(
        shape=shape,
        cluster=cluster,
        method=row,
        label=method,
        holdings=holdings,
        replication=replication,
        local_steps=_local_steps(ask, config),
        **_sync(ask, row, shape),
        **_batch(ask, cluster, config, shape),
        split=ask.split or ("equal" if config else "speed"),
        parallel=read_parallel(ask.parallel),
        recompute=_recompute(ask, config),
        states=ask.states or "fp32",
        adam=ask.adam or "fp32",
        kernels=ask.kernels or ("eager" if config else "fused"),
        outer_on=ask.outer_on or "host",
        element_bytes=4 if config and config.inner.precision == "fp32" else 2,
        counted=_counted(ask, method, config),
        router=_router(config),
        mfu=ask.mfu,
        step_time_s=ask.step_time,
        quorum=ask.quorum,
        mtbf_hours=ask.mtbf_hours,
        repair_hours=ask.repair_hours,
        checkpoint_minutes=ask.checkpoint_minutes,
        token_overhead=ask.token_overhead or 1.0,
        pue=ask.pue or 1.2,
        carbon=0.414 if ask.carbon is None else ask.carbon,
    )
    return _calibrated(ask, question, config, other_link or bool(ask.bandwidth or ask.cluster))


def baseline(question: Question) -> Question:
    """The same accelerators on one site, with the same batch and tokens: gradients every step."""
    sites = question.cluster.sites
    count = sum(site.count for site in sites)
    prices = [sum(s.count * s.price_per_hour[end] for s in sites) / count for end in (0, 1)]
    one = replace(
        sites[0],
        name=BASELINE,
        count=count,
        host_bytes=sum(site.host_bytes for site in sites),
        price_per_hour=(prices[0], prices[1]),
        capacity=None,
        uplink=None,
    )
    cluster = replace(question.cluster, sites=(one,), uplinks=(), name=BASELINE)
    if len({site.accelerator for site in sites}) > 1:
        # Unequal accelerators stay as they are, joined by their own network cards.
        joined = [8 * site.count * site.accelerator.nic for site in sites]
        fast = tuple(
            replace(
                site,
                up_bps=rate,
                down_bps=rate,
                capacity=None,
                uplink=None,
                egress_per_gb=(0.0, 0.0),
            )
            for site, rate in zip(sites, joined, strict=True)
        )
        cluster = replace(cluster, sites=fast, rtt_s=0.0, sync_fixed_s=0.0, efficiency=0.8)
    joined_sites = cluster.num_sites
    return replace(
        question,
        cluster=cluster,
        method=METHODS["ddp"],
        label=BASELINE,
        holdings=cyclic_holdings(question.shape, joined_sites, joined_sites),
        replication=float(joined_sites),
        bits=32.0,
        fragments=1,
        overlap_steps=0,
        counted=None,
        quorum=None,
        token_overhead=1.0,
        step_flops=question.step_flops and question.step_flops * len(sites) / joined_sites,
        mtbf_hours=question.mtbf_hours and question.mtbf_hours * joined_sites / len(sites),
    )


def _row(method: str, config: Config | None) -> Method:
    """The method's row; gradients of every step are DDP's, whatever the config's method."""
    row = method_of(method, config=config is not None)
    if config is not None and not row.config_as and config.sync.average == "gradients":
        return METHODS["ddp"]
    return row


def shape_of(ask: Ask, config: Config | None) -> ModelShape:
    """The shape that the trainer builds for a config, or the preset's."""
    if config is None:
        assert ask.model is not None
        return model_preset(ask.model)
    assert ask.config is not None
    return shape_from_config(config, Path(ask.config).stem)


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
    assert ask.config is not None
    plain = load(ask.config)
    row = method_of(method, config=True)
    overrides = []
    if method != plain.method:
        overrides.append(f"method={row.config_as or method}")
    if ask.sites:
        overrides.append(f"num_sites={ask.sites}")
    if ask.replication and row.placed:
        overrides.append(f"placement.replication_factor={ask.replication}")
    return load(ask.config, tuple(overrides))


def _cluster(ask: Ask, shape: ModelShape, sites: int | None) -> Cluster:
    """The cluster file or equal sites, with the options on top."""
    rates = read_up_down(ask.bandwidth, "--bandwidth") if ask.bandwidth else None
    if ask.cluster:
        cluster = load_cluster(ask.cluster)
        if sites is not None and sites != cluster.num_sites:
            rule = f"has {cluster.num_sites} sites, not {sites}"
            raise ConfigError("--cluster", ask.cluster, rule)
        if ask.config and cluster.capacities:
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
            price=(ask.price, ask.price) if ask.price is not None else None,
        )
    if ask.price_kind:
        cluster = cluster.at_share(price_kinds()[ask.price_kind])
    return cluster if ask.rtt_ms is None else replace(cluster, rtt_s=ask.rtt_ms / 1000)


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
            flag, value = (
                ("--capacity", ask.capacity) if ask.capacity else ("--cluster", cluster.name)
            )
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


def _local_steps(ask: Ask, config: Config | None) -> int:
    if ask.local_steps is None and config is not None:
        check_number("local_steps", config.local_steps, 1, MOST_LOCAL_STEPS)
        return config.local_steps
    return ask.local_steps or DEFAULT_LOCAL_STEPS


def _sync(ask: Ask, row: Method, shape: ModelShape) -> dict[str, Any]:
    """Bits, fragments and overlap; the method's own where nothing is said."""
    bits = float(ask.bits or row.bits)
    if row.every_step:
        return {"bits": bits, "fragments": 1, "overlap_steps": 0}
    check_fragments(ask.fragments, shape)
    own = -(-shape.num_layers // row.layers_per_fragment) if row.layers_per_fragment else 1
    overlap = row.overlap_steps if ask.overlap_steps is None else ask.overlap_steps
    return {"bits": bits, "fragments": ask.fragments or own, "overlap_steps": overlap}


def check_fragments(fragments: int | None, shape: ModelShape) -> None:
    """Refuse more fragments than a model has layers."""
    if fragments is not None and fragments > shape.num_layers:
        rule = f"exceeds the {shape.num_layers} layers of {shape.name}"
        raise ConfigError("--fragments", fragments, rule)


def _batch(ask: Ask, cluster: Cluster, config: Config | None, shape: ModelShape) -> dict[str, Any]:
    """Context, micro-batch and tokens of a step and of the run."""
    seq_len = ask.seq_len or (config.data.seq_len if config else shape.seq_len)
    most = max(site.count for site in cluster.sites)
    micro = ask.micro_batch or 0
    if config is not None:
        micro = micro or max(1, config.inner.batch_size // most)
        batch = ask.batch_tokens or float(config.num_sites * config.tokens_per_step)
        steps = config.rounds * config.local_steps
        tokens = float(config.num_sites * steps * config.tokens_per_step)
    else:
        least = most * max(1, micro) * seq_len * cluster.num_sites
        batch = ask.batch_tokens or float(max(BATCH_TOKENS, least))
        tokens = 20.0 * shape.active
    return {
        "seq_len": seq_len,
        "micro_batch": micro,
        "batch_tokens": batch,
        "tokens": ask.tokens or tokens,
    }


def _recompute(ask: Ask, config: Config | None) -> tuple[str, ...]:
    if ask.recompute:
        return (ask.recompute,)
    if config is not None:
        return (OWN_RECOMPUTE[config.model.recompute],)
    return ("selective", "full")


def _counted(ask: Ask, method: str, config: Config | None) -> tuple[SiteMemory, ...] | None:
    """The trainer's own count for a method that it runs; the others are estimated."""
    if config is None or (ask.states or "fp32") != "fp32" or ask.adam or METHODS[method].config_as:
        return None
    return counted(config).states


def _router(config: Config | None) -> tuple[tuple[str, Any], ...]:
    if config is None:
        return ()
    names = ("at_least_one", "route_scope", "execute_target")
    return tuple((name, getattr(config.router, name)) for name in names)


def _calibrated(ask: Ask, question: Question, config: Config | None, other_link: bool) -> Question:
    """The question with what `fomoe calibrate` found, if a file of it is named."""
    if not ask.calibration:
        return question
    from fomoe_sim.calibrate import load_calibration

    found = load_calibration(ask.calibration)
    cluster = replace(question.cluster, sync_fixed_s=found.sync_fixed_s, rtt_s=0.0)
    if not other_link:
        # No rate was seen: the link was too fast to matter.
        rate = found.effective_bps or UNSEEN_BPS
        cluster = replace(cluster.with_bandwidth(rate, rate), efficiency=1.0)
    elif found.link_efficiency is None:
        rule = "has no link efficiency: calibrate with --bandwidth to use it for another link"
        raise ConfigError("--calibration", ask.calibration, rule)
    else:
        cluster = replace(cluster, efficiency=min(1.0, found.link_efficiency))
    if config is None:
        # Another model's step time is not this model's; only the link is taken over.
        return replace(question, cluster=cluster)
    own = OWN_RECOMPUTE[config.model.recompute]
    if question.recompute != (own,):
        rule = f"contradicts --calibration, whose step recomputes {own} (the config's)"
        raise ConfigError("--recompute", question.recompute[0], rule)
    return replace(
        question,
        cluster=cluster,
        step_time_s=found.step_time_s,
        step_flops=found.step_flops,
        step_fixed_s=found.step_fixed_s,
    )
