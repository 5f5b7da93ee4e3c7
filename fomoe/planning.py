"""What a run will store and send, from the config alone (no torch): the planned part of a summary.

`--dry-run` prints it, the trainer writes it into `summary.json` and compares its counters with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fomoe.codecs import CODECS
from fomoe.config import Config
from fomoe.copies import build_families, coupling, exchanged, rounds_by_coupling
from fomoe.fragments import fragment_of, fragment_of_layer, streams, synced_again
from fomoe.memory import SiteMemory, site_memory, sum_memory
from fomoe.placement import Placement, build_placement
from fomoe.segments import (
    Bucket,
    Plan,
    Traffic,
    buckets_traffic,
    build_plan,
    full_payload,
    rule_of,
    sum_traffic,
    takes_outer_step,
)
from fomoe.shapes import parameter_specs
from fomoe.shards import cut_plan


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Rounds whose syncs exchange the same: all of a run, or those before and after copies part.

    Attributes:
        coupling: how far copies of experts are tied to one another; 1 without copies.
        rounds: how many there are in the run.
        traffic: bytes of one sync per site (of one gradient average with `ddp`), of all ranks of
            the site together.
    """

    coupling: float
    rounds: int
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Placement, buckets and costs of one experiment.

    Attributes:
        segment_plan: who holds and who trains which rows.
        families: buckets of experts' copies with the same origin; none without copies.
        phases: one, or that of tied copies and that of copies that have parted.
        fragments: bytes of one sync per fragment and site; one fragment is a whole sync.
        memory: state per site; of a rank's plan, per rank.
        syncs_per_round: 1, or local_steps where gradients are averaged every step.
        ranks: the plan of every rank of a site, in order; none if a site is one process.
        whole: of a rank's plan, that of the site: the segments that its checkpoints name.
    """

    config: Config
    placement: Placement
    segment_plan: Plan
    families: tuple[Bucket, ...]
    phases: tuple[Phase, ...]
    fragments: tuple[tuple[Traffic, ...], ...]
    memory: tuple[SiteMemory, ...]
    syncs_per_round: int
    ranks: tuple[RunPlan, ...] = ()
    whole: Plan | None = None

    def at_rank(self, rank: int) -> RunPlan:
        """The plan of one rank: what it averages with the same rank of the other sites."""
        return self.ranks[rank] if self.ranks else self

    @property
    def site_plan(self) -> Plan:
        """The segments of whole sites."""
        return self.whole or self.segment_plan

    @property
    def memory_plan(self) -> Plan:
        """The segments that are in the memory of this rank."""
        shards = self.config.inner.parallel == "fsdp"
        return self.segment_plan if shards else self.site_plan

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """Bytes of one sync per site, in the first phase that has rounds."""
        return next(phase for phase in self.phases if phase.rounds).traffic

    def traffic_of_sync(self, site: int, steps: int, fragment: int = 0) -> Traffic:
        """Bytes at one site of a fragment's sync that follows `steps` local steps."""
        if len(self.fragments) > 1:
            return self.fragments[fragment][site]
        share = coupling(self.config, steps)
        return next(p.traffic[site] for p in self.phases if p.coupling == share)

    def payload_per_round(self, site: int) -> float:
        """Mean over the rounds of the run; an integer if it is whole."""
        at_end, _ = self.added_at_end(site)
        return self._mean([(p.rounds, p.traffic[site].payload) for p in self.phases], at_end)

    def wire_per_round(self, site: int) -> float:
        """Mean over the rounds of the run; an integer if it is whole."""
        _, at_end = self.added_at_end(site)
        return self._mean([(p.rounds, p.traffic[site].wire) for p in self.phases], at_end)

    @property
    def syncs_at_end(self) -> int:
        """How many syncs the run's last round has beyond the others."""
        return len(synced_again(self.config))

    def added_at_end(self, site: int) -> tuple[int, int]:
        """Payload and wire bytes that the run's last round has beyond the others."""
        again = [self.fragments[fragment][site] for fragment in synced_again(self.config)]
        return sum(t.payload for t in again), sum(t.wire for t in again)

    def _mean(self, counted: list[tuple[int, int]], at_end: int) -> float:
        total = self.syncs_per_round * sum(rounds * number for rounds, number in counted) + at_end
        whole, rest = divmod(total, self.config.rounds)
        return total / self.config.rounds if rest else whole

    def replicas(self, steps: int) -> tuple[Bucket, ...]:
        """Buckets whose holders have equal values after the sync that follows `steps` local steps.

        Copies are equal until they part, also where a sync of theirs crosses no link.
        """
        tied = coupling(self.config, steps) == 1
        buckets = exchanged(self.segment_plan.buckets, self.families if tied else (), 1.0)
        return tuple(bucket for bucket in buckets if bucket.crosses)

    def merged_kind(self, bucket: Bucket) -> str:
        """Where a checkpoint has the merged model's values of a bucket: `param` or `anchor`."""
        stepped = streams(self.config) and takes_outer_step(self.config, bucket)
        return "anchor" if stepped else "param"


def plan_run(config: Config, num_ranks: int = 1) -> RunPlan:
    """Work out who holds what and what it costs.

    Args:
        num_ranks: processes of every site.
    """
    placement = build_placement(config)
    specs = parameter_specs(config)
    plan = build_plan(
        specs,
        config.num_sites,
        rule_of(config, placement),
        lambda spec: fragment_of(config, spec),
    )
    families = build_families(config, plan)
    sites = range(config.num_sites)
    run = RunPlan(
        config=config,
        placement=placement,
        segment_plan=plan,
        families=families,
        phases=_phases(config, plan, families),
        fragments=_fragments(config, plan),
        memory=tuple(site_memory(config, plan, site, families) for site in sites),
        syncs_per_round=config.local_steps if config.sync.average == "gradients" else 1,
    )
    if num_ranks == 1:
        return run
    rows = {spec.name: spec.shape[spec.kind == "expert"] for spec in specs}
    ranks = tuple(_rank_plan(run, rows, rank, num_ranks) for rank in range(num_ranks))
    memory = tuple(sum_memory([own.memory[site] for own in ranks]) for site in sites)
    return replace(
        run,
        ranks=ranks,
        phases=_summed_phases(ranks),
        fragments=tuple(
            _summed(fragment) for fragment in zip(*(own.fragments for own in ranks), strict=True)
        ),
        memory=memory,
    )


def _rank_plan(run: RunPlan, rows: dict[str, int], rank: int, num_ranks: int) -> RunPlan:
    config, whole = run.config, run.segment_plan
    plan = cut_plan(whole, rows, rank, num_ranks)
    in_memory = plan if config.inner.parallel == "fsdp" else whole
    return replace(
        run,
        segment_plan=plan,
        phases=_phases(config, plan, ()),
        fragments=_fragments(config, plan),
        memory=tuple(
            site_memory(config, plan, site, in_memory=in_memory) for site in range(config.num_sites)
        ),
        whole=whole,
    )


def _summed_phases(ranks: tuple[RunPlan, ...]) -> tuple[Phase, ...]:
    """Phases of whole sites, whose bytes are those of their ranks together."""
    return tuple(
        replace(
            phases[0],
            traffic=_summed(tuple(phase.traffic for phase in phases)),
        )
        for phases in zip(*(rank.phases for rank in ranks), strict=True)
    )


def _summed(of_ranks: tuple[tuple[Traffic, ...], ...]) -> tuple[Traffic, ...]:
    """Bytes per site, from those of every rank per site."""
    return tuple(sum_traffic(own) for own in zip(*of_ranks, strict=True))


def _phases(config: Config, plan: Plan, families: tuple[Bucket, ...]) -> tuple[Phase, ...]:
    """In their order; a phase without rounds is among them, for a run that is continued."""
    phases, codec = [], CODECS[config.sync.codec]
    for share, rounds in rounds_by_coupling(config).items():
        buckets = exchanged(plan.buckets, families, share)
        traffic = tuple(
            buckets_traffic(buckets, site, codec=codec) for site in range(config.num_sites)
        )
        phases.append(Phase(coupling=share, rounds=rounds, traffic=traffic))
    return tuple(phases)


def _fragments(config: Config, plan: Plan) -> tuple[tuple[Traffic, ...], ...]:
    codec, found = CODECS[config.sync.codec], []
    for fragment in range(config.sync.fragments):
        own = [bucket for bucket in plan.buckets if bucket.fragment == fragment]
        found.append(
            tuple(buckets_traffic(own, site, codec=codec) for site in range(config.num_sites))
        )
    return tuple(found)


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
    steps = config.rounds * config.local_steps
    return {
        "method": config.method,
        "seed": config.seed,
        "num_sites": config.num_sites,
        "replication_factor": int(replication) if replication.is_integer() else replication,
        "local_steps": config.local_steps,
        "rounds": config.rounds,
        "tokens": steps * sum(config.tokens_per_step),
        "tokens_by_site": [steps * tokens for tokens in config.tokens_per_step],
        "params_total": plan.numel,
        **spread("params_per_site", [plan.numel_at(site) for site in sites]),
        **spread("params_shared_per_site", [plan.numel_at(s, is_expert=False) for s in sites]),
        **spread("params_expert_per_site", [plan.numel_at(s, is_expert=True) for s in sites]),
        **spread("memory_bytes_per_site", [run.memory[site].total for site in sites]),
        **spread("payload_bytes_per_site_per_round", payload),
        **spread("wire_bytes_per_site_per_round", [run.wire_per_round(site) for site in sites]),
        "ratio_vs_ddp": _ratio(diloco * config.local_steps, payload),
        "ratio_vs_diloco": _ratio(diloco, payload),
        **(_of_ranks(run) if run.ranks else {}),
        **({"phases": [_phase_row(run, phase) for phase in run.phases]} if run.families else {}),
        **({"fragments": fragment_rows(run)} if streams(config) else {}),
    }


def _of_ranks(run: RunPlan) -> dict[str, Any]:
    """What is known of sites of several ranks; the memory is that of a site's largest rank."""
    sites = range(run.config.num_sites)
    most = [max(own.memory[site].total for own in run.ranks) for site in sites]
    return {"ranks_per_site": len(run.ranks), **spread("memory_bytes_per_rank", most)}


def _phase_row(run: RunPlan, phase: Phase) -> dict[str, Any]:
    """One phase of a run with copies; bytes are means over sites."""
    sites = len(phase.traffic)
    return {
        "coupling": phase.coupling,
        "rounds": phase.rounds,
        "payload_bytes_per_site_per_round": sum(t.payload for t in phase.traffic) / sites,
        "wire_bytes_per_site_per_round": sum(t.wire for t in phase.traffic) / sites,
    }


def fragment_rows(run: RunPlan) -> list[dict[str, Any]]:
    """Each fragment's layers, the steps of a round between which it is synced, and mean bytes."""
    config, every = run.config, run.config.local_steps // len(run.fragments)
    layers = range(config.model.num_layers)
    return [
        {
            "layers": [layer for layer in layers if fragment_of_layer(config, layer) == fragment],
            "begins_after_step": (fragment + 1) * every - config.sync.overlap_steps,
            "ends_after_step": (fragment + 1) * every,
            "payload_bytes_per_site": sum(t.payload for t in traffic) / len(traffic),
            "wire_bytes_per_site": sum(t.wire for t in traffic) / len(traffic),
        }
        for fragment, traffic in enumerate(run.fragments)
    ]


def memory_by_kind(run: RunPlan) -> list[dict[str, int]]:
    """Bytes of each kind of state, per site."""
    return [asdict(memory) for memory in run.memory]


def spread(name: str, values: list[Any]) -> dict[str, Any]:
    """The mean over sites and the values by site; a whole mean stays an integer."""
    mean = sum(values) / len(values)
    whole = all(isinstance(value, int) for value in values) and mean.is_integer()
    return {name: int(mean) if whole else mean, f"{name}_by_site": values}


def _ratio(baseline: int, payload: list[float]) -> float | None:
    mean = sum(payload) / len(payload)
    return baseline / mean if mean else None
