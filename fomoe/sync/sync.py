"""A sync: prepare, exchange, commit.

With one fragment it follows a round. With several each fragment has its own in every round; the
last is due at the round's end, and `sync_fragment` runs the others between local steps. Where steps
run beside a sync, `begin` stages the values of its fragment and starts its exchange in another
thread, with connections of its own; `exchange` then waits for the result.

`prepare` ends the round at every site. `exchange` averages values over their holders, adds the
balance counts, compares bytes with the plan and checks that every state is finite; it changes no
state. `commit` writes anchors, parameters, residuals and balance biases; it waits for no other
site, and can fail only where a step overflows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoe.copies import coupling, encoded_buckets, exchanged
from fomoe.counting import RoundRouting
from fomoe.errors import SyncError
from fomoe.fragments import streams, synced_again
from fomoe.planning import RunPlan
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
from fomoe.sync.exchange import Contribute, check_sites, gather
from fomoe.sync.lanes import LaneRows
from fomoe.sync.outer import Anchors
from fomoe.sync.replicas import compare_replicas
from fomoe.sync.since import Since
from fomoe.sync.transport import Transport, model_bytes
from fomoe.sync.waiting import Beside


@dataclass(frozen=True)
class Prepared:
    """The counts of a round, or of the steps since a fragment's last sync.

    Attributes:
        routing: the round's, by site of this process; empty within a round.
        counts: what the contribution weights are computed from, by site of this process.
        fragment: what is synced.
    """

    routing: dict[int, RoundRouting]
    counts: dict[int, RoundCounts]
    fragment: int = 0


@dataclass(frozen=True)
class Exchanged:
    """The results that all sites agreed on; nothing is committed yet.

    Attributes:
        means: mean pseudo-gradients by bucket index, of the buckets held here; those of copies are
            pulled towards their families'.
        selected_LE: assignments per layer and expert over all sites; None without a balance bias.
        own_share: share of a site's own values in what it takes.
    """

    means: dict[int, Tensor]
    selected_LE: Tensor | None
    own_share: float = 0.0


@dataclass(frozen=True)
class Timed:
    """One reduction at the sites of this process.

    Attributes:
        fragment: what was reduced.
        seconds: that it took, whether or not local steps ran meanwhile.
        wire: model bytes sent, by site.
    """

    fragment: int
    seconds: float
    wire: dict[int, int]


@dataclass(frozen=True)
class Flight:
    """A sync that runs beside local steps.

    Attributes:
        fragment: what is synced.
        means: returns its means, once they are there.
    """

    fragment: int
    means: Callable[[], dict[int, Tensor]]


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
        self.lanes = LaneRows(plan, sites)
        self._family_of = {copy.index: f.index for f in plan.families for copy in f.copies}
        self._unplanned = dict.fromkeys(sites, "")
        self.since = {index: Since(plan.config, site) for index, site in sites.items()}
        self._beside = transport.beside() if plan.config.sync.overlap_steps else transport
        self._flight: Flight | None = None
        self.timed: list[Timed] = []

    @property
    def _steps(self) -> int:
        """Local steps that every site has taken since the start."""
        return next(iter(self.sites.values())).step_idx

    def sync_fragment(self, fragment: int) -> None:
        """Sync a fragment within a round.

        Raises:
            SyncError: as `exchange` and `commit` do.
        """
        counts = {site: since.take(fragment) for site, since in self.since.items()}
        self.commit(self.exchange(Prepared({}, counts, fragment)))

    def begin(self, fragment: int) -> None:
        """Begin a fragment's sync, beside the local steps that follow."""
        assert self._flight is None, "two syncs would be under way"
        counts = {site: since.take(fragment) for site, since in self.since.items()}
        due = tuple(b for b in self.buckets if b.fragment == fragment)
        staged = {
            (bucket.lane, bucket.index, site): self._contribute(bucket, site, counts[site]).staged()
            for buckets in self.lanes.of(due).values()
            for bucket in buckets
            for site in set(bucket.holders) & set(self.sites)
        }

        def contribute(bucket: Bucket, site: int) -> Contribution:
            return staged.pop((bucket.lane, bucket.index, site))

        problems = {index: site.divergence() for index, site in self.sites.items()}

        def average() -> dict[int, Tensor]:
            self.lanes.discard()
            with self._uncommitted("at any site"):
                means = self.reduce(due, contribute, self._beside)
            with self._uncommitted("at this site"):
                self._check(problems.__getitem__, self._beside)
            return means

        if self._beside.remote:
            self._flight = Flight(fragment, Beside(average).result)
        else:
            means = average()
            self._flight = Flight(fragment, lambda: means)

    def end(self, fragment: int) -> None:
        """Wait for the fragment's sync that has begun, and commit it.

        Raises:
            SyncError: as `exchange` and `commit` do.
        """
        self.commit(self.exchange(Prepared({}, {}, fragment)))

    def synced_again(self) -> range:
        """Fragments that are synced at the round's end beside the one that is due."""
        config = self.plan.config
        ends = self._steps == config.rounds * config.local_steps
        return synced_again(config) if ends else range(0)

    def prepare(self) -> Prepared:
        """End the round at every site of this process; its last fragment is due."""
        fragment = self.plan.config.sync.fragments - 1
        counts: dict[int, RoundCounts] = {}
        if self._flight is None:
            counts = {site: since.take(fragment) for site, since in self.since.items()}
        routing = {site: since.end_round() for site, since in self.since.items()}
        return Prepared(routing, counts, fragment)

    def exchange(self, prepared: Prepared) -> Exchanged:
        """Average, and check the state and the byte counts of every site.

        Raises:
            SyncError: if an exchange failed, or naming the sites whose state is not finite or whose
                bytes are not those planned. Nothing is committed at this site then.
        """
        if self._flight is not None:
            return self._landed(prepared)
        self.lanes.discard()
        # Before a site has said that it is well, no other commits.
        with self._uncommitted("at any site"):
            means = self._average(prepared)
            selected_LE = self._balance_counts(prepared)
        with self._uncommitted("at this site"):
            self._check(lambda site: self.sites[site].divergence(), self.transport)
        return Exchanged(means, selected_LE)

    def _landed(self, prepared: Prepared) -> Exchanged:
        """The result of the sync that has begun before."""
        flight, self._flight = self._flight, None
        assert flight is not None
        assert flight.fragment == prepared.fragment
        means = flight.means()
        if self._beside is not self.transport:
            for site in self.sites:
                self.transport.counts[site].take(self._beside.counts[site])
        with self._uncommitted("at any site"):
            selected_LE = self._balance_counts(prepared)
        own_share = self.plan.config.sync.own_share
        if not own_share:  # what the steps beside it have trained is dropped, and so are its counts
            for since in self.since.values():
                since.take(flight.fragment)
        return Exchanged(means, selected_LE, own_share)

    def _check(self, problem: Callable[[int], str], transport: Transport) -> None:
        """Compare every site's problems and bytes; all continue, or none does."""
        unplanned, self._unplanned = self._unplanned, dict.fromkeys(self.sites, "")
        check_sites(transport, lambda site: problem(site) or unplanned[site])

    def commit(self, exchanged: Exchanged) -> None:
        """Step the anchors and give them to every holder of this process.

        Raises:
            SyncError: if the step overflows; nothing is committed at this site then.
        """
        with self._uncommitted("at this site"):
            self.anchors.step(exchanged.means, exchanged.own_share)
        self.lanes.commit()
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
        due = tuple(b for b in self.buckets if b.fragment == prepared.fragment)
        means = self.reduce(
            exchanged(due, self.plan.families, share),
            lambda bucket, site: self._contribute(bucket, site, prepared.counts[site]),
        )
        held = (b for b in self.anchors.buckets if b.fragment == prepared.fragment)
        return {b.index: self._coupled(b, means, share) for b in held}

    def _coupled(self, bucket: Bucket, means: Mapping[int, Tensor], share: float) -> Tensor:
        """A bucket's mean; of copies, pulled towards the mean of their family by this share."""
        family = self._family_of.get(bucket.index)
        if family is None or share == 0:
            return means[bucket.index]
        if share == 1:
            return means[family].clone()  # each set of copies has its own, which a step may change
        return means[bucket.index] * (1 - share) + means[family] * share

    def reduce(
        self,
        buckets: Sequence[Bucket],
        contribute: Contribute,
        transport: Transport | None = None,
    ) -> dict[int, Tensor]:
        """Means of all buckets of a sync; `exchange` reports bytes that the run did not plan."""
        transport = transport or self.transport
        counts, started = transport.counts, time.perf_counter()
        before = {site: model_bytes(counts[site]) for site in self.sites}
        means = self.lanes.means(transport, buckets, contribute)
        seconds, wire = time.perf_counter() - started, dict[int, int]()
        fragment = buckets[0].fragment if buckets else 0
        for site, earlier in before.items():
            planned = self.plan.traffic_of_sync(site, self._steps, fragment)
            now = model_bytes(counts[site])
            counted = (now[0] - earlier[0], now[1] - earlier[1])
            wire[site] = counted[1]
            if counted != (planned.payload, planned.wire):
                self._unplanned[site] = (
                    f"it sent (payload, wire) = {counted} bytes in this sync, but the plan says "
                    f"{(planned.payload, planned.wire)}"
                )
        self.timed.append(Timed(fragment, seconds, wire))
        return means

    def _contribute(self, bucket: Bucket, site: int, counts: RoundCounts) -> Contribution:
        rule = self.plan.config.sync.weight
        own = bucket.at(site)
        weights = [contribution_weight(s, site, rule=rule, counts=counts) for s in own.segments]

        def anchor(segment: Segment, start: int, stop: int) -> Tensor:
            return self.anchor(segment).view(-1)[start:stop]

        def local(segment: Segment, start: int, stop: int) -> Tensor:
            return self.sites[site].view(segment).reshape(-1)[start:stop].to("cpu")

        return Contribution(own, weights, anchor, less=local)

    def anchor(self, segment: Segment) -> Tensor:
        """The anchor of a segment, or of a part of it, that is held here."""
        return self.lanes.part(segment, self.anchors.values[segment.name].detach())

    def _balance_counts(self, prepared: Prepared) -> Tensor | None:
        config = self.plan.config
        if not prepared.routing or config.router.balance == "loss" or not config.model.moe_layers:
            return None
        own = {site: routing.selected_LE for site, routing in prepared.routing.items()}
        messages = gather(self.transport, lambda site: own[site].numpy().tobytes())
        counts = [torch.frombuffer(bytearray(message), dtype=torch.int64) for message in messages]
        return torch.stack(counts).sum(0).view_as(next(iter(own.values())))

    def figures(self) -> dict[str, Any]:
        """What records of the merged model have of the last sync."""
        return {}

    # ---------------------------------------------------------------------------- checkpoint

    def state_of(self, site: int) -> dict[str, Tensor]:
        """What the sync keeps for one site between rounds, by entry: anchors, outer state,
        residuals and counts."""
        kept = self.anchors.state_of(site) | self.lanes.state_of(site)
        return kept | self.since[site].state()

    def state_layout(self, site: int) -> Layout:
        """Shapes and types of what `state_of` returns after the first sync, of all ranks of a site
        together."""
        config, buckets = self.plan.config, self.plan.site_plan.buckets
        stepped = [b for b in buckets if site in b.holders and takes_outer_step(config, b)]
        encoded = encoded_buckets(config, buckets, self.plan.families)
        kept = self.anchors.state_layout(s for bucket in stepped for s in bucket.segments)
        kept |= Coder.state_layout(b for b in encoded if site in b.holders)
        return kept | self.since[site].state_layout()

    def load_state_of(self, site: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
        self.anchors.load_state_of(site, tensors)
        self.lanes.load_state_of(site, tensors)
        self.since[site].load_state(tensors)

    def divergence(self, site: int) -> str:
        """Says what in the state of one site is not finite; empty if everything is."""
        return divergence(self.state_of(site))

    # ------------------------------------------------------------------------- the whole model

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block every site has the merged model's values: those of the anchors."""
        if not streams(self.plan.config):
            yield
            return
        views = [
            (self.sites[site].view(segment), self.anchor(segment))
            for bucket in self.anchors.buckets
            for site in sorted(set(bucket.holders) & set(self.sites))
            for segment in bucket.segments
        ]
        kept = [view.clone() for view, _ in views]
        for view, anchor in views:
            view.copy_(anchor)
        try:
            yield
        finally:
            for (view, _), own in zip(views, kept, strict=True):
                view.copy_(own)

    # ------------------------------------------------------------------------------ replicas

    def check_replicas(self) -> dict[int, str]:
        """Compare hashes of the sites' own parameters between the holders of every bucket.

        Where parameters move on between two syncs (`streams`), the anchors are compared.

        Returns:
            The hash of each bucket that is held here and has several holders.

        Raises:
            SyncError: naming the first bucket whose replicas differ, and its holders.
        """
        moving = streams(self.plan.config)
        views = {i: self.anchor if moving else site.view for i, site in self.sites.items()}
        lanes = self.lanes.of(self.plan.replicas(self._steps))
        return compare_replicas(self.transport, lanes, views)
