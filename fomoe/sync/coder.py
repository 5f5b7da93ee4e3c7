"""Error feedback: what a codec leaves out of one sync is added to the next.

A site keeps one fp32 vector for each bucket that it shares. In the chunk that it owns, the vector
is what the means lacked that it sent; elsewhere, what its own contributions lacked. So the means of
many syncs together lack no more than one of them. What a site contributes to its own chunk crosses
no link and is not encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from fomoe.codecs import FP32, Codec
from fomoe.segments import Bucket
from fomoe.state import Layout, entry
from fomoe.sync.buckets import Chunk
from fomoe.sync.codec import decode, encode


class Coder:
    """Encodes chunks for the sites of a process; errors are kept when the sync is committed.

    Args:
        codec: of what crosses.
        buckets: that some sync encodes, at any site; none if the codec loses nothing.
        sites: the sites of this process.
    """

    def __init__(
        self, codec: Codec = FP32, buckets: Iterable[Bucket] = (), sites: Collection[int] = ()
    ) -> None:
        self.codec = codec
        self._kept = {
            (site, bucket.index): torch.zeros(bucket.numel)
            for bucket in buckets
            for site in bucket.holders
            if site in sites
        }
        self._staged: dict[tuple[int, int], Tensor] = {}

    def form(self, chunk: Chunk, *, encoded: bool) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a chunk's message."""
        if encoded and self.codec.lossy:
            return (self.codec.num_bytes(chunk.numel),), torch.uint8
        return (chunk.numel,), torch.float32

    def encode(self, chunk: Chunk, site: int, values: Tensor, weights: Tensor) -> Tensor:
        """Encode a site's values, with what it left out before; a new error is staged.

        Args:
            values: fp32 [chunk.numel]; 0 where the weight is 0.
            weights: [len(chunk.bucket.segments)]. Where it is 0 nothing is sent, and what was left
                out is kept for later.
        """
        if not self.codec.lossy:
            return values
        key, part = (site, chunk.bucket.index), slice(chunk.start, chunk.stop)
        kept = self._kept[key][part]
        if key not in self._staged:
            self._staged[key] = torch.empty_like(self._kept[key])
        left = torch.add(values, kept, out=self._staged[key][part])
        idle = {index for index, weight in enumerate(weights.tolist()) if weight == 0}
        for own in _of(chunk, idle, left):
            own.zero_()
        encoded = encode(left, self.codec)
        left -= self.decode(chunk, encoded)
        for own, before in zip(_of(chunk, idle, left), _of(chunk, idle, kept), strict=True):
            own.copy_(before)
        return encoded

    def decode(self, chunk: Chunk, encoded: Tensor) -> Tensor:
        """The fp32 values of an encoded chunk."""
        return decode(encoded, chunk.numel, self.codec)

    def discard(self) -> None:
        """Forget the errors of a sync that failed."""
        self._staged.clear()

    def commit(self) -> None:
        """Keep the errors of the sync that is committed."""
        self._kept |= self._staged
        self._staged.clear()

    # -------------------------------------------------------------------------------- checkpoint

    def state_of(self, site: int) -> dict[str, Tensor]:
        """What one site has left out, by entry."""
        return {entry("residual", i): kept for (own, i), kept in self._kept.items() if own == site}

    @staticmethod
    def state_layout(buckets: Iterable[Bucket]) -> Layout:
        """Shapes and types of what `state_of` returns for encoded buckets that a site holds."""
        return {entry("residual", b.index): ((b.numel,), torch.float32) for b in buckets}


def _of(chunk: Chunk, segments: set[int], flat: Tensor) -> list[Tensor]:
    """Views of some segments' elements in a chunk's values."""
    return [own for index, own in chunk.parts(flat) if index in segments] if segments else []
