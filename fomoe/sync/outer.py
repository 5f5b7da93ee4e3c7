"""Anchors and the outer step that every holder repeats.

Each process keeps one anchor and one outer state per segment that its sites hold (one site in a
distributed run, all in a proxy run), in fp32 and off the accelerator. Every holder gets the same
mean and takes the same step, so replicas stay equal without sending parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fomoe.config import Config
from fomoe.errors import ConfigError, SyncError
from fomoe.segments import Bucket, Segment
from fomoe.site import Site
from fomoe.state import Layout, by_key, divergence, entry, optimizer_layout
from fomoe.sync.buckets import split_bucket


class Anchors:
    """Anchors and outer state of the segments that a process's sites hold.

    Args:
        config: the experiment.
        buckets: those that take outer steps, at any site.
        sites: the sites of this process; they start equal to the anchors.
        pin: keep the anchors in pinned memory.

    Attributes:
        buckets: those of the given buckets that are held here.
        values: the anchors by name of the segment.

    Raises:
        ConfigError: if `outer.options` are not the optimizer's own.
    """

    def __init__(
        self,
        config: Config,
        buckets: Sequence[Bucket],
        sites: Mapping[int, Site],
        *,
        pin: bool = False,
    ) -> None:
        self.config, self.sites = config, sites
        self.buckets = [bucket for bucket in buckets if set(bucket.holders) & set(sites)]
        self.values: dict[str, nn.Parameter] = {}
        for bucket in self.buckets:
            site = min(set(bucket.holders) & set(sites))
            for segment in bucket.segments:
                # A copy even on CPU: the anchor must not change when the parameter does.
                value = torch.empty(segment.shape, pin_memory=pin)
                value.copy_(sites[site].view(segment))
                self.values[segment.name] = nn.Parameter(value, requires_grad=False)
        self.optimizer = build_outer_optimizer(config, list(self.values.values()))

    def step(self, means: Mapping[int, Tensor], own_share: float = 0.0) -> None:
        """Step with the mean pseudo-gradients and give the result to every local holder.

        Args:
            means: by bucket index; what has none keeps its anchor.
            own_share: alpha of Streaming DiLoCo (arXiv 2501.18512): a holder then has alpha x its
                own value + (1 - alpha) x the anchor.

        Raises:
            SyncError: if a finite mean overflows in the step. The anchors have changed then, no
                parameter has.
        """
        due = [bucket for bucket in self.buckets if bucket.index in means]
        for bucket in due:
            for name, grad in split_bucket(bucket, means[bucket.index]).items():
                self.values[name].grad = grad
        if self.values:
            self.optimizer.step()
        for anchor in self.values.values():
            anchor.grad = None
        for site in self.sites:
            if problem := divergence(self.state_of(site, due)):
                raise SyncError(problem)
        for bucket in due:
            for site in set(bucket.holders) & set(self.sites):
                for segment in bucket.segments:
                    own, anchor = self.sites[site].view(segment), self.values[segment.name].detach()
                    if own_share:
                        own.mul_(own_share).add_(anchor.to(own.device), alpha=1 - own_share)
                    else:
                        own.copy_(anchor)

    # -------------------------------------------------------------------------------- checkpoint

    def state_of(self, site: int, buckets: Sequence[Bucket] | None = None) -> dict[str, Tensor]:
        """Anchors and outer state of one site's segments, by entry; of these buckets, or all."""
        tensors = {}
        for segment in self._segments_of(site, buckets):
            anchor = self.values[segment.name]
            tensors[entry("anchor", segment.name)] = anchor.detach()
            for key, value in self.optimizer.state.get(anchor, {}).items():
                if value is not None:
                    tensors[entry("outer", key, segment.name)] = torch.as_tensor(value)
        return tensors

    def state_layout(self, segments: Iterable[Segment]) -> Layout:
        """Shapes and types of what `state_of` returns after the first step.

        Args:
            segments: that take outer steps; those of all ranks together, in a whole checkpoint.
        """
        shapes = {segment.name: segment.shape for segment in segments}
        anchors: Layout = {entry("anchor", n): (s, torch.float32) for n, s in shapes.items()}
        return anchors | optimizer_layout(
            lambda trial: build_outer_optimizer(self.config, [trial]), shapes, "outer"
        )

    @torch.no_grad()
    def load_state_of(self, site: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_of` returned.

        Replicas in one process are equal, so the order of the sites does not matter.
        """
        outer = by_key(tensors, "outer")
        for segment in self._segments_of(site):
            anchor = self.values[segment.name]
            anchor.copy_(tensors[entry("anchor", segment.name)])
            if segment.name in outer:
                own = outer[segment.name]
                self.optimizer.state[anchor] = {key: value.clone() for key, value in own.items()}

    def _segments_of(self, site: int, buckets: Sequence[Bucket] | None = None) -> list[Segment]:
        chosen = self.buckets if buckets is None else buckets
        return [s for bucket in chosen if site in bucket.holders for s in bucket.segments]


def build_outer_optimizer(config: Config, anchors: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the torch.optim class that the config names.

    Raises:
        ConfigError: if the class refuses its options.
    """
    name = config.outer.optimizer
    kind = getattr(torch.optim, name)
    try:
        # torch refuses some options only at the first step, so a trial step comes before training.
        trial = nn.Parameter(torch.zeros(1))
        trial.grad = torch.zeros(1)
        kind([trial], **config.outer.arguments).step()
        return kind(anchors or [trial], **config.outer.arguments)
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        reason = f"is refused by torch.optim.{name}: {error}"
        raise ConfigError("outer.options", config.outer.arguments, reason) from None
