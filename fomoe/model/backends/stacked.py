"""Stacked: all resident experts in a few grouped products. The default on accelerators.

Rows are compacted to executed assignments before the first product: rows past the last group end
are left uninitialised by grouped kernels, forward and backward, and here there are none.

Shapes: T tokens, D model, F hidden, R resident experts, A executed assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoe.model.activation import swiglu_activation, swiglu_backward
from fomoe.model.backends.base import Dispatch, Stacks, combine, compute_dtype


@dataclass(frozen=True, kw_only=True)
class GroupedProducts:
    """Products of one library, over the groups of rows that belong to each expert.

    Attributes:
        forward: x [A, I], w [R, O, I] -> [A, O].
        input_grad: y [A, O], w [R, O, I] -> [A, I].
        weight_grad: y [A, O], x [A, I] -> [R, O, I]; exactly 0 for experts without rows.
    """

    forward: Callable[[Tensor, Tensor, Dispatch], Tensor]
    input_grad: Callable[[Tensor, Tensor, Dispatch], Tensor]
    weight_grad: Callable[[Tensor, Tensor, Dispatch], Tensor]


def run_stacked(
    x_TD: Tensor,
    gate_A: Tensor,
    dispatch: Dispatch,
    stacks: Stacks,
    products: GroupedProducts,
    recompute: bool,
) -> Tensor:
    """See `Backend`."""
    dtype = compute_dtype(x_TD)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _Stacked.apply(
            x_TD.to(dtype),
            gate_A,
            stacks.gate_up,
            stacks.down,
            stacks.frozen,
            dispatch,
            products,
            recompute,
        )


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_A: Tensor,
        gate_up: Tensor,
        down: Tensor,
        frozen: tuple[Tensor, Tensor] | None,
        dispatch: Dispatch,
        products: GroupedProducts,
        recompute: bool,
    ) -> Tensor:
        whole = Stacks(gate_up, down, frozen).whole(x_TD.dtype)
        x_AD, h_AG, silu_AF, y_AD = _forward(x_TD, *whole, dispatch, products)
        hidden = [] if recompute else [x_AD, h_AG, silu_AF, y_AD]
        ctx.save_for_backward(x_TD, gate_A, gate_up, down, *hidden)
        ctx.frozen, ctx.dispatch, ctx.products = frozen, dispatch, products
        return combine(y_AD, dispatch.bags, gate_A)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        dispatch, products = ctx.dispatch, ctx.products
        x_TD, gate_A, own_gate_up, own_down, *hidden = ctx.saved_tensors
        gate_up, down = Stacks(own_gate_up, own_down, ctx.frozen).whole(x_TD.dtype)
        x_AD, h_AG, silu_AF, y_AD = hidden or _forward(x_TD, gate_up, down, dispatch, products)
        dy_AD = grad_TD.contiguous().index_select(0, dispatch.token_A)
        gate_grad_A = (dy_AD * y_AD).sum(-1, dtype=gate_A.dtype)
        dy_AD *= gate_A.unsqueeze(-1).to(dy_AD.dtype)
        dh_AG = swiglu_backward(products.input_grad(dy_AD, down, dispatch), h_AG, silu_AF)
        a_AF = silu_AF * h_AG.chunk(2, dim=-1)[1]
        grads = [
            products.weight_grad(out, into, dispatch)[: len(own)].to(own.dtype) if needed else None
            for out, into, own, needed in (
                (dh_AG, x_AD, own_gate_up, ctx.needs_input_grad[2]),
                (dy_AD, a_AF, own_down, ctx.needs_input_grad[3]),
            )
        ]
        dx_AD = products.input_grad(dh_AG, gate_up, dispatch)
        x_grad_TD = combine(dx_AD, dispatch.bags, None)
        return x_grad_TD, gate_grad_A, *grads, None, None, None, None


def _forward(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, dispatch: Dispatch, products: GroupedProducts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_AD = x_TD.index_select(0, dispatch.token_A)
    h_AG = products.forward(x_AD, gate_up, dispatch)
    silu_AF, a_AF = swiglu_activation(h_AG)
    return x_AD, h_AG, silu_AF, products.forward(a_AF, down, dispatch)
