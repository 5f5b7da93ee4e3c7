"""Weighted means over holders: what a site contributes, and how contributions become one mean.

Every site that stores a segment receives its mean (a holder); how much each adds is its
contribution weight, which may be 0. Nothing here looks across segments: a statistic over several
would differ between holders of the same expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fomoe.segments import Bucket, Plan, Segment

if TYPE_CHECKING:
    from fomoe.sync.transport import Transport


@dataclass(frozen=True)
class Contribution:
    """A bucket's values times weights, and the weights: of one site, or summed over sites.

    Attributes:
        values: fp32 [bucket.numel], each segment's values times its weight.
        weights: fp64 [len(bucket.segments)].
    """

    values: Tensor
    weights: Tensor


def build_contribution(
    bucket: Bucket, weights: list[float], read: Callable[[Segment], Tensor]
) -> Contribution:
    """Fill a fresh flat copy of a bucket with weight x value.

    Args:
        weights: one per segment of the bucket.
        read: the value of a segment, any device; not called for a segment of weight 0, whose
            value may be anything (0 x NaN is NaN).
    """
    values = torch.empty(bucket.numel)
    offset = 0
    for segment, weight in zip(bucket.segments, weights, strict=True):
        part = values[offset : offset + segment.numel]
        offset += segment.numel
        if weight == 0:
            part.zero_()
            continue
        part.copy_(read(segment).reshape(-1))
        if weight != 1:
            part.mul_(weight)
    return Contribution(values, torch.tensor(weights, dtype=torch.float64))


def sum_in_order(contributions: list[Tensor]) -> Tensor:
    """Sum in the given order, one addition at a time: every transport gets the same bits."""
    total = contributions[0].clone()
    for contribution in contributions[1:]:
        total += contribution
    return total


def divide_by_weights(bucket: Bucket, total: Contribution) -> Tensor:
    """Weighted mean of each segment, in place; zero where nobody contributed."""
    offset = 0
    for segment, weight in zip(bucket.segments, total.weights.tolist(), strict=True):
        part = total.values[offset : offset + segment.numel]
        offset += segment.numel
        if weight == 0:
            part.zero_()
        else:
            part.div_(weight)
    return total.values


def mean_over_holders(
    plan: Plan, transport: Transport, contribute: Callable[[Bucket, int], Contribution]
) -> dict[int, Tensor]:
    """Mean of every bucket that a site of this process holds, by bucket index.

    Args:
        contribute: builds the contribution of one of this process's sites to a bucket.
    """
    held = [bucket for bucket in plan.buckets if set(bucket.holders) & set(transport.sites)]
    sums = transport.sum_over_holders(held, contribute)
    return {bucket.index: divide_by_weights(bucket, sums[bucket.index]) for bucket in held}


def split_bucket(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """Views of a flat bucket by segment name, in the segments' shapes."""
    parts = flat.split([segment.numel for segment in bucket.segments])
    return {s.name: part.view(s.shape) for s, part in zip(bucket.segments, parts, strict=True)}
