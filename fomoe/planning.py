"""What a run will store and send, from the config alone (no torch): the planned part of a summary.

`--dry-run` prints it, the trainer writes it into `summary.json` and compares its counters with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
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
from fomoe.shapes import ParameterSpec, parameter_specs
from fomoe.shards import cut_plan, lanes_between


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
        lanes: by number, what is averaged between the same ranks of the sites (`fomoe.shards`); of
            a rank's plan, its own lanes.
        num_ranks: of every site.
        ranks: by site, the plan of every rank of it, in order; none if every site is one process.
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
    lanes: Mapping[int, Plan]
    num_ranks: tuple[int, ...]
    ranks: tuple[tuple[RunPlan, ...], ...] = ()
    whole: Plan | None = None

    def of_site(self, site: int) -> tuple[RunPlan, ...]:
        """The plans of all ranks of a site."""
        return self.ranks[site] if self.ranks else (self,)

    def at_rank(self, site: int, rank: int) -> RunPlan:
        """The plan of one rank: what it averages with ranks of the other sites."""
        return self.of_site(site)[rank]

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


def plan_run(config: Config, num_ranks: int | Sequence[int] = 1) -> RunPlan:
    """Work out who holds what and what it costs.

    Args:
        num_ranks: processes of every site, or of each.
    """
    counts = ranks_by_site(config, num_ranks)
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
        lanes={0: plan},
        num_ranks=counts,
    )
    return run if set(counts) == {1} else _of_ranks(run, _rows(specs))


def ranks_by_site(config: Config, num_ranks: int | Sequence[int]) -> tuple[int, ...]:
    """How many ranks each site has."""
    counts = (num_ranks,) if isinstance(num_ranks, int) else tuple(num_ranks)
    assert len(counts) in (1, config.num_sites)
    return counts * config.num_sites if len(counts) == 1 else counts


def lanes_of(config: Config, num_ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Of each lane between sites of so many ranks, in order, the rank at every site."""
    return lanes_between(_rows(parameter_specs(config)).values(), num_ranks)


def _rows(specs: Iterable[ParameterSpec]) -> dict[str, int]:
    """Rows of each parameter, or of an expert's matrix, by the parameter's name."""
    return {spec.name: spec.shape[spec.kind == "expert"] for spec in specs}


def _of_ranks(run: RunPlan, rows: dict[str, int]) -> RunPlan:
    """The same experiment, trained by the ranks of the sites."""
    config, whole, counts = run.config, run.segment_plan, run.num_ranks
    alike = len(set(counts)) == 1
    lane_ranks = lanes_between(rows.values(), counts)
    lanes = [cut_plan(whole, rows, lane, counts, i) for i, lane in enumerate(lane_ranks)]
    parts = [
        replace(
            run,
            phases=_phases(config, lane, ()),
            fragments=_fragments(config, lane),
            lanes={number: lane},
        )
        for number, lane in enumerate(lanes)
    ]

    @cache
    def all_rows(rank: int, number: int) -> Plan:
        return whole if number == 1 else cut_plan(whole, rows, (rank,), (number,))

    def of_rank(site: int, rank: int) -> RunPlan:
        own = [part for part, ranks in zip(parts, lane_ranks, strict=True) if ranks[site] == rank]
        (plan, *others) = (lane for part in own for lane in part.lanes.values())
        if others:  # all rows of the rank, whichever lane they belong to
            plan = all_rows(rank, counts[site])
        in_memory = plan if config.inner.parallel == "fsdp" else whole
        memory = tuple(
            site_memory(config, plan, index, in_memory=in_memory)
            for index in range(config.num_sites)
        )
        return replace(_together(own), segment_plan=plan, memory=memory, whole=whole)

    sites = range(1 if alike else len(counts))  # equal sites share the plans of their ranks
    ranks = tuple(tuple(of_rank(site, rank) for rank in range(counts[site])) for site in sites)
    ranks = ranks * len(counts) if alike else ranks
    memory = tuple(
        sum_memory([own.memory[site] for own in of_site]) for site, of_site in enumerate(ranks)
    )
    return replace(_together(parts), ranks=ranks, memory=memory)


def _together(parts: Sequence[RunPlan]) -> RunPlan:
    """Several lanes, whose bytes are added up."""
    return replace(
        parts[0],
        phases=tuple(
            replace(phases[0], traffic=_summed([phase.traffic for phase in phases]))
            for phases in zip(*(part.phases for part in parts), strict=True)
        ),
        fragments=tuple(
            _summed(fragment) for fragment in zip(*(part.fragments for part in parts), strict=True)
        ),
        lanes={number: lane for part in parts for number, lane in part.lanes.items()},
    )


def _summed(parts: Sequence[Sequence[Traffic]]) -> tuple[Traffic, ...]:
    """Bytes per site, from those of every lane per site."""
    return tuple(sum_traffic(own) for own in zip(*parts, strict=True))


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
        **(_ranks_summary(run) if run.ranks else {}),
        **({"phases": [_phase_row(run, phase) for phase in run.phases]} if run.families else {}),
        **({"fragments": fragment_rows(run)} if streams(config) else {}),
    }


def _ranks_summary(run: RunPlan) -> dict[str, Any]:
    """What is known of sites of several ranks; the memory is that of a site's largest rank."""
    most = [max(r.memory[site].total for r in own) for site, own in enumerate(run.ranks)]
    return {
        **spread("ranks_per_site", list(run.num_ranks)),
        **spread("memory_bytes_per_rank", most),
    }


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
