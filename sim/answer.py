"""The answer to a scenario: traffic, memory, time and money in one row per configuration.

The same code answers one configuration and a sweep: everything that does not depend on local steps
or bandwidth is computed once per scenario, the rest is arrays.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fomoe_sim.hardware import central
from fomoe_sim.memory import most_loaded, site_memories, site_totals, verdict
from fomoe_sim.scenario import Scenario
from fomoe_sim.shape import ModelShape
from fomoe_sim.timing import (
    Timing,
    analytic,
    cluster_rate,
    event,
    link_load,
    overlaps,
    step_times,
)
from fomoe_sim.traffic import Floats, Ints

Row = dict[str, Any]
HOUR = 3600.0
REFERENCE_BITS = 32  # DDP and DiLoCo in the ratios send fp32, as the trainer does


def answer(scenario: Scenario) -> Row:
    """One configuration; methods that overlap are timed by the event model."""
    load, steps = link_load(scenario), np.array([float(scenario.local_steps)])
    low, middle, high = (
        event(scenario, mfu=mfu, load=load)
        if overlaps(scenario)
        else analytic(scenario, steps, mfu=mfu, load=load)
        for mfu in scenario.mfu
    )
    rate = np.array([cluster_rate(scenario.cluster)])
    row = _rows(scenario, steps, rate, low, middle, high)[0]
    return {**row, **by_site(scenario)}


def by_site(scenario: Scenario) -> Row:
    """What the row's means are means of, site by site; named as the trainer's summary does."""
    traffic = scenario.traffic
    exchanges = scenario.local_steps if traffic.every_step else 1
    per_round = {"payload": traffic.payload, "wire": traffic.sent, "received": traffic.received}
    columns: Row = {
        f"{name}_bytes_per_site_per_round_by_site": _whole(exchanges * amounts).tolist()
        for name, amounts in per_round.items()
    }
    memories = site_memories(scenario)
    columns["params_per_site_by_site"] = traffic.held.tolist()
    columns["memory_bytes_per_site_by_site"] = _whole(site_totals(memories)).tolist()
    columns["step_time_s_by_site"] = step_times(scenario, scenario.mfu[1]).tolist()
    columns["memory_parts"] = {
        part.name: {"where": part.where, "bytes": round(part.site_bytes)}
        for part in most_loaded(memories).parts
    }
    return columns


def _mean(values: Floats | Ints) -> int | float:
    """A mean over sites; whole means stay integers."""
    mean = float(values.mean())
    return int(mean) if mean.is_integer() else mean


def answers(scenario: Scenario, local_steps: ArrayLike, bandwidth: ArrayLike | None) -> list[Row]:
    """Many configurations that differ in local steps and bandwidth only, in analytic mode.

    Args:
        local_steps: H of each, [P].
        bandwidth: bit/s of every site's own link, up and down, [P]; None: the cluster's links.
    """
    steps = np.atleast_1d(np.asarray(local_steps, float))
    rates = None if bandwidth is None else np.atleast_1d(np.asarray(bandwidth, float))
    load = link_load(scenario, rates, rates)
    low, middle, high = (analytic(scenario, steps, mfu=mfu, load=load) for mfu in scenario.mfu)
    shown = np.full(steps.shape, cluster_rate(scenario.cluster)) if rates is None else rates
    return _rows(scenario, steps, shown, low, middle, high)


def _rows(
    scenario: Scenario, steps: Floats, rates: Floats, low: Timing, middle: Timing, high: Timing
) -> list[Row]:
    fixed = static_columns(scenario)
    exchanges = steps if scenario.traffic.every_step else np.ones_like(steps)
    payload = exchanges * float(scenario.traffic.payload.mean())
    several = scenario.cluster.num_sites > 1
    numel = scenario.shape.total * REFERENCE_BITS / 8
    columns: dict[str, Floats | Ints] = {
        "local_steps": steps.astype(np.int64),
        "bandwidth_bps": rates,
        "payload_bytes_per_site_per_round": _whole(payload),
        "wire_bytes_per_site_per_round": _whole(exchanges * float(scenario.traffic.sent.mean())),
        "received_bytes_per_site_per_round": _whole(
            exchanges * float(scenario.traffic.received.mean())
        ),
        "step_time_s": np.full(steps.shape, float(middle.step_times_s.max())),
        "sync_time_s": middle.exchange_s + 0 * steps,
        "exposed_s_per_round": middle.exposed_s,
        "round_time_s": middle.round_time_s,
        "utilisation": middle.utilisation,
        "tokens_per_s": _tokens_per_round(scenario, steps) / middle.round_time_s,
        **_money(scenario, steps, exchanges, low, middle, high),
    }
    lists = {name: values.tolist() for name, values in columns.items()}
    extra = {"time_model": middle.model, "slowest_link": middle.load.where}
    ratios = {
        "ratio_vs_ddp": (steps * numel, payload),
        "ratio_vs_diloco": (np.full(steps.shape, numel), payload),
    }
    for name, (theirs, ours) in ratios.items():
        known = several and bool(ours.min() > 0)
        lists[name] = (theirs / ours).tolist() if known else [None] * len(steps)
    names = list(lists)
    return [
        {**fixed, **extra, **dict(zip(names, values, strict=True))}
        for values in zip(*lists.values(), strict=True)
    ]


def _whole(amount: Floats) -> Ints:
    """Bytes as integers: half a byte of low-bit payload is sent as a whole one."""
    return np.ceil(amount).astype(np.int64)


def static_columns(scenario: Scenario) -> Row:
    """What does not depend on local steps or bandwidth."""
    traffic, shape = scenario.traffic, scenario.shape
    memories = site_memories(scenario)
    tightest = most_loaded(memories)
    fits, words = verdict(scenario, memories)
    cyclic = scenario.method in ("fomoe", "spes") and shape.num_experts > 0
    whole = {"ep": 1.0}.get(scenario.method, float(scenario.cluster.num_sites))
    replication = scenario.replication_factor if cyclic else whole
    return {
        "model": shape.name,
        "method": scenario.label,
        "num_sites": scenario.cluster.num_sites,
        "replication_factor": int(replication) if replication == int(replication) else replication,
        "bits": scenario.bits,
        "fragments": scenario.fragments,
        "overlap_steps": scenario.overlap_steps,
        "topology": scenario.cluster.topology,
        "recompute": scenario.recompute,
        "params_total": shape.total,
        "params_active": shape.active,
        "params_per_site": _mean(traffic.held),
        "executed_fraction": float(traffic.executed.mean()),
        "memory_bytes_per_site": round(float(site_totals(memories).mean())),
        "memory_bytes_per_accelerator": int(np.ceil(tightest.per_accelerator)),
        "host_bytes_per_site": int(max(memory.total("host") for memory in memories)),
        "fits": fits,
        "memory_verdict": words,
        "mfu": scenario.mfu[1],
        "tokens": scenario.tokens,
    }


def _tokens_per_round(scenario: Scenario, steps: Floats) -> Floats:
    return scenario.cluster.num_sites * scenario.tokens_per_step * steps


def _money(
    scenario: Scenario,
    steps: Floats,
    exchanges: Floats,
    low: Timing,
    middle: Timing,
    high: Timing,
) -> dict[str, Floats]:
    """Days and USD of the whole run; low and high take the best and worst of every range."""
    sites = scenario.cluster.sites
    rounds = scenario.tokens / _tokens_per_round(scenario, steps)
    per_exchange = [
        sum(
            site.egress_per_gb[end] * amount / 1e9
            for site, amount in zip(sites, scenario.traffic.sent.tolist(), strict=True)
        )
        for end in (0, 1)
    ]
    egress = [price * exchanges * rounds for price in per_exchange]
    # A faster site (high utilisation of its peak) is the cheap end.
    fleet = [sum(site.count * site.price_per_hour[end] for site in sites) for end in (0, 1)]
    usual = sum(site.count * central(site.price_per_hour) for site in sites)
    hours = [rounds * timing.round_time_s / HOUR for timing in (high, middle, low)]
    compute = usual * hours[1]
    typical = compute + (egress[0] + egress[1]) / 2
    return {
        "rounds": rounds,
        "days": hours[1] / 24,
        "days_low": hours[0] / 24,
        "days_high": hours[2] / 24,
        "cost_usd": typical,
        "cost_usd_low": fleet[0] * hours[0] + egress[0],
        "cost_usd_high": fleet[1] * hours[2] + egress[1],
        "egress_usd_high": egress[1],
        "idle_usd": compute * (1 - middle.utilisation),
        "usd_per_1e6_tokens": typical / (scenario.tokens / 1e6),
    }


@lru_cache(maxsize=64)
def default_tokens(shape: ModelShape) -> float:
    """Chinchilla's 20 tokens per parameter, counted on active parameters."""
    return 20.0 * shape.active
