"""The sync of a round: prepare, exchange, commit.

`prepare` ends the round at every site. `exchange` averages values over their holders, adds the
balance counts, compares bytes with the plan and checks that every state is finite; it changes no
state. `commit` writes anchors, parameters, residuals and balance biases; it waits for no other
site, and can fail only where a step overflows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.codecs import CODECS
from fomoe.copies import coupling, encoded_buckets, exchanged
from fomoe.counting import RoundRouting
from fomoe.errors import SyncError
from fomoe.planning import RunPlan
from fomoe.ranks import Ranks
from fomoe.segments import (
    Bucket,
    RoundCounts,
    Segment,
    contribution_weight,
    takes_outer_step,
)
from fomoe.site import Site
from fomoe.state import Layout, divergence
from fomoe.sync.buckets import Contribution
from fomoe.sync.coder import Coder
from fomoe.sync.exchange import Contribute, check_sites, gather, mean_over_holders
from fomoe.sync.outer import Anchors
from fomoe.sync.transport import Transport, model_bytes


@dataclass(frozen=True)
class Prepared:
    """The counts of a round at the sites of this process.

    Attributes:
        routing: its routing, by site.
        counts: what the contribution weights are computed from, by site.
    """

    routing: dict[int, RoundRouting]
    counts: dict[int, RoundCounts]


@dataclass(frozen=True)
class Exchanged:
    """The results that all sites agreed on; nothing is committed yet.

    Attributes:
        means: mean pseudo-gradients by bucket index, of the buckets held here; those of copies are
            pulled towards their families'.
        selected_LE: assignments per layer and expert over all sites; None without a balance bias.
    """

    means: dict[int, Tensor]
    selected_LE: Tensor | None


class Sync:
    """Averages parameters over their holders and steps the anchors.

    Args:
        plan: the experiment: its buckets and options.
        sites: the sites of this process.
        transport: between all sites.
        pin: keep the anchors in pinned memory, for copies from and to an accelerator.
    """

    def __init__(
        self, plan: RunPlan, sites: Mapping[int, Site], transport: Transport, *, pin: bool = False
    ) -> None:
        self.plan, self.sites, self.transport = plan, sites, transport
        self.buckets = [b for b in plan.segment_plan.buckets if takes_outer_step(plan.config, b)]
        self.anchors = Anchors(plan.config, self.buckets, sites, pin=pin)
        encoded = encoded_buckets(plan.config, plan.segment_plan.buckets, plan.families)
        self.coder = Coder(CODECS[plan.config.sync.codec], encoded, sites)
        self._family_of = {copy.index: f.index for f in plan.families for copy in f.copies}
        self._unplanned = dict.fromkeys(sites, "")

    @property
    def _steps(self) -> int:
        """Local steps that every site has taken since the start."""
        return next(iter(self.sites.values())).step_idx

    def prepare(self) -> Prepared:
        """End the round at every site of this process."""
        routing = {index: site.end_round() for index, site in self.sites.items()}
        counts = {i: site.round_counts(routing[i]) for i, site in self.sites.items()}
        return Prepared(routing, counts)

    def exchange(self, prepared: Prepared) -> Exchanged:
        """Average, and check the state and the byte counts of every site.

        Raises:
            SyncError: if an exchange failed, or naming the sites whose state is not finite or whose
                bytes are not those planned. Nothing is committed at this site then.
        """
        self.coder.discard()
        # Before a site has said that it is well, no other commits.
        with self._uncommitted("at any site"):
            means = self._average(prepared)
            selected_LE = self._balance_counts(prepared)
        unplanned, self._unplanned = self._unplanned, dict.fromkeys(self.sites, "")
        with self._uncommitted("at this site"):
            check_sites(
                self.transport, lambda site: self.sites[site].divergence() or unplanned[site]
            )
        return Exchanged(means, selected_LE)

    def commit(self, exchanged: Exchanged) -> None:
        """Step the anchors and give them to every holder of this process.

        Raises:
            SyncError: if the step overflows; nothing is committed at this site then.
        """
        with self._uncommitted("at this site"):
            self.anchors.step(exchanged.means)
        self.coder.commit()
        if exchanged.selected_LE is not None:
            for site in self.sites.values():
                site.move_balance_bias(exchanged.selected_LE)

    @contextmanager
    def _uncommitted(self, where: str) -> Iterator[None]:
        """Say of a failure that what was being averaged is lost, and that nothing else is."""
        try:
            yield
        except SyncError as error:
            if not self.buckets:  # there is nothing to commit
                raise
            raise SyncError(
                f"{error}; nothing of this sync is committed {where}, --resume continues from the "
                f"newest checkpoint"
            ) from error

    def _average(self, prepared: Prepared) -> dict[int, Tensor]:
        """Mean pseudo-gradients by bucket index."""
        share = coupling(self.plan.config, self._steps)
        means = self.reduce(
            exchanged(tuple(self.buckets), self.plan.families, share),
            lambda bucket, site: self._contribute(bucket, site, prepared.counts[site]),
        )
        return {b.index: self._coupled(b, means, share) for b in self.anchors.buckets}

    def _coupled(self, bucket: Bucket, means: Mapping[int, Tensor], share: float) -> Tensor:
        """A bucket's mean; of copies, pulled towards the mean of their family by this share."""
        family = self._family_of.get(bucket.index)
        if family is None or share == 0:
            return means[bucket.index]
        if share == 1:
            return means[family].clone()  # each set of copies has its own, which a step may change
        return means[bucket.index] * (1 - share) + means[family] * share

    def reduce(self, buckets: Sequence[Bucket], contribute: Contribute) -> dict[int, Tensor]:
        """Means of all buckets of a sync; `exchange` reports bytes that the run did not plan."""
        counts = self.transport.counts
        before = {site: model_bytes(counts[site]) for site in self.sites}
        means = mean_over_holders(self.transport, buckets, contribute, self.coder)
        for site, earlier in before.items():
            planned = self.plan.traffic_of_sync(site, self._steps)
            now = model_bytes(counts[site])
            counted = (now[0] - earlier[0], now[1] - earlier[1])
            if counted != (planned.payload, planned.wire):
                self._unplanned[site] = (
                    f"it sent (payload, wire) = {counted} bytes in this round, but the plan says "
                    f"{(planned.payload, planned.wire)}"
                )
        return means

    def _contribute(self, bucket: Bucket, site: int, counts: RoundCounts) -> Contribution:
        rule = self.plan.config.sync.weight
        own = bucket.at(site)
        weights = [contribution_weight(s, site, rule=rule, counts=counts) for s in own.segments]

        def pseudo_grad(segment: Segment, start: int, stop: int) -> Tensor:
            anchor = self.anchor(segment).view(-1)[start:stop]
            local = self.sites[site].view(segment).reshape(-1)[start:stop]
            return anchor - local.to("cpu")

        return Contribution(own, weights, pseudo_grad)

    def anchor(self, segment: Segment) -> Tensor:
        """The anchor of a segment that is held here."""
        return self.anchors.values[segment.name].detach()

    def _balance_counts(self, prepared: Prepared) -> Tensor | None:
        config = self.plan.config
        if config.router.balance == "loss" or not config.model.moe_layers:
            return None
        own = {site: routing.selected_LE for site, routing in prepared.routing.items()}
        messages = gather(self.transport, lambda site: own[site].numpy().tobytes())
        counts = [torch.frombuffer(bytearray(message), dtype=torch.int64) for message in messages]
        return torch.stack(counts).sum(0).view_as(next(iter(own.values())))

    # ---------------------------------------------------------------------------- checkpoint

    def state_of(self, site: int) -> dict[str, Tensor]:
        """What the sync keeps for one site between rounds, by entry: anchors, outer state and
        residuals."""
        return self.anchors.state_of(site) | self.coder.state_of(site)

    def state_layout(self, site: int) -> Layout:
        """Shapes and types of what `state_of` returns after the first sync, of all ranks of a site
        together."""
        config, buckets = self.plan.config, self.plan.site_plan.buckets
        stepped = [b for b in buckets if site in b.holders and takes_outer_step(config, b)]
        encoded = encoded_buckets(config, buckets, self.plan.families)
        return self.anchors.state_layout(
            segment for bucket in stepped for segment in bucket.segments
        ) | self.coder.state_layout(b for b in encoded if site in b.holders)

    def load_state_of(self, site: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
        self.anchors.load_state_of(site, tensors)
        self.coder.load_state_of(site, tensors)

    def divergence(self, site: int) -> str:
        """Says what in the state of one site is not finite; empty if everything is."""
        return divergence(self.state_of(site))

    # ------------------------------------------------------------------------------ replicas

    def check_replicas(self) -> dict[int, str]:
        """Compare hashes of the sites' own parameters between the holders of every bucket.

        Returns:
            The hash of each bucket that is held here and has several holders.

        Raises:
            SyncError: naming the first bucket whose replicas differ, and its holders.
        """
        shared = self.plan.replicas(self._steps)
        own = {
            index: replica_hashes(shared, index, site.view) for index, site in self.sites.items()
        }
        messages = gather(self.transport, lambda site: b"".join(own[site].values()))
        size = hashlib.sha256().digest_size
        by_bucket: dict[int, set[bytes]] = {bucket.index: set() for bucket in shared}
        for site, message in zip(self.transport.members, messages, strict=True):
            held = [bucket.index for bucket in shared if site in bucket.holders]
            for position, index in enumerate(held):
                by_bucket[index].add(message[position * size : (position + 1) * size])
        problem = next(
            (
                f"replicas differ after a sync: bucket {bucket.index} "
                f"({bucket.segments[0].name}, ...) is not equal at its holders "
                f"{list(bucket.holders)}"
                for bucket in shared
                if len(by_bucket[bucket.index]) > 1
            ),
            "",
        )
        # The same ranks of all sites have seen the same hashes, so all ranks raise or none does.
        if found := next(filter(None, self.transport.inside.gather(problem.encode())), b""):
            raise SyncError(found.decode())
        texts = {i: digest.hex() for hashes in own.values() for i, digest in hashes.items()}
        return hashes_of_ranks(self.transport.inside, texts)


def hashes_of_ranks(inside: Ranks, own: dict[int, str]) -> dict[int, str]:
    """Hashes of a site's buckets, from those of every rank's part of them."""
    if inside.size == 1:
        return own
    parts = [json.loads(message) for message in inside.gather(json.dumps(own).encode())]
    indices = sorted({int(index) for part in parts for index in part})
    texts = {i: "".join(part.get(str(i), "") for part in parts) for i in indices}
    return {i: hashlib.sha256(text.encode()).hexdigest() for i, text in texts.items()}


def replica_hashes(
    buckets: Iterable[Bucket], site: int, view: Callable[[Segment], Tensor]
) -> dict[int, bytes]:
    """sha256 of a site's values of each of these buckets that it holds, by bucket index."""
    hashes = {}
    for bucket in buckets:
        if site in bucket.holders:
            digest = hashlib.sha256()
            for segment in bucket.at(site).segments:
                value = view(segment).to("cpu", torch.float32).contiguous()
                digest.update(memoryview(value.reshape(-1).numpy()))
            hashes[bucket.index] = digest.digest()
    return hashes
