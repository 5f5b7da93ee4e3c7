"""What a run will store and send, from the config alone (no torch): the planned part of a summary.

`--dry-run` prints it, the trainer writes it into `summary.json` and compares its counters with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fomoe.config import Config
from fomoe.memory import SiteMemory, site_memory
from fomoe.placement import Placement, build_placement
from fomoe.segments import (
    Plan,
    Traffic,
    build_plan,
    full_payload,
    rule_of,
    sync_traffic,
)
from fomoe.shapes import parameter_specs


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Placement, buckets and costs of one experiment.

    Attributes:
        segment_plan: who holds and who trains which rows.
        traffic: bytes of one sync per site (of one gradient average with `ddp`).
        syncs_per_round: 1, or local_steps where gradients are averaged every step.
    """

    config: Config
    placement: Placement
    segment_plan: Plan
    traffic: tuple[Traffic, ...]
    memory: tuple[SiteMemory, ...]
    syncs_per_round: int

    def payload_per_round(self, site: int) -> int:
        return self.traffic[site].payload * self.syncs_per_round

    def wire_per_round(self, site: int) -> int:
        return self.traffic[site].wire * self.syncs_per_round


def plan_run(config: Config) -> RunPlan:
    """Work out who holds what and what it costs."""
    placement = build_placement(config)
    plan = build_plan(parameter_specs(config), config.num_sites, rule_of(config, placement))
    sites = range(config.num_sites)
    return RunPlan(
        config=config,
        placement=placement,
        segment_plan=plan,
        traffic=tuple(sync_traffic(plan, site) for site in sites),
        memory=tuple(site_memory(config, plan, site) for site in sites),
        syncs_per_round=config.local_steps if config.sync.average == "gradients" else 1,
    )


def planned_summary(run: RunPlan) -> dict[str, Any]:
    """The keys of `summary.json` that are known before training.

    Scalars that differ between sites are means, with a `_by_site` list beside them. A ratio is the
    baseline's payload over this run's, null if this run sends nothing.
    """
    config, plan = run.config, run.segment_plan
    sites = range(config.num_sites)
    payload = [run.payload_per_round(site) for site in sites]
    diloco = full_payload(plan.numel, config.num_sites)
    replication = run.placement.replication_factor
    tokens_by_site = config.rounds * config.local_steps * config.tokens_per_step
    return {
        "method": config.method,
        "num_sites": config.num_sites,
        "replication_factor": int(replication) if replication.is_integer() else replication,
        "local_steps": config.local_steps,
        "rounds": config.rounds,
        "tokens": tokens_by_site * config.num_sites,
        "params_total": plan.numel,
        **spread("params_per_site", [plan.numel_at(site) for site in sites]),
        **spread("params_shared_per_site", [plan.numel_at(s, is_expert=False) for s in sites]),
        **spread("params_expert_per_site", [plan.numel_at(s, is_expert=True) for s in sites]),
        **spread("memory_bytes_per_site", [run.memory[site].total for site in sites]),
        **spread("payload_bytes_per_site_per_round", payload),
        **spread("wire_bytes_per_site_per_round", [run.wire_per_round(site) for site in sites]),
        "ratio_vs_ddp": _ratio(diloco * config.local_steps, payload),
        "ratio_vs_diloco": _ratio(diloco, payload),
    }


def memory_by_kind(run: RunPlan) -> list[dict[str, int]]:
    """Bytes of each kind of state, per site."""
    return [asdict(memory) for memory in run.memory]


def spread(name: str, values: list[Any]) -> dict[str, Any]:
    """The mean over sites and the values by site; a whole mean stays an integer."""
    mean = sum(values) / len(values)
    whole = all(isinstance(value, int) for value in values) and mean.is_integer()
    return {name: int(mean) if whole else mean, f"{name}_by_site": values}


def _ratio(baseline: int, payload: list[int]) -> float | None:
    mean = sum(payload) / len(payload)
    return baseline / mean if mean else None
