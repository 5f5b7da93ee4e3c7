"""Expert FFNs and their compute: only executed assignments cost anything.

Resident experts are stacked and run on a backend (`fomoe.model.backends`). Experts that are passed
in as functions run one by one; tests compare the backends with this plain form.

Shapes: T tokens, K top-k, D model, F hidden, E all experts, R resident experts, A executed
assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fomoe.config import ModelConfig
from fomoe.model.activation import SwiGLUActivation
from fomoe.model.backends.base import Stacks, compute_dtype, plan_dispatch
from fomoe.model.backends.choice import BACKENDS, choose_backend
from fomoe.model.matmul import linear
from fomoe.model.router import Routing

# One expert as a function of its rows: a module, or weights that were fetched for one use.
Expert = Callable[[Tensor], Tensor]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up rows in one matrix (2002.05202)."""

    def __init__(self, d_model: int, width: int, matmul: str) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * width, d_model))
        self.down = nn.Parameter(torch.empty(d_model, width))
        self.matmul = matmul

    def forward(self, x_TD: Tensor) -> Tensor:
        return swiglu(x_TD, gate_up=self.gate_up, down=self.down, matmul=self.matmul)


def swiglu(x_TD: Tensor, *, gate_up: Tensor, down: Tensor, matmul: str = "auto") -> Tensor:
    """Apply one SwiGLU FFN; gate_up is [2F, D], down is [D, F]."""
    h = linear(x_TD, gate_up, matmul)
    return linear(SwiGLUActivation.apply(h), down, matmul)


class Experts(nn.Module):
    """A layer's resident experts, one row per expert in each stack.

    Args:
        model: the model section of the config.
        residents: ids of the experts stored here.
        trained: those that are trained here; the others are frozen. None: all.

    Attributes:
        ids: expert id of each slot: the trained ones, then the frozen ones.
        gate_up, down: [R, 2F, D] and [R, D, F] of the trained experts; None if there are none.
        frozen_gate_up, frozen_down: the same for the frozen experts.
        slot_E: int64, slot of each expert; the number of residents for absent ones.
        resident_E: bool, whether an expert is resident.
    """

    gate_up: nn.Parameter | None
    down: nn.Parameter | None
    frozen_gate_up: nn.Parameter | None
    frozen_down: nn.Parameter | None
    slot_E: Tensor
    resident_E: Tensor

    def __init__(
        self,
        model: ModelConfig,
        residents: tuple[int, ...],
        trained: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.options = model
        own = tuple(e for e in residents if trained is None or e in trained)
        frozen = tuple(e for e in residents if e not in own)
        self.ids = own + frozen
        self.gate_up, self.down = _stacks(model, len(own), trained=True)
        self.frozen_gate_up, self.frozen_down = _stacks(model, len(frozen), trained=False)
        slot_E = slots(self.ids, model.num_experts)
        self.register_buffer("slot_E", slot_E, persistent=False)
        self.register_buffer("resident_E", slot_E < len(self.ids), persistent=False)

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, part: str, expert: int) -> tuple[str, int]:
        """Name of the parameter here that holds a resident expert's matrix, and its row."""
        slot = self.ids.index(expert)
        num_trained = 0 if self.gate_up is None else len(self.gate_up)
        return (part, slot) if slot < num_trained else (f"frozen_{part}", slot - num_trained)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sum of gate x expert(x) over each token's executed assignments, [T, D]."""
        dispatch = plan_dispatch(routing, self.slot_E, len(self))
        dtype = compute_dtype(x_TD)
        if not len(dispatch.token_A):
            return torch.zeros_like(x_TD, dtype=dtype) + self._nothing()
        gate_A = routing.gate_TK.flatten().index_select(0, dispatch.order_A)
        backend = BACKENDS[choose_backend(self.options, x_TD.device, dtype)]
        recompute = self.options.recompute == "experts"
        return backend(
            x_TD, gate_A, dispatch, self._all(), matmul=self.options.matmul, recompute=recompute
        )

    def _nothing(self) -> Tensor:
        """A zero that depends on the trained stacks, whose gradients are then zeros, not absent:
        where ranks share them, every rank has to reduce the same ones."""
        own = [p.flatten()[:1] for p in (self.gate_up, self.down) if p is not None]
        return 0 * torch.cat(own).sum() if own else self.resident_E.new_zeros((), dtype=torch.int64)

    def _all(self) -> Stacks:
        frozen = None
        if self.frozen_gate_up is not None and self.frozen_down is not None:
            frozen = (self.frozen_gate_up, self.frozen_down)
        if self.gate_up is None or self.down is None:
            assert frozen is not None
            return Stacks(*frozen)
        return Stacks(self.gate_up, self.down, frozen)


def _stacks(
    model: ModelConfig, num_experts: int, *, trained: bool
) -> tuple[nn.Parameter, nn.Parameter] | tuple[None, None]:
    if not num_experts:
        return None, None
    gate_up = torch.empty(num_experts, 2 * model.expert_width, model.d_model)
    down = torch.empty(num_experts, model.d_model, model.expert_width)
    return nn.Parameter(gate_up, trained), nn.Parameter(down, trained)


def slots(experts: tuple[int, ...], num_experts: int) -> Tensor:
    """int64 [E], the position of each expert in `experts`; len(experts) for absent ones."""
    slot_E = torch.full((num_experts,), len(experts))
    if experts:
        slot_E[list(experts)] = torch.arange(len(experts))
    return slot_E


def run_experts(
    x_TD: Tensor, routing: Routing, experts: Mapping[int, Expert], slot_E: Tensor
) -> Tensor:
    """Sum of gate x expert(x) over each token's executed assignments, [T, D].

    Assignments are compacted to the resident experts before any product, so absent experts need no
    memory and a token that executes nothing gets exactly 0. One device-to-host transfer.

    Args:
        routing: assignments of the T tokens.
        experts: resident experts by id.
        slot_E: int64, position of each resident expert in `experts`; R for absent ones.
    """
    num_resident = len(experts)
    if num_resident == 0:
        return torch.zeros_like(x_TD)
    top_k = routing.expert_TK.shape[-1]
    slot_A = slot_E[routing.expert_TK].flatten()
    counts = torch.bincount(slot_A, minlength=num_resident + 1)[:num_resident].tolist()
    order_A = slot_A.argsort(stable=True)[: sum(counts)]
    token_A = order_A // top_k
    rows = x_TD.index_select(0, token_A).split(counts)
    # Empty experts are left out of the graph: a product over no rows still costs a kernel.
    outputs = [e(x) for e, x, count in zip(experts.values(), rows, counts, strict=True) if count]
    if not outputs:
        return torch.zeros_like(x_TD)
    y_AD = torch.cat(outputs)
    y_AD = y_AD * routing.gate_TK.flatten()[order_A].to(y_AD.dtype).unsqueeze(-1)
    return torch.zeros(x_TD.shape, dtype=y_AD.dtype, device=y_AD.device).index_add(0, token_A, y_AD)
