"""What every expert backend takes and returns.

Shapes: T tokens, K top-k, D model, F hidden, E all experts, R resident experts, A executed
assignments, sorted by resident expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.model.router import Routing


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Which token goes to which resident expert; absent experts never reach a backend.

    Attributes:
        order_A: int64, position of each executed assignment among the T x K, sorted by expert.
        token_A: int64, its token.
        counts_R: int64, executed assignments per resident expert.
        served_T: int64, executed assignments per token.
    """

    order_A: Tensor
    token_A: Tensor
    counts_R: Tensor
    served_T: Tensor
    host_counts: list[int] | None

    @cached_property
    def counts(self) -> list[int]:
        """`counts_R` on the host: the layer's one transfer, unless it was made before."""
        return self.counts_R.tolist() if self.host_counts is None else self.host_counts

    @cached_property
    def ends_R(self) -> Tensor:
        """int32, where each expert's rows end."""
        return self.counts_R.cumsum(0, dtype=torch.int32)

    @cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """Rows of each token, in the order of its choices, and where each token's rows start."""
        return self.order_A.argsort(), self.served_T.cumsum(0) - self.served_T


def plan_dispatch(routing: Routing, slot_E: Tensor, num_resident: int) -> Dispatch:
    """Compact a batch's assignments to those that a resident expert executes.

    If every expert is resident, all T x K assignments are executed and no size has to be read from
    the device; otherwise the counts are read, once.
    """
    top_k = routing.expert_TK.shape[-1]
    slot_A = slot_E[routing.expert_TK].flatten()
    counts_R = torch.bincount(slot_A, minlength=num_resident + 1)[:num_resident]
    order_A = slot_A.argsort(stable=True)
    host_counts = None
    if num_resident < len(slot_E):
        host_counts = counts_R.tolist()
        order_A = order_A[: sum(host_counts)]
    return Dispatch(
        order_A=order_A,
        token_A=order_A // top_k,
        counts_R=counts_R,
        served_T=routing.executed_TK.sum(-1),
        host_counts=host_counts,
    )


class Stacks(NamedTuple):
    """Weights of a layer's resident experts, one row per slot; trained experts come first.

    Attributes:
        gate_up, down: [R, 2F, D] and [R, D, F] of the experts that are trained.
        frozen: the same for the experts that are stored but not trained; None without them.
    """

    gate_up: Tensor
    down: Tensor
    frozen: tuple[Tensor, Tensor] | None = None

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up and down of all slots; no copy if none is frozen and the dtype is the same."""
        both = (self.gate_up, self.down)
        if self.frozen is not None:
            both = tuple(torch.cat(pair) for pair in zip(both, self.frozen, strict=True))
        return both[0].to(dtype), both[1].to(dtype)


class Backend(Protocol):
    """Sum of gate x expert(x) over each token's executed assignments, [T, D].

    Differentiable in x_TD, gate_A and the trained experts' stacks. A token that executes nothing
    gets exactly 0, and so does the gradient of an expert without rows.

    Args:
        matmul: model.matmul.
        recompute: whether the backward pass computes the hidden activations again.
    """

    def __call__(
        self,
        x_TD: Tensor,
        gate_A: Tensor,
        dispatch: Dispatch,
        stacks: Stacks,
        *,
        matmul: str,
        recompute: bool,
    ) -> Tensor: ...


def combine(y_AD: Tensor, bags: tuple[Tensor, Tensor], gate_A: Tensor | None) -> Tensor:
    """Sum of each token's rows, weighted by gates if given; no atomics, so the order is fixed."""
    row_A, start_T = bags
    weight = None if gate_A is None else gate_A[row_A].to(y_AD.dtype)
    return F.embedding_bag(row_A, y_AD, start_T, mode="sum", per_sample_weights=weight)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
