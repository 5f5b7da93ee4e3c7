"""Anchors and the outer step that every holder repeats.

Each process keeps one anchor and one outer state per segment that its sites hold (one site in a
distributed run, all in a proxy run), in fp32 and off the accelerator. Every holder gets the same
mean and takes the same step, so replicas stay equal without sending parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.segments import Bucket, Segment
from fomoe.site import Site
from fomoe.state import key, not_finite, of_kind
from fomoe.sync.buckets import split_bucket

# Need a closure, or work on sparse gradients or matrices only; the outer step is elementwise.
_REFUSED = {"LBFGS", "SparseAdam", "Muon", "Optimizer", "Adafactor"}


class Anchors:
    """Anchors and outer state of the segments that a process's sites hold.

    Args:
        config: the experiment.
        buckets: those that take outer steps, at any site.
        sites: the sites of this process; they start equal to the anchors.
        pin: keep the anchors in pinned memory.

    Attributes:
        buckets: those of them that are held here.
        values: the anchors by segment.

    Raises:
        ConfigError: if `outer.optimizer` is no elementwise class of torch.optim, or its options
            are not its own.
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

    def step(self, means: Mapping[int, Tensor]) -> None:
        """Step with the mean pseudo-gradients and copy the result to every local holder."""
        for bucket in self.buckets:
            for name, grad in split_bucket(bucket, means[bucket.index]).items():
                self.values[name].grad = grad
        if self.values:
            self.optimizer.step()
        for anchor in self.values.values():
            anchor.grad = None
        for bucket in self.buckets:
            for site in set(bucket.holders) & set(self.sites):
                for segment in bucket.segments:
                    self.sites[site].view(segment).copy_(self.values[segment.name].detach())

def build_outer_optimizer(config: Config, anchors: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the torch.optim class that the config names; unknown names and options are errors."""
    name = config.outer.optimizer
    kind = getattr(torch.optim, name, None)
    if (
        name in _REFUSED
        or not isinstance(kind, type)
        or not issubclass(kind, torch.optim.Optimizer)
    ):
        raise ConfigError("outer.optimizer", name, "must be an elementwise class of torch.optim")
    try:
        # Some options are refused at the first step only: it is tried before anything is trained.
        trial = nn.Parameter(torch.zeros(1))
        trial.grad = torch.zeros(1)
        kind([trial], **config.outer.arguments).step()
        return kind(anchors or [trial], **config.outer.arguments)
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        reason = f"is refused by torch.optim.{name}: {error}"
        raise ConfigError("outer.options", config.outer.arguments, reason) from None
