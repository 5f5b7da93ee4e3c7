"""The ranks of a site: the processes that train it together, as the rest of the code sees them.

Here there is one, which is the whole site; `fomoe.sync.inside` has several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Ranks:
    """The ranks of a site of one process.

    Attributes:
        rank, size: this rank and their number.
        shards: whether each rank has only its rows of every parameter; else all have all rows.
    """

    rank = 0
    size = 1
    shards = False

    def gather(self, message: bytes) -> list[bytes]:
        """One message per rank, in order, at every rank."""
        return [message]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the ranks, the same bits at every rank."""
        return values

    def spread(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """A flat fp32 tensor per rank, in order, at every rank.

        Args:
            sizes: elements of each.
        """
        return [own]

    def parallelize(self, model: nn.Module, device: torch.device) -> Callable[..., Any]:
        """Move a model to the device; returns what runs its training step.

        Its parameters may change: they have to be asked for again.
        """
        return model.to(device)

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this rank has of a parameter, in the same memory."""
        return parameter

    def local_grad(self, parameter: nn.Parameter) -> Tensor | None:
        """What this rank has of a parameter's gradient, which is a mean over the ranks."""
        return parameter.grad

    def micro_batch(self, engine: Callable[..., Any], *, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of one micro-batch of a step."""
        return nullcontext()

    def total_norm(self, grads: Sequence[Tensor]) -> Tensor:
        """Norm of all gradients of the site, from those of this rank."""
        return nn.utils.get_total_norm(grads)

    def beside(self) -> Ranks:
        """The same ranks, for messages of a thread of its own."""
        return self

    def close(self) -> None:
        """Leave the other ranks."""


ONE_RANK = Ranks()
