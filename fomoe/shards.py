"""Which rows of every segment a rank of a site has (no torch).

Parameters are cut along their rows, the matrix of an expert along its own rows, so that ranks of
equally many have the same rows at every site, whichever experts the site holds. A segment that is
cut at the border of a rank's rows is again a segment, with the same holders; it keeps its name, and
the rows of all ranks, one after the other, are the whole.

Ranks of several sites, one of each, that have rows in common are a lane. They average those rows,
which no other ranks have. Where all sites have equally many ranks, a lane is the ranks of the same
number, and each rank has one; else the rows of a rank may belong to several lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fomoe.segments import Plan, Segment


def rank_rows(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First and last row (exclusive) of a rank; the last ranks may have fewer rows, or none.

    These are the rows that torch's `fully_shard` gives to a rank.
    """
    size = -(-num_rows // num_ranks)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)


def lanes_between(num_rows: Iterable[int], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """The lanes between sites, in the order of their rows: of each, the rank at every site.

    Args:
        num_rows: rows of every parameter, or of an expert's matrix.
        ranks: of every site, how many it has.
    """
    found: set[tuple[int, ...]] = set()
    for rows in set(num_rows):
        sizes = [-(-rows // number) for number in ranks]
        firsts = {first for size in sizes for first in range(0, rows, size)}
        found |= {tuple(first // size for size in sizes) for first in firsts}
    for site, number in enumerate(ranks):
        # A rank without any rows takes part in what the sites agree on.
        for rank in set(range(number)) - {lane[site] for lane in found}:
            found.add(tuple(min(rank, others - 1) for others in ranks))
    return sorted(found)


def common_rows(num_rows: int, lane: Sequence[int], ranks: Sequence[int]) -> tuple[int, int]:
    """First and last row (exclusive) that the ranks of a lane all have; none if they are equal."""
    spans = [rank_rows(num_rows, rank, number) for rank, number in zip(lane, ranks, strict=True)]
    first, stop = max(first for first, _ in spans), min(stop for _, stop in spans)
    return first, max(first, stop)


def cut_segment(segment: Segment, first: int, stop: int) -> Segment | None:
    """The part of a segment in some rows; None if it has none of them.

    Args:
        first, stop: rows of the parameter, or of an expert's matrix.
    """
    if not segment.is_expert:  # rows of the parameter, of which the segment may be a part
        first, stop = max(first - segment.start, 0), min(stop, segment.stop) - segment.start
    if first >= stop:
        return None
    return replace(segment, shape=(stop - first, *segment.shape[1:]), cut=(first, stop))


def cut_plan(
    plan: Plan,
    num_rows: Mapping[str, int],
    lane: Sequence[int],
    ranks: Sequence[int],
    number: int = 0,
) -> Plan:
    """What the ranks of a lane have in common: the same buckets, under the same indices, of its
    rows.

    Args:
        num_rows: rows of each parameter, or of an expert's matrix, by the parameter's name.
        lane: a rank of each of some sites; that of one site has all rows of the rank.
        ranks: how many each of these sites has.
        number: of the lane.
    """
    spans = {rows: common_rows(rows, lane, ranks) for rows in set(num_rows.values())}
    buckets = []
    for bucket in plan.buckets:
        parts = (cut_segment(s, *spans[num_rows[s.parameter]]) for s in bucket.segments)
        if own := tuple(part for part in parts if part is not None):
            assert not bucket.copies, "copies of experts are not cut"
            buckets.append(replace(bucket, segments=own, lane=number))
    return Plan(num_sites=plan.num_sites, buckets=tuple(buckets))
