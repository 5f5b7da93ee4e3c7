"""DDP, the small sibling of a sync: gradients are averaged at every step, nothing at a round's end.

The parameters of all sites are always equal, so there are no anchors and no outer step.
"""

from __future__ import annotations

from torch import Tensor

from fomoe.segments import Bucket, Segment
from fomoe.sync.buckets import Contribution, split_bucket
from fomoe.sync.sync import Prepared, Sync


class GradientSync(Sync):
    """A sync without anchors: at the end of a round the sites only check their states."""

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over all sites, through the same reduction.

        Raises:
            SyncError: if the exchange failed.
        """
        buckets = [bucket for bucket in self.plan.segment_plan.buckets if bucket.trainers]
        means = self.reduce(buckets, self._gradients)
        for bucket in buckets:
            parts = split_bucket(bucket, means[bucket.index])
            for site in self.sites.values():
                for segment in bucket.segments:
                    site.grad_view(segment).copy_(parts[segment.name])

    def _average(self, prepared: Prepared) -> dict[int, Tensor]:
        """Nothing: gradients were averaged at every step."""
        return {}

    def _gradients(self, bucket: Bucket, site: int) -> Contribution:
        def gradient(segment: Segment, start: int, stop: int) -> Tensor:
            return self.sites[site].grad_view(segment).reshape(-1)[start:stop]

        return Contribution(bucket, [1.0] * len(bucket.segments), gradient)
