"""Split: one expert after the other on its own parameters. The default on CPU, right everywhere.

An expert's rows are gathered, run and added to the output before the next expert starts: the
buffers of one expert fit a CPU's cache, those of all do not, and no gradient is ever zero-filled
beyond its own rows.

Shapes: T tokens, D model, F hidden, A executed assignments, N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fomoe.model.activation import swiglu_activation, swiglu_backward
from fomoe.model.backends.base import Dispatch, ExpertWeights, compute_dtype
from fomoe.model.matmul import ONEDNN, Products, choose_products


def run_split(x_TD: Tensor, gate_A: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
    """See `Backend`."""
    pairs = [p for pair in zip(weights.gate_ups, weights.downs, strict=True) for p in pair]
    dtype = compute_dtype(x_TD)
    products = choose_products(weights.matmul, x_TD)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _Split.apply(x_TD.to(dtype), gate_A, dispatch, products, weights.recompute, *pairs)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_A: Tensor,
        dispatch: Dispatch,
        products: Products,
        recompute: bool,
        *pairs: Tensor,
    ) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        keep = any(ctx.needs_input_grad) and not recompute
        hidden = []
        for expert, rows in _rows(dispatch.counts):
            gate_up, down = (w.to(x_TD.dtype) for w in pairs[2 * expert : 2 * expert + 2])
            token_N = dispatch.token_A[rows]
            x_ND = _gather(x_TD, token_N, products)
            h_NG, a_NF, y_ND = _forward(x_ND, gate_up, down, products)
            y_ND = y_ND[: len(token_N)]
            out_TD.index_add_(0, token_N, y_ND * gate_A[rows, None].to(y_ND.dtype))
            if keep:
                hidden += [h_NG, a_NF, y_ND]
        ctx.save_for_backward(x_TD, gate_A, *pairs, *hidden)
        ctx.dispatch, ctx.products, ctx.kept = dispatch, products, len(hidden)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        dispatch, products = ctx.dispatch, ctx.products
        x_TD, gate_A, *rest = ctx.saved_tensors
        pairs, hidden = rest[: len(rest) - ctx.kept], iter(rest[len(rest) - ctx.kept :])
        x_grad_TD, gate_grad_A = torch.zeros_like(x_TD), torch.empty_like(gate_A)
        grads: list[Tensor | None] = [None] * len(pairs)
        grad_TD = grad_TD.contiguous()
        for expert, rows in _rows(dispatch.counts):
            gate_up, down = (w.to(x_TD.dtype) for w in pairs[2 * expert : 2 * expert + 2])
            token_N = dispatch.token_A[rows]
            x_ND = _gather(x_TD, token_N, products)
            if ctx.kept:
                h_NG, a_NF, y_ND = next(hidden), next(hidden), next(hidden)
            else:
                h_NG, a_NF, y_ND = _forward(x_ND, gate_up, down, products)
                y_ND = y_ND[: len(token_N)]
            dy_ND = _gather(grad_TD, token_N, products)
            own_ND = dy_ND[: len(token_N)]
            gate_grad_A[rows] = (own_ND * y_ND).sum(-1, dtype=gate_A.dtype)
            own_ND *= gate_A[rows, None].to(own_ND.dtype)
            if ctx.needs_input_grad[6 + 2 * expert]:
                grads[2 * expert + 1] = products.weight_grad(dy_ND, a_NF).to(down.dtype)
            dh_NG = swiglu_backward(products.input_grad(dy_ND, down), h_NG)
            if ctx.needs_input_grad[5 + 2 * expert]:
                grads[2 * expert] = products.weight_grad(dh_NG, x_ND).to(down.dtype)
            dx_ND = products.input_grad(dh_NG, gate_up)[: len(token_N)]
            x_grad_TD.index_add_(0, token_N, dx_ND)
        return x_grad_TD, gate_grad_A, None, None, None, *grads


def _forward(
    x_ND: Tensor, gate_up: Tensor, down: Tensor, products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    h_NG = products.forward(x_ND, gate_up)
    a_NF = swiglu_activation(h_NG)
    return h_NG, a_NF, products.forward(a_NF, down)


def _rows(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and where these are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def padded_rows(count: int) -> int:
    """Rows that a product of `count` rows runs with on oneDNN: at most 3 % more, or up to 8.

    oneDNN builds a kernel for every new size, which costs as much as the product; counts differ
    at every step, so they are rounded up to few sizes. The added rows are zero.
    """
    step = max(8, 1 << (count.bit_length() - 6)) if count > 64 else 8
    return -(-count // step) * step


def _gather(x_TD: Tensor, token_N: Tensor, products: Products) -> Tensor:
    """Rows of x, followed by zero rows up to the padded size where the products need it."""
    if products is not ONEDNN:
        return x_TD.index_select(0, token_N)
    count = len(token_N)
    x_ND = x_TD.new_empty(padded_rows(count), x_TD.shape[1])
    torch.index_select(x_TD, 0, token_N, out=x_ND[:count])
    x_ND[count:] = 0
    return x_ND
