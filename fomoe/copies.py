"""Copies of experts: what a site's model is, and how far a sync ties the copies (no torch).

With `placement.kind: copies` the experts form sets, and a site holds one set. Its model is an
ordinary one of so many experts: it stores, computes and routes as a model of one set does.
Experts at equal positions of the sets, and their router rows, are a family: they start equal and
take equal outer steps until they part. Then a copy's pseudo-gradient is (1 - c) x the mean over its
own holders + c x the mean over all sites, with c = `placement.couple`.
"""

from __future__ import annotations

from dataclasses import replace

from fomoe.config import Config
from fomoe.kinds import CopiesPlacement, CyclicPlacement
from fomoe.segments import Bucket, Plan


def num_sets(config: Config) -> int:
    """Sets of experts of which the merged model chooses one by the text; 1 without copies."""
    return config.placement.num_sets(config.num_sites)


def set_size(config: Config) -> int:
    """Experts of a layer in one set; all of them without copies."""
    return config.model.num_experts // num_sets(config)


def set_of_site(config: Config, site: int) -> int:
    """The set of experts that a site holds; 0 without copies."""
    return site * num_sets(config) // config.num_sites


def site_config(config: Config) -> Config:
    """The experiment as one site's model sees it: with copies, there is only the site's own set."""
    if num_sets(config) == 1:
        return config
    model = config.model.model_copy(update={"num_experts": set_size(config)})
    everywhere = CyclicPlacement(replication_factor=config.num_sites)
    return config.model_copy(update={"model": model, "placement": everywhere})


def coupling(config: Config, steps: int) -> float:
    """How far families are tied in the sync after `steps` local steps: 1 is wholly.

    The copies part after the share `placement.grow_at` of the learning rate's schedule.
    """
    kind = config.placement
    if not isinstance(kind, CopiesPlacement) or steps <= kind.grow_at * config.schedule_horizon:
        return 1.0
    return kind.couple


def rounds_by_coupling(config: Config) -> dict[float, int]:
    """How many rounds of the run have which coupling, in their order; a number may be 0."""
    kind = config.placement
    if not isinstance(kind, CopiesPlacement) or kind.couple == 1:
        return {1.0: config.rounds}
    steps = kind.grow_at * config.schedule_horizon
    tied = min(config.rounds, int(steps // config.local_steps))
    return {1.0: tied, kind.couple: config.rounds - tied}


def build_families(config: Config, plan: Plan) -> tuple[Bucket, ...]:
    """The buckets of families, after those of the plan: every site contributes its own copies.

    Their segments have the names of the first set's copies. There are none without copies.
    """
    if num_sets(config) == 1:
        return ()
    everyone = tuple(range(config.num_sites))
    families: list[Bucket] = []
    for is_expert in (False, True):
        copies = tuple(
            b for b in plan.buckets if b.is_expert == is_expert and b.holders != everyone
        )
        if copies:
            assert len(copies) == num_sets(config)
            index = len(plan.buckets) + len(families)
            first = replace(copies[0], index=index, holders=everyone, trainers=everyone)
            families.append(replace(first, copies=copies))
    return tuple(families)


def exchanged(
    buckets: tuple[Bucket, ...], families: tuple[Bucket, ...], coupling: float
) -> tuple[Bucket, ...]:
    """The buckets that a sync averages, of the plan's `buckets` and of its families.

    While c is 1, the mean over a copy's own holders is not needed; if it is 0, that of the family.
    """
    if not families:
        return buckets
    copies = {copy.index for family in families for copy in family.copies}
    kept = tuple(b for b in buckets if coupling < 1 or b.index not in copies)
    return kept + (families if coupling > 0 else ())
