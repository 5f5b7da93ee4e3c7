"""Which rows of every segment a rank of a site has (no torch).

Parameters are cut along their rows, the matrix of an expert along its own rows, so that a rank has
the same rows at every site, whichever experts the site holds. A segment that is cut at the border
of a rank's rows is again a segment, with the same holders; it keeps its name, and the rows of all
ranks, one after the other, are the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fomoe.segments import Bucket, Plan, Segment


def rank_rows(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First and last row (exclusive) of a rank; the last ranks may have fewer rows, or none.

    These are the rows that torch's `fully_shard` gives to a rank.
    """
    size = -(-num_rows // num_ranks)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)


def cut_segment(segment: Segment, num_rows: int, rank: int, num_ranks: int) -> Segment | None:
    """The part of a segment that a rank has; None if it has none of its rows.

    Args:
        num_rows: rows of the parameter, or of an expert's matrix.
    """
    first, stop = rank_rows(num_rows, rank, num_ranks)
    if not segment.is_expert:  # rows of the parameter, of which the segment may be a part
        first, stop = max(first - segment.start, 0), min(stop, segment.stop) - segment.start
    if first >= stop:
        return None
    return replace(segment, shape=(stop - first, *segment.shape[1:]), cut=(first, stop))


def cut_plan(plan: Plan, num_rows: Mapping[str, int], rank: int, num_ranks: int) -> Plan:
    """What a rank of every site has: the same buckets, under the same indices, of its rows.

    Args:
        num_rows: rows of each parameter, or of an expert's matrix, by the parameter's name.
    """
    buckets = []
    for bucket in plan.buckets:
        parts = (cut_segment(s, num_rows[s.parameter], rank, num_ranks) for s in bucket.segments)
        if own := tuple(part for part in parts if part is not None):
            buckets.append(_with_segments(bucket, own))
    return Plan(num_sites=plan.num_sites, buckets=tuple(buckets))


def _with_segments(bucket: Bucket, segments: tuple[Segment, ...]) -> Bucket:
    assert not bucket.copies, "copies of experts are not cut"
    return replace(bucket, segments=segments)
