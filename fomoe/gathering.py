"""Rows that the ranks of a site have, put together again.

Shards of other sites never come here: a rank exchanges its own rows with the ranks that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fomoe.planning import RunPlan
from fomoe.ranks import Ranks
from fomoe.segments import Segment
from fomoe.site import Site


def gather_whole(
    ranks: Ranks, segments: Sequence[Sequence[Segment]], read: Callable[[Segment], Tensor]
) -> dict[str, Tensor]:
    """Whole segments by name, fp32, at every rank of the site.

    Args:
        segments: by rank, the rows that it has of each.
        read: this rank's rows of a segment.
    """
    parts: dict[str, list[Tensor]] = {}
    for own, flat in zip(segments, _spread(ranks, segments, read), strict=True):
        for segment, rows in zip(own, flat.split([s.numel for s in own]), strict=True):
            parts.setdefault(segment.name, []).append(rows.view(segment.shape))
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in parts.items()}


def gather_rows(site: Site, plan: RunPlan) -> None:
    """After a sync: take from every rank of a site the rows that it has exchanged.

    With shards there is nothing to take. The largest message is a bucket's rows of one rank.

    Args:
        plan: that of whole sites.
    """
    ranks = site.ranks
    if ranks.shards or ranks.size == 1:
        return
    of_site = plan.of_site(site.site)
    for index in {bucket.index for rank in of_site for bucket in rank.segment_plan.buckets}:
        segments = [
            [
                segment
                for bucket in rank.segment_plan.buckets
                if bucket.index == index and site.site in bucket.holders and bucket.trainers
                for segment in bucket.segments
            ]
            for rank in of_site
        ]
        for other, flat in enumerate(_spread(ranks, segments, site.view)):
            if other != ranks.rank:
                sizes = [segment.numel for segment in segments[other]]
                for segment, rows in zip(segments[other], flat.split(sizes), strict=True):
                    site.view(segment).copy_(rows.view(segment.shape))


def _spread(
    ranks: Ranks, segments: Sequence[Sequence[Segment]], read: Callable[[Segment], Tensor]
) -> list[Tensor]:
    own = [read(segment).reshape(-1).float() for segment in segments[ranks.rank]]
    sizes = [sum(segment.numel for segment in of_rank) for of_rank in segments]
    return ranks.spread(torch.cat(own) if own else torch.empty(0), sizes)
