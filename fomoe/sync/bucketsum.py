"""What one site sends and receives to sum one bucket with its other holders; no network here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fomoe.segments import Bucket, chunk_bounds
from fomoe.sync.aggregate import Contribution, sum_in_order

# A peer, what it is sent, and where what it sends goes.
Message = tuple[int, Tensor, Tensor]


class BucketSum:
    """One bucket on its way: contributions come in by chunks, sums go out by chunks.

    Every holder sums one chunk, in site order, and sends the sum to the others. The own
    contribution's memory takes the sums; until all have come nothing else is touched.

    Attributes:
        wire_bytes: of values, counted as they are handed out to be sent.
    """

    def __init__(self, bucket: Bucket, site: int, own: Contribution) -> None:
        self.bucket, self.contribution, self._site = bucket, own, site
        self.wire_bytes = 0
        bounds = chunk_bounds(bucket.numel, len(bucket.holders))
        parts = zip(bucket.holders, own.values.split(_sizes(bounds)), strict=True)
        self._chunks = dict(parts)
        self._peers = [holder for holder in bucket.holders if holder != site]
        mine = self._chunks[site]
        self._values = {peer: torch.empty_like(mine) for peer in self._peers}
        self._weights = {peer: torch.empty_like(own.weights) for peer in self._peers}

    def parts(self) -> Iterator[Message]:
        """Values that each peer sums, and the weights."""
        for peer in self._peers:
            self.wire_bytes += self._chunks[peer].nbytes
            yield peer, self._chunks[peer], self._values[peer]
            yield peer, self.contribution.weights, self._weights[peer]

    def add(self) -> None:
        """Sum the own chunk."""
        mine = self._chunks[self._site]
        self._values[self._site] = mine
        mine.copy_(sum_in_order([self._values[holder] for holder in self.bucket.holders]))
        self._values.clear()

    def totals(self) -> Iterator[Message]:
        """The own chunk's sum, for those of the others."""
        mine = self._chunks[self._site]
        for peer in self._peers:
            self.wire_bytes += mine.nbytes
            yield peer, mine, self._chunks[peer]

    def total(self) -> Contribution:
        weights = {**self._weights, self._site: self.contribution.weights}
        ordered = [weights[holder] for holder in self.bucket.holders]
        return Contribution(self.contribution.values, sum_in_order(ordered))


def _sizes(bounds: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(bounds)]
