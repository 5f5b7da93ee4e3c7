"""The outer optimizer: anchors, pseudo-gradients, and the step that every holder repeats.

Each process keeps one anchor and one outer state per segment that its sites hold (one site in a
distributed run, all in a proxy run), in fp32 and off the accelerator. Every holder gets the same
mean and takes the same step, so replicas stay equal without sending parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fomoe.config import Config
from fomoe.errors import ConfigError, SyncError
from fomoe.memory import takes_outer_step
from fomoe.segments import Bucket, Plan, Segment
from fomoe.state import Layout, optimizer_layout
from fomoe.sync.aggregate import (
    Contribution,
    RoundCounts,
    build_contribution,
    contribution_weight,
    mean_over_holders,
    split_bucket,
)
from fomoe.sync.transport import Transport

Parameters = Mapping[str, nn.Parameter]  # of one site, by name


class OuterOptimizer:
    """Anchors and outer state of the segments that a process's sites hold.

    Args:
        config: the experiment.
        plan: all buckets.
        sites: parameters of this process's sites, by site; they start equal to the anchors.
        pin: keep the anchors in pinned memory, for copies from and to an accelerator.

    Raises:
        ConfigError: if `outer.options` are not the optimizer's own.
    """

    def __init__(
        self, config: Config, plan: Plan, sites: Mapping[int, Parameters], *, pin: bool = False
    ) -> None:
        self.config, self.sites = config, sites
        self.buckets = [
            bucket
            for bucket in plan.buckets
            if takes_outer_step(config, bucket) and set(bucket.holders) & set(sites)
        ]
        self.anchors: dict[str, nn.Parameter] = {}
        for bucket in self.buckets:
            site = min(set(bucket.holders) & set(sites))
            for segment in bucket.segments:
                # A copy even on CPU: the anchor must not change when the parameter does.
                value = torch.empty(segment.shape, pin_memory=pin)
                value.copy_(read_segment(sites[site], segment))
                self.anchors[segment.name] = nn.Parameter(value, requires_grad=False)
        self.optimizer = build_outer_optimizer(config, list(self.anchors.values()))

    def step(self, means: Mapping[int, Tensor]) -> None:
        """Step the anchors with the mean pseudo-gradients; `publish` then gives them out."""
        for bucket in self.buckets:
            for name, grad in split_bucket(bucket, means[bucket.index]).items():
                self.anchors[name].grad = grad
        if self.anchors:
            self.optimizer.step()
        for anchor in self.anchors.values():
            anchor.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the anchors into the parameters of every local holder."""
        for bucket in self.buckets:
            for site in set(bucket.holders) & set(self.sites):
                for segment in bucket.segments:
                    target = self.sites[site][segment.parameter][segment.start : segment.stop]
                    target.copy_(self.anchors[segment.name])

    def state_of(self, site: int) -> dict[str, Tensor]:
        """Anchors and outer state of one site's segments, by name, for its checkpoint."""
        tensors = {}
        for segment in self._segments_of(site):
            anchor = self.anchors[segment.name]
            tensors[f"anchor/{segment.name}"] = anchor.detach()
            for key, value in self.optimizer.state.get(anchor, {}).items():
                if value is not None:
                    tensors[f"outer/{key}/{segment.name}"] = torch.as_tensor(value)
        return tensors

    def state_layout(self, site: int) -> Layout:
        """Shapes and types of what `state_of` returns after the first step."""
        shapes = {segment.name: segment.shape for segment in self._segments_of(site)}
        anchors: Layout = {f"anchor/{name}": (s, torch.float32) for name, s in shapes.items()}
        return anchors | optimizer_layout(
            lambda trial: build_outer_optimizer(self.config, [trial]), shapes, "outer"
        )

    @torch.no_grad()
    def load_state_of(self, site: int, tensors: Mapping[str, Tensor]) -> None:
        """Bring back what `state_of` returned; replicas of one process are equal, so order is not
        important."""
        by_segment: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "outer":
                key, _, segment_name = rest.partition("/")
                by_segment.setdefault(segment_name, {})[key] = tensor.clone()
        for segment in self._segments_of(site):
            anchor = self.anchors[segment.name]
            anchor.copy_(tensors[f"anchor/{segment.name}"])
            if segment.name in by_segment:
                self.optimizer.state[anchor] = by_segment[segment.name]

    def _segments_of(self, site: int) -> list[Segment]:
        return [s for bucket in self.buckets if site in bucket.holders for s in bucket.segments]


def build_outer_optimizer(config: Config, anchors: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the torch.optim class that the config names.

    Raises:
        ConfigError: if the class refuses its options.
    """
    name = config.outer.optimizer
    kind = getattr(torch.optim, name)
    try:
        # Some options are refused at the first step only: it is tried before anything is trained.
        trial = nn.Parameter(torch.zeros(1))
        trial.grad = torch.zeros(1)
        kind([trial], **config.outer.arguments).step()
        return kind(anchors or [trial], **config.outer.arguments)
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        reason = f"is refused by torch.optim.{name}: {error}"
        raise ConfigError("outer.options", config.outer.arguments, reason) from None


def read_segment(parameters: Mapping[str, Tensor], segment: Segment) -> Tensor:
    return parameters[segment.parameter].detach()[segment.start : segment.stop]


def average_pseudo_gradients(
    config: Config,
    plan: Plan,
    outer: OuterOptimizer,
    transport: Transport,
    counts: Mapping[int, RoundCounts],
) -> dict[int, Tensor]:
    """Mean pseudo-gradient (anchor minus local) of every bucket held here, by bucket index.

    Works on copies: nothing is committed here, and no site may commit before all have agreed.

    Raises:
        SyncError: if the exchange failed.
    """

    def contribute(bucket: Bucket, site: int) -> Contribution:
        rule, own = config.sync.weight, counts[site]
        weights = [contribution_weight(s, site, rule=rule, counts=own) for s in bucket.segments]
        return build_contribution(
            bucket,
            weights,
            lambda s: outer.anchors[s.name].detach() - read_segment(outer.sites[site], s).to("cpu"),
        )

    stepped = Plan(num_sites=plan.num_sites, buckets=tuple(outer.buckets))
    return mean_over_holders(stepped, transport, contribute)


def average_gradients(plan: Plan, sites: Mapping[int, Parameters], transport: Transport) -> None:
    """Replace every gradient by its mean over all sites (DDP), through the same reduction."""

    def contribute(bucket: Bucket, site: int) -> Contribution:
        def read(segment: Segment) -> Tensor:
            grad = sites[site][segment.parameter].grad
            assert grad is not None
            return grad[segment.start : segment.stop]

        return build_contribution(bucket, [1.0] * len(bucket.segments), read)

    means = mean_over_holders(plan, transport, contribute)
    for bucket in plan.buckets:
        parts = split_bucket(bucket, means[bucket.index])
        for site in transport.sites:
            for segment in bucket.segments:
                grad = sites[site][segment.parameter].grad
                assert grad is not None
                grad[segment.start : segment.stop].copy_(parts[segment.name])


def check_replicas(
    plan: Plan, sites: Mapping[int, Parameters], transport: Transport
) -> dict[int, str]:
    """Compare hashes of the sites' own parameters over the holders of every bucket.

    Returns:
        The hash of each bucket with several holders, of those held here.

    Raises:
        SyncError: naming the buckets and sites that differ.
    """
    shared = [bucket for bucket in plan.buckets if len(bucket.holders) > 1]
    own = {site: replica_hashes(shared, site, sites[site]) for site in transport.sites}
    messages = transport.gather(lambda site: b"".join(own[site].values()))
    size = hashlib.sha256().digest_size
    by_bucket: dict[int, dict[int, bytes]] = {bucket.index: {} for bucket in shared}
    for site, message in zip(transport.members, messages, strict=True):
        held = [bucket.index for bucket in shared if site in bucket.holders]
        for position, index in enumerate(held):
            by_bucket[index][site] = message[position * size : (position + 1) * size]
    wrong = [b for b in shared if len(set(by_bucket[b.index].values())) > 1]
    if wrong:
        bucket = wrong[0]
        raise SyncError(
            f"replicas differ after a sync: bucket {bucket.index} ({bucket.segments[0].name}, ...) "
            f"is not equal at its holders {list(bucket.holders)}"
        )
    return {i: digest.hex() for hashes in own.values() for i, digest in hashes.items()}


def replica_hashes(
    buckets: list[Bucket], site: int, parameters: Mapping[str, Tensor]
) -> dict[int, bytes]:
    """sha256 of one site's values of each of these buckets that it holds, by bucket index."""
    hashes = {}
    for bucket in buckets:
        if site not in bucket.holders:
            continue
        digest = hashlib.sha256()
        for segment in bucket.segments:
            value = read_segment(parameters, segment).to("cpu", torch.float32).contiguous()
            digest.update(memoryview(value.reshape(-1).numpy()))
        hashes[bucket.index] = digest.digest()
    return hashes
