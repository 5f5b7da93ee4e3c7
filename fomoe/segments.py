"""Segments: slices of parameters, who holds them, and the bytes they cost (no torch).

A segment is a slice along one dimension of a parameter with one holder set. Segments with equal
holders (and equal trainers) form a bucket, which is reduced as one flat vector. The trainer's
counters, `--dry-run` and the simulator all take their bytes from the functions here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from fomoe.placement import Placement, Sites
from fomoe.shapes import ParameterSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """A slice [start, stop) along the first dimension of one parameter.

    Attributes:
        name: the parameter's name, with `[start:stop]` where the slice is not the whole.
        parameter: the parameter's name.
        shape: shape of the slice.
        start, stop: rows of the parameter.
        expert_class: whether it belongs to a routed expert (else to the shared parameters).
        layer, expert: of the routed expert (or of the router row), else None.
        holders: sites that store it and receive its mean, ascending.
        trainers: holders whose updates may count, ascending.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    start: int
    stop: int
    expert_class: bool
    layer: int | None
    expert: int | None
    holders: Sites
    trainers: Sites

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Segments with equal holders, reduced together as one flat vector.

    Attributes:
        index: position in the plan; equal on all sites.
        holders: sites that store every segment of it, ascending.
        trainers: holders whose updates may count, ascending.
        expert_class: whether its bytes count as expert bytes (else shared).
        segments: in the model's order.
    """

    index: int
    holders: Sites
    trainers: Sites
    expert_class: bool
    segments: tuple[Segment, ...]

    @cached_property
    def numel(self) -> int:
        return sum(segment.numel for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All buckets of a model; every element of the model stands in exactly one segment."""

    num_sites: int
    buckets: tuple[Bucket, ...]

    @cached_property
    def numel(self) -> int:
        return sum(bucket.numel for bucket in self.buckets)

    def numel_at(self, site: int, *, expert_class: bool | None = None) -> int:
        """Elements that a site stores, of one class or of both."""
        return sum(
            bucket.numel
            for bucket in self.buckets
            if site in bucket.holders and expert_class in (None, bucket.expert_class)
        )


def build_plan(
    specs: Iterable[ParameterSpec], placement: Placement, *, router_rows: str = "all"
) -> Plan:
    """Cut parameters into segments and put segments with equal holders into buckets.

    Args:
        specs: every parameter of the model.
        placement: holders and trainers of every expert.
        router_rows: `all`: every site's update of a router row counts; `holders`: only those of
            sites that train the row's expert.
    """
    specs = list(specs)
    row_of = {layer: i for i, layer in enumerate(placement.moe_layers)}
    everyone = tuple(range(placement.num_sites))
    grouped: dict[tuple[bool, Sites, Sites], list[Segment]] = {}
    for spec in specs:
        for segment in _cut(spec, placement, row_of, everyone, router_rows):
            key = (segment.expert_class, segment.holders, segment.trainers)
            grouped.setdefault(key, []).append(segment)
    buckets = tuple(
        Bucket(index=i, expert_class=key[0], holders=key[1], trainers=key[2], segments=tuple(group))
        for i, (key, group) in enumerate(sorted(grouped.items(), key=lambda item: item[0]))
    )
    plan = Plan(num_sites=placement.num_sites, buckets=buckets)
    assert plan.numel == sum(spec.numel for spec in specs), "the plan does not cover the model"
    return plan


def _cut(
    spec: ParameterSpec,
    placement: Placement,
    row_of: dict[int, int],
    everyone: Sites,
    router_rows: str,
) -> list[Segment]:
    if spec.expert is not None:
        assert spec.layer is not None
        row = row_of[spec.layer]
        holders = placement.holders[row][spec.expert]
        trainers = placement.trainers[row][spec.expert]
        whole = (spec.name, spec.name, spec.shape, 0, spec.shape[0])
        return [Segment(*whole, True, spec.layer, spec.expert, holders, trainers)]
    if spec.kind == "router" and router_rows == "holders":
        assert spec.layer is not None
        table = placement.trainers[row_of[spec.layer]]
        return [
            Segment(
                f"{spec.name}[{e}:{e + 1}]",
                spec.name,
                (1, *spec.shape[1:]),
                e,
                e + 1,
                False,
                spec.layer,
                e,
                everyone,
                table[e],
            )
            for e in range(spec.shape[0])
        ]
    whole = (spec.name, spec.name, spec.shape, 0, spec.shape[0])
    return [Segment(*whole, False, None, None, everyone, everyone)]


# ------------------------------------------------------------------------------------------ bytes


def chunk_bounds(numel: int, num_parts: int) -> list[int]:
    """Offsets that cut a flat vector into parts whose sizes differ by at most one element."""
    size, rest = divmod(numel, num_parts)
    bounds = [0]
    for part in range(num_parts):
        bounds.append(bounds[-1] + size + (part < rest))
    return bounds


def wire_elements(numel: int, num_holders: int, position: int) -> int:
    """Elements that one holder sends to average `numel` elements over all holders.

    Every holder sends each peer that peer's chunk, sums its own chunk, and sends the sum to every
    peer: 2 (n - 1) / n of the vector, as a ring does (within one element per peer).
    """
    if num_holders == 1:
        return 0
    bounds = chunk_bounds(numel, num_holders)
    own = bounds[position + 1] - bounds[position]
    return (numel - own) + own * (num_holders - 1)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one sync at one site, by class; payload is reduced, wire is sent."""

    payload_shared: int
    payload_expert: int
    wire_shared: int
    wire_expert: int

    @property
    def payload(self) -> int:
        return self.payload_shared + self.payload_expert

    @property
    def wire(self) -> int:
        return self.wire_shared + self.wire_expert


def sync_traffic(plan: Plan, site: int, *, element_bytes: int = 4) -> Traffic:
    """Planned bytes of one sync at one site; a bucket with one holder costs nothing."""
    counts = {"payload_shared": 0, "payload_expert": 0, "wire_shared": 0, "wire_expert": 0}
    for bucket in plan.buckets:
        if site not in bucket.holders or len(bucket.holders) == 1:
            continue
        name = "expert" if bucket.expert_class else "shared"
        position = bucket.holders.index(site)
        elements = wire_elements(bucket.numel, len(bucket.holders), position)
        counts[f"payload_{name}"] += element_bytes * bucket.numel
        counts[f"wire_{name}"] += element_bytes * elements
    return Traffic(**counts)


def full_payload(numel: int, num_sites: int, *, element_bytes: int = 4) -> int:
    """Payload of averaging a whole model once: a DiLoCo round or one DDP step; 0 for one site."""
    return element_bytes * numel if num_sites > 1 else 0
