"""Expert FFNs and their compute: only executed assignments cost anything.

Resident experts run on a backend (`fomoe.model.backends`). Experts that are passed in as functions
run one by one, plainly; that is also what the backends are tested against.

Shapes: T tokens, K top-k, D model, F hidden, E all experts, R resident experts, A executed
assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fomoe.model.activation import SwiGLUActivation
from fomoe.model.matmul import linear
from fomoe.model.router import Routing

# One expert as a function of its rows: a module, or weights that were fetched for the moment.
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
