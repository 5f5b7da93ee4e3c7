"""Copies of experts: which are copies of one another, and how far a sync ties them (no torch).

With `placement.kind: copies` the experts form sets; a site holds one set and routes within it.
Experts at equal positions of the sets are a family: they start equal and take equal outer steps
until they part. Then a copy's pseudo-gradient is (1 - c) x the mean over its own holders + c x the
mean over the holders of the whole family, with c = `placement.couple`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fomoe.config import Config
from fomoe.kinds import CopiesPlacement
from fomoe.segments import Bucket, Plan


@dataclass(frozen=True, kw_only=True)
class Families:
    """The buckets of families, and those of their members.

    Attributes:
        bucket: one segment per family and matrix, under the name of the first set's copy; all sites
            contribute their own copy.
        experts: for each set, the bucket of its experts; segments are in the order of `bucket`.
        router: for each set, the bucket of its router rows.
    """

    bucket: Bucket
    experts: tuple[Bucket, ...]
    router: tuple[Bucket, ...]

    def set_of(self, site: int) -> int:
        """The set that a site holds."""
        return next(i for i, own in enumerate(self.experts) if site in own.holders)

    def exchanged(self, buckets: tuple[Bucket, ...], coupling: float) -> list[Bucket]:
        """The buckets that are reduced in a sync, of all those given.

        Args:
            coupling: c; while it is 1, a copy's own mean is not needed.
        """
        own = {bucket.index for bucket in self.experts}
        kept = [b for b in buckets if coupling < 1 or b.index not in own]
        return kept + ([self.bucket] if coupling > 0 else [])


def num_families(config: Config) -> int:
    """Experts of a layer that start with different values; all of them without copies."""
    kind, experts = config.placement, config.model.num_experts
    if isinstance(kind, CopiesPlacement):
        return experts // kind.num_sets(config.num_sites)
    return experts


def num_sets(config: Config) -> int:
    """Sets of experts of which the merged model chooses one by the text; 1 without copies."""
    return config.model.num_experts // num_families(config)


def set_of_site(config: Config, site: int) -> int:
    """The set of experts that a site holds; 0 without copies."""
    return site * num_sets(config) // config.num_sites


def coupling(config: Config, steps: int) -> float:
    """How far families are tied in the sync after `steps` local steps: 1 is wholly.

    The copies part after the share `placement.grow_at` of the learning rate's schedule.
    """
    kind = config.placement
    if not isinstance(kind, CopiesPlacement) or steps <= kind.grow_at * config.schedule_horizon:
        return 1.0
    return kind.couple


def build_families(config: Config, plan: Plan) -> Families | None:
    """The families of a plan's experts; None if no expert has a copy elsewhere."""
    if num_sets(config) == 1 or not config.model.moe_layers:
        return None
    everyone = tuple(range(config.num_sites))
    experts = tuple(bucket for bucket in plan.buckets if bucket.is_expert)
    router = tuple(b for b in plan.buckets if not b.is_expert and b.trainers != everyone)
    assert len(experts) == len(router) == num_sets(config)
    segments = tuple(replace(s, holders=everyone, trainers=everyone) for s in experts[0].segments)
    bucket = replace(
        experts[0],
        index=len(plan.buckets),
        holders=everyone,
        trainers=everyone,
        segments=segments,
    )
    return Families(bucket=bucket, experts=experts, router=router)
