"""The arithmetic of buckets: what a site contributes, sums of chunks, and means.

Every site that stores a segment receives its mean (a holder); how much each adds is its
contribution weight, which may be 0. Every segment is averaged by itself: a statistic over several
would differ between holders of the same expert. Nothing here uses a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.segments import Bucket, Segment, chunk_bounds

# Elements [start, stop) of a flattened segment, as a site stores them, on any device.
Read = Callable[[Segment, int, int], Tensor]


@dataclass(frozen=True)
class Chunk:
    """Elements [start, stop) of a flattened bucket; the owner is the holder that sums them."""

    bucket: Bucket
    owner: int
    start: int
    stop: int


def chunks_of(bucket: Bucket) -> list[Chunk]:
    """One chunk for each holder, in the holders' order."""
    bounds = chunk_bounds(bucket.numel, len(bucket.holders))
    ends = zip(bucket.holders, bounds, bounds[1:], strict=False)
    return [Chunk(bucket, owner, start, stop) for owner, start, stop in ends]


class Contribution:
    """One site's share of a bucket's sums: each segment's values times its weight.

    Args:
        bucket: the bucket.
        weights: one per segment.
        read: returns a segment's values; it is not called for a segment of weight 0, whose values
            may be anything (0 x NaN is NaN).

    Attributes:
        weights: fp64 [len(bucket.segments)].
    """

    def __init__(self, bucket: Bucket, weights: list[float], read: Read) -> None:
        self._bucket, self._read = bucket, read
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def values(self, start: int, stop: int) -> Tensor:
        """A fresh fp32 copy of weight x value for the elements [start, stop) of the bucket."""
        out = torch.empty(stop - start)
        first = 0  # of the segment, in the bucket
        for segment, weight in zip(self._bucket.segments, self.weights.tolist(), strict=True):
            low, high = max(start, first), min(stop, first + segment.numel)
            if low < high:
                part = out[low - start : high - start]
                if weight == 0:
                    part.zero_()
                else:
                    part.copy_(self._read(segment, low - first, high - first))
                    if weight != 1:
                        part.mul_(weight)
            first += segment.numel
        return out


def reduce_chunk(contributions: list[Tensor]) -> Tensor:
    """Sum in the given order, one addition at a time: every transport gets the same bits."""
    total = contributions[0].clone()
    for contribution in contributions[1:]:
        total += contribution
    return total


def divide_by_weights(bucket: Bucket, values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each segment, in place; zero where no site contributed.

    Args:
        values: sums of weight x value, [bucket.numel].
        weights: sums of the weights, [len(bucket.segments)].
    """
    parts = values.split([segment.numel for segment in bucket.segments])
    for part, weight in zip(parts, weights.tolist(), strict=True):
        if weight == 0:
            part.zero_()
        else:
            part.div_(weight)
    return values


def split_bucket(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """Views of a flat bucket by segment name, in the segments' shapes."""
    parts = flat.split([segment.numel for segment in bucket.segments])
    return {s.name: part.view(s.shape) for s, part in zip(bucket.segments, parts, strict=True)}
