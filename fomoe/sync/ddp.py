"""DDP, the small sibling of a sync: gradients are averaged at every step, nothing at a round's end.

The parameters of all sites are always equal, so there are no anchors and no outer step.
"""

from __future__ import annotations

import math

from torch import Tensor

from fomoe.segments import Bucket, Segment
from fomoe.sync.buckets import Contribution, split_bucket
from fomoe.sync.sync import Prepared, Sync


class GradientSync(Sync):
    """A sync without anchors: at the end of a round the sites only check their states."""

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the tokens of all sites, through the same
        reduction.

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

        # A site's gradient is a mean over its own tokens. In lowest terms, equal batches weigh 1.
        sizes = self.plan.config.batch_sizes
        weight = sizes[site] // math.gcd(*sizes)
        return Contribution(bucket, [float(weight)] * len(bucket.segments), gradient)
