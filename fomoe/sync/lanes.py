"""The lanes of one rank: as one transport, and their rows of what the rank averages.

A rank has one lane where all sites have equally many ranks, and this room has nothing to do then.
Else a rank's rows may be those of several ranks of another site, each of which it meets in a lane
of its own (`fomoe.shards`). All ranks take their lanes in the same order, so none waits for itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fomoe.codecs import CODECS
from fomoe.copies import encoded_buckets
from fomoe.planning import RunPlan
from fomoe.segments import Bucket, Segment
from fomoe.sync.buckets import split_bucket
from fomoe.sync.coder import Coder
from fomoe.sync.exchange import Contribute, mean_over_holders
from fomoe.sync.gloo import GlooTransport
from fomoe.sync.transport import ByteCounts, Message, Transport


class Lanes:
    """Several lanes as one transport; a message belongs to one of them.

    Args:
        lanes: in their order.
    """

    remote = True

    def __init__(self, lanes: Sequence[GlooTransport]) -> None:
        self.lanes = tuple(lanes)
        first = self.lanes[0]
        self.members, self.sites, self.inside = first.members, first.sites, first.inside
        self.counts = first.counts
        for lane in self.lanes[1:]:
            lane.counts = self.counts

    def move(self, what: str, messages: Sequence[Message]) -> list[Tensor | None]:
        raise NotImplementedError("a message belongs to one lane")

    def beside(self) -> Lanes:
        # All ranks of a site join the twin of their group once, however many lanes each has.
        inside, counts = self.inside.beside(), {site: ByteCounts() for site in self.sites}
        return Lanes([lane.twin(inside, counts) for lane in self.lanes])

    def close(self, reason: str = "") -> None:
        for lane in self.lanes:
            lane.close(reason)


class LaneRows:
    """What each lane of a rank has of its buckets, and their errors of encoding.

    Args:
        plan: of this rank.
        sites: the sites of this process.
    """

    def __init__(self, plan: RunPlan, sites: Collection[int]) -> None:
        self._lanes, self._sites = plan.lanes, sites
        codec = CODECS[plan.config.sync.codec]
        self.coders = {
            number: Coder(codec, encoded_buckets(plan.config, lane.buckets, plan.families), sites)
            for number, lane in plan.lanes.items()
        }
        own = plan.segment_plan.buckets
        self._first_row = {s.name: (s.cut or (0,))[0] for b in own for s in b.segments}

    def of(self, buckets: Sequence[Bucket]) -> dict[int, Sequence[Bucket]]:
        """What each lane has of these buckets, by the lane's number."""
        if len(self._lanes) == 1:
            return dict.fromkeys(self._lanes, buckets)
        wanted = {bucket.index for bucket in buckets}
        return {
            number: [bucket for bucket in lane.buckets if bucket.index in wanted]
            for number, lane in self._lanes.items()
        }

    def means(
        self, transport: Transport, buckets: Sequence[Bucket], contribute: Contribute
    ) -> dict[int, Tensor]:
        """Means of the buckets that sites of this process hold, by index.

        Args:
            contribute: is asked for the contribution to each lane's own buckets.

        Raises:
            SyncError: if an exchange failed.
        """
        found = {
            number: mean_over_holders(lane, own, contribute, self.coders[number])
            for lane, (number, own) in zip(transport.lanes, self.of(buckets).items(), strict=True)
        }
        if len(found) == 1:
            return next(iter(found.values()))
        held = [bucket for bucket in buckets if set(bucket.holders) & set(self._sites)]
        means = {bucket.index: torch.empty(bucket.numel) for bucket in held}
        rows = {bucket.index: split_bucket(bucket, means[bucket.index]) for bucket in held}
        for number, own in self.of(held).items():
            for bucket in own:
                parts = split_bucket(bucket, found[number][bucket.index])
                for segment in bucket.segments:
                    whole = rows[bucket.index][segment.name]
                    self.part(segment, whole).copy_(parts[segment.name])
        return means

    def part(self, segment: Segment, rows: Tensor) -> Tensor:
        """Of the rows of a segment that this rank has, those of a part of it."""
        if segment.cut is None:
            return rows
        first = self._first_row[segment.name]
        return rows[segment.cut[0] - first : segment.cut[1] - first]

    # ------------------------------------------------------------------------------- residuals

    def discard(self) -> None:
        """Forget the errors of a sync that failed."""
        for coder in self.coders.values():
            coder.discard()

    def commit(self) -> None:
        """Keep the errors of the sync that is committed."""
        for coder in self.coders.values():
            coder.commit()

    def state_of(self, site: int) -> dict[str, Tensor]:
        """What one site has left out, by entry, lane after lane."""
        parts = self._parts_of(site)
        return {name: own[0] if len(own) == 1 else torch.cat(own) for name, own in parts.items()}

    def load_state_of(self, site: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
        for name, own in self._parts_of(site).items():
            saved = tensors[name].split([len(kept) for kept in own])
            for kept, part in zip(own, saved, strict=True):
                kept.copy_(part)

    def _parts_of(self, site: int) -> dict[str, list[Tensor]]:
        parts: dict[str, list[Tensor]] = {}
        for coder in self.coders.values():
            for name, kept in coder.state_of(site).items():
                parts.setdefault(name, []).append(kept)
        return parts
