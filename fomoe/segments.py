"""Segments: slices of parameters, who holds them, who contributes, and what they cost (no torch).

A rule cuts every parameter into pieces with a holder set each. Segments with equal holders (and
equal trainers) form a bucket, which is reduced as one flat vector. The trainer's counters,
`--dry-run` and the simulator all take their bytes from the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from fomoe.adapters.shapes import rank_ranges
from fomoe.codecs import FP32, Codec
from fomoe.config import Config
from fomoe.kinds import Sites
from fomoe.placement import Placement
from fomoe.shapes import ParameterSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rule decides for the rows [start, stop) of a parameter.

    Attributes:
        holders: sites that store them, ascending.
        trainers: holders whose updates may count; none if the rows are frozen.
        expert: the routed expert that they belong to, or None.
        first: row at which the holders' own part of the parameter begins.
    """

    start: int
    stop: int
    holders: Sites
    trainers: Sites
    expert: int | None = None
    first: int = 0


Rule = Callable[[ParameterSpec], list[Piece]]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of one parameter with one holder set; `Site.view` finds them in memory.

    Attributes:
        name: a routed expert's own name; otherwise the parameter's name, followed by
            `[start:stop]` if the rows are only a part of it.
        parameter: the parameter's name.
        shape: shape of the rows; for a routed expert, of its matrix without the stack's dimension.
        start, stop: rows of the parameter.
        is_expert: whether the rows are a routed expert (else they are shared).
        layer: of the parameter; None outside the layers.
        expert: the routed expert (or that of the router row); otherwise None.
        holders: sites that store it and receive its mean, ascending.
        trainers: holders whose updates may count, ascending.
        row: the first of the rows in the memory of a holder, which may have only a part of them.
        cut: the rows of the segment that this rank of a site has (`fomoe.shards`), counted from the
            segment's own first row (an expert's: from its matrix's); `shape` is theirs. None: all.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    start: int
    stop: int
    is_expert: bool
    layer: int | None
    expert: int | None
    holders: Sites
    trainers: Sites
    row: int
    cut: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Segments of one fragment with equal holders, reduced together as one flat vector.

    Attributes:
        index: position in the plan; equal on all sites.
        holders: sites that store every segment of it, ascending.
        trainers: holders whose updates may count, ascending.
        is_expert: whether its segments are routed experts; its bytes are counted accordingly.
        segments: in the model's order.
        fragment: the part of the model that they are synced with (`fomoe.fragments`).
        copies: of a family of experts' copies (`fomoe.copies`), the bucket of each set.
        lane: the ranks of the sites that average it (`fomoe.shards`).
    """

    index: int
    holders: Sites
    trainers: Sites
    is_expert: bool
    segments: tuple[Segment, ...]
    fragment: int = 0
    copies: tuple[Bucket, ...] = ()
    lane: int = 0

    @cached_property
    def numel(self) -> int:
        return sum(segment.numel for segment in self.segments)

    @property
    def crosses(self) -> bool:
        """Whether it costs traffic: it has several holders and is not frozen."""
        return len(self.holders) > 1 and bool(self.trainers)

    def at(self, site: int) -> Bucket:
        """What a holder stores for it, in the same order: of a family, its own copies."""
        return next((copy for copy in self.copies if site in copy.holders), self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All buckets of a model; every element of the model belongs to exactly one segment."""

    num_sites: int
    buckets: tuple[Bucket, ...]

    @cached_property
    def numel(self) -> int:
        return sum(bucket.numel for bucket in self.buckets)

    def numel_at(self, site: int, *, is_expert: bool | None = None) -> int:
        """Elements that a site stores, of one class or of both."""
        return sum(
            bucket.numel
            for bucket in self.buckets
            if site in bucket.holders and is_expert in (None, bucket.is_expert)
        )

    def segments_at(self, site: int) -> list[Segment]:
        """Segments that a site stores, bucket by bucket."""
        return [s for bucket in self.buckets if site in bucket.holders for s in bucket.segments]


def build_plan(
    specs: Iterable[ParameterSpec],
    num_sites: int,
    rule: Rule,
    fragment_of: Callable[[ParameterSpec], int] = lambda spec: 0,
) -> Plan:
    """Cut parameters into segments; those of a fragment with equal holders are a bucket.

    Args:
        specs: every parameter of the model.
        num_sites: number of sites, K.
        rule: returns the pieces of a parameter, in the order of their rows.
        fragment_of: the fragment that a parameter belongs to.
    """
    grouped: dict[tuple[int, bool, Sites, Sites], list[Segment]] = {}
    for spec in specs:
        pieces = rule(spec)
        edges = [0, *(piece.stop for piece in pieces)]
        assert edges[-1] == spec.shape[0], f"the pieces of {spec.name} do not cover it"
        assert edges[:-1] == [p.start for p in pieces], f"the pieces of {spec.name} have gaps"
        for piece in pieces:
            segment = _segment(spec, piece)
            key = (fragment_of(spec), segment.is_expert, segment.holders, segment.trainers)
            grouped.setdefault(key, []).append(segment)
    buckets = tuple(
        Bucket(
            index=index,
            fragment=fragment,
            is_expert=is_expert,
            holders=holders,
            trainers=trainers,
            segments=tuple(group),
        )
        for index, ((fragment, is_expert, holders, trainers), group) in enumerate(
            sorted(grouped.items(), key=lambda item: item[0])
        )
    )
    return Plan(num_sites=num_sites, buckets=buckets)


def _segment(spec: ParameterSpec, piece: Piece) -> Segment:
    is_expert = spec.kind == "expert"
    rows = (piece.start, piece.stop)
    if is_expert:
        assert rows == (piece.expert, piece.start + 1), "an expert is a segment of one row"
        name, shape = spec.row_name(piece.start), spec.shape[1:]
    else:
        whole = rows == (0, spec.shape[0])
        name = spec.name if whole else f"{spec.name}[{piece.start}:{piece.stop}]"
        shape = (piece.stop - piece.start, *spec.shape[1:])
    return Segment(
        name=name,
        parameter=spec.name,
        shape=shape,
        start=piece.start,
        stop=piece.stop,
        is_expert=is_expert,
        layer=spec.layer,
        expert=piece.expert,
        holders=piece.holders,
        trainers=piece.trainers,
        row=piece.start - piece.first,
    )


def rule_of(config: Config, placement: Placement) -> Rule:
    """The rule that the config asks for; this is the only place that chooses one."""
    if config.adapters.base is not None:
        return adapter_rule(config.adapters.ranks)
    return placement_rule(placement, router_rows=config.sync.router_rows)


def placement_rule(placement: Placement, *, router_rows: str = "all") -> Rule:
    """Experts are held by the placement, everything else by all sites.

    The router rows of a set of copies are held by the sites of the set.

    Args:
        placement: holders and trainers of every expert.
        router_rows: `all`: every site's update of a router row counts; `holders`: only those of
            sites that train the row's expert.
    """
    everyone = tuple(range(placement.num_sites))
    index_of = {layer: index for index, layer in enumerate(placement.moe_layers)}

    def rule(spec: ParameterSpec) -> list[Piece]:
        rows = range(spec.shape[0])
        size = max(spec.shape[0] // placement.num_sets, 1)  # experts of a set
        if spec.kind == "expert":
            assert spec.layer is not None
            holders = placement.holders[index_of[spec.layer]]
            trainers = placement.trainers[index_of[spec.layer]]
            return [Piece(e, e + 1, holders[e], trainers[e], e, e - e % size) for e in rows]
        if spec.kind == "router" and placement.num_sets > 1:
            assert spec.layer is not None
            holders = placement.holders[index_of[spec.layer]]
            return [Piece(e, e + size, holders[e], holders[e], None, e) for e in rows[::size]]
        if spec.kind == "router" and router_rows == "holders":
            assert spec.layer is not None
            trainers = placement.trainers[index_of[spec.layer]]
            return [Piece(e, e + 1, everyone, trainers[e], e) for e in rows]
        return [Piece(0, spec.shape[0], everyone, everyone)]

    return rule


def adapter_rule(ranks: tuple[int, ...]) -> Rule:
    """Rows of adapters are cut at the distinct ranks; a range is held by who has all of it.

    Args:
        ranks: rank of every client.
    """

    def rule(spec: ParameterSpec) -> list[Piece]:
        return [Piece(start, stop, own, own) for start, stop, own in rank_ranges(ranks)]

    return rule


# ----------------------------------------------------------------------------------- contributions


@dataclass(frozen=True)
class RoundCounts:
    """What a site executed since the last sync.

    Attributes:
        tokens: tokens trained on.
        executed: assignments executed per (layer, expert).
    """

    tokens: int
    executed: Mapping[tuple[int, int], int]


def contribution_weight(segment: Segment, site: int, *, rule: str, counts: RoundCounts) -> float:
    """How much a site adds to a segment's mean.

    Args:
        rule: `presence`: 1, or 0 for an expert that executed no token; `tokens`: the tokens (for
            an expert, the assignments) executed; `uniform`: 1.
    """
    if site not in segment.trainers:
        return 0.0
    if rule == "uniform":
        return 1.0
    executed = counts.tokens
    if segment.is_expert:
        assert segment.layer is not None
        assert segment.expert is not None
        executed = counts.executed.get((segment.layer, segment.expert), 0)
    return float(executed) if rule == "tokens" else float(executed > 0)


def trains(bucket: Bucket, site: int) -> bool:
    """Whether a site computes gradients for a bucket it holds.

    Only whole buckets of experts can be frozen at some sites: a router matrix is one parameter,
    even where only some sites' updates of a row count.
    """
    return site in bucket.trainers or bool(bucket.trainers and not bucket.is_expert)


def takes_outer_step(config: Config, bucket: Bucket) -> bool:
    """Whether the outer optimizer steps a bucket; if not, it needs no anchor."""
    if config.sync.average == "gradients" or not bucket.trainers:
        return False
    return len(bucket.holders) > 1 or config.sync.single_holder == "outer"


# ------------------------------------------------------------------------------------------ bytes


def chunk_bounds(numel: int, num_parts: int) -> list[int]:
    """Offsets that cut a flat vector into parts whose sizes differ by at most one element."""
    size, rest = divmod(numel, num_parts)
    bounds = [0]
    for part in range(num_parts):
        bounds.append(bounds[-1] + size + (part < rest))
    return bounds


def holder_bytes(
    numel: Any, num_holders: int, position: Any, codec: Codec = FP32
) -> tuple[Any, Any]:
    """Payload and wire bytes of one holder that averages `numel` elements over all holders.

    Every holder sends each peer that peer's chunk, averages its own chunk, and sends the mean to
    every peer: 2 (n - 1) / n of the vector, as a ring does (within one element per peer).

    Args:
        numel, position: of the bucket, and of the site among its holders; integers or arrays.
    """
    size, rest = numel // num_holders, numel % num_holders
    larger, smaller = codec.num_bytes(size + 1), codec.num_bytes(size)
    payload = rest * larger + (num_holders - rest) * smaller
    own = codec.num_bytes(size + (position < rest))
    return payload + 0 * own, payload - own + own * (num_holders - 1)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one sync at one site, by class, as encoded; payload is reduced, wire is sent."""

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


def sync_traffic(plan: Plan, site: int, *, codec: Codec = FP32) -> Traffic:
    """Planned bytes of one sync of all buckets at one site."""
    return buckets_traffic(plan.buckets, site, codec=codec)


def buckets_traffic(buckets: Iterable[Bucket], site: int, *, codec: Codec = FP32) -> Traffic:
    """Planned bytes of reducing some buckets; one that no peer needs costs nothing."""
    counts = {"payload_shared": 0, "payload_expert": 0, "wire_shared": 0, "wire_expert": 0}
    for bucket in buckets:
        if site not in bucket.holders or not bucket.crosses:
            continue
        name = "expert" if bucket.is_expert else "shared"
        position = bucket.holders.index(site)
        payload, wire = holder_bytes(bucket.numel, len(bucket.holders), position, codec)
        counts[f"payload_{name}"] += payload
        counts[f"wire_{name}"] += wire
    return Traffic(**counts)


def sum_traffic(parts: Iterable[Traffic]) -> Traffic:
    """Bytes of several ranks of a site together."""
    rows = [asdict(part) for part in parts]
    return Traffic(**{name: sum(row[name] for row in rows) for name in rows[0]})


def full_payload(numel: int, num_sites: int) -> int:
    """Payload of averaging a whole fp32 model once, as DiLoCo and DDP do; 0 for one site."""
    return FP32.num_bytes(numel) if num_sites > 1 else 0
