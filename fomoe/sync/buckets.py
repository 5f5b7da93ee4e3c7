"""The arithmetic of buckets: what a site contributes, weighted sums of chunks, and means.

Every site that stores a segment receives its mean (a holder); how much each adds is its
contribution weight, which may be 0. Every segment is averaged by itself: a statistic over several
would differ between holders of the same expert. Nothing here uses a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def parts(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Views of the chunk's values by segment: its index in the bucket, and its elements."""
        for index, low, high, _ in _overlaps(self.bucket, self.start, self.stop):
            yield index, flat[low - self.start : high - self.start]


def _overlaps(bucket: Bucket, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each segment in the elements [start, stop): index, its part of them, its first element."""
    first = 0
    for index, segment in enumerate(bucket.segments):
        low, high = max(start, first), min(stop, first + segment.numel)
        if low < high:
            yield index, low, high, first
        first += segment.numel


def chunks_of(bucket: Bucket) -> list[Chunk]:
    """One chunk for each holder, in the holders' order."""
    bounds = chunk_bounds(bucket.numel, len(bucket.holders))
    ends = zip(bucket.holders, bounds, bounds[1:], strict=False)
    return [Chunk(bucket, owner, start, stop) for owner, start, stop in ends]


class Contribution:
    """One site's share of a bucket's sums: the values of each segment, and its weight.

    Args:
        bucket: the bucket.
        weights: one per segment.
        read: returns a segment's values; it is not called for a segment of weight 0, whose values
            may be anything (0 x NaN is NaN).
        less: what is taken from them, read in the same way; None: nothing.

    Attributes:
        weights: fp64 [len(bucket.segments)].
    """

    def __init__(
        self, bucket: Bucket, weights: list[float], read: Read, less: Read | None = None
    ) -> None:
        self._bucket, self._read, self._less = bucket, read, less
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def values(self, start: int, stop: int) -> Tensor:
        """A fresh fp32 copy of the elements [start, stop) of the bucket; 0 where the weight is."""
        out, weights = torch.empty(stop - start), self.weights.tolist()
        for index, low, high, first in _overlaps(self._bucket, start, stop):
            part = out[low - start : high - start]
            place = self._bucket.segments[index], low - first, high - first
            if weights[index] == 0:
                part.zero_()
            elif self._less is None:
                part.copy_(self._read(*place))
            else:
                torch.sub(self._read(*place), self._less(*place), out=part)
        return out

    def staged(self) -> Contribution:
        """The same values, read now: what they are read from may change."""
        flat = self.values(0, self._bucket.numel)
        firsts, first = {}, 0
        for segment in self._bucket.segments:
            firsts[segment.name] = first
            first += segment.numel

        def read(segment: Segment, start: int, stop: int) -> Tensor:
            return flat[firsts[segment.name] + start : firsts[segment.name] + stop]

        return Contribution(self._bucket, self.weights.tolist(), read)


def weigh(chunk: Chunk, values: Tensor, weights: Tensor) -> Tensor:
    """Weight x value of a site's share of a chunk, in place; weights are those of the segments."""
    each = weights.tolist()
    if any(weight not in (0, 1) for weight in each):  # where the weight is 0, the values are
        for index, part in chunk.parts(values):
            part.mul_(each[index])
    return values


def reduce_chunk(contributions: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Sum in the given order, one addition at a time: every transport gets the same bits.

    Args:
        out: where the sum is written; None: to new memory.
    """
    first, *others = contributions
    out = torch.empty_like(first) if out is None else out
    if not others:
        return out.copy_(first)
    torch.add(first, others[0], out=out)
    for contribution in others[1:]:
        out += contribution
    return out


def divide_by_weights(chunk: Chunk, values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each segment, in place; zero where no site contributed.

    Args:
        values: sums of weight x value, [chunk.numel].
        weights: sums of the weights, [len(chunk.bucket.segments)].
    """
    each = weights.tolist()
    for index, part in chunk.parts(values):
        if each[index] == 0:
            part.zero_()
        else:
            part.div_(each[index])
    return values


def split_bucket(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """Views of a flat bucket by segment name, in the segments' shapes."""
    parts = flat.split([segment.numel for segment in bucket.segments])
    return {s.name: part.view(s.shape) for s, part in zip(bucket.segments, parts, strict=True)}
