"""Split: one product per expert on its own parameters. The default on CPU, right everywhere.

Experts run in tiles: as many of them as fill a tile's rows share one gather and one activation, so
that many small experts cost no more calls than a few large ones, and a tile's buffers fit a CPU's
cache, which those of all experts do not. No gradient is ever zero-filled beyond its own rows.

Shapes: T tokens, D model, F hidden, G = 2F, A executed assignments, P rows of all experts with
their padding, N rows of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoe.model.activation import swiglu_activation, swiglu_backward
from fomoe.model.backends.base import Dispatch, ExpertWeights, combine, compute_dtype
from fomoe.model.matmul import ONEDNN, Product, Products, choose_products

# Rows of a tile, unless one expert has more. From 512 to 8192 the times differ by a few per cent.
TILE_ROWS = 2048

Members = list[tuple[int, slice]]  # experts of a tile, and their rows within it


def run_split(x_TD: Tensor, gate_A: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
    """See `Backend`."""
    dtype = compute_dtype(x_TD)
    if not len(dispatch.token_A):
        return torch.zeros_like(x_TD, dtype=dtype)
    pairs = [p for pair in zip(weights.gate_ups, weights.downs, strict=True) for p in pair]
    products = choose_products(weights.matmul, x_TD)
    rows = lay_out(dispatch, padded=products is ONEDNN)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _Split.apply(x_TD.to(dtype), gate_A, rows, products, weights.recompute, *pairs)


# ------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where every executed assignment's row stands.

    Attributes:
        tiles: rows of a tile, and of each of its experts within it.
        token_P: token of each row; a padding row repeats some token.
        place_A: row of each executed assignment; None where there is no padding.
        bags: rows of each token, in the order of its choices, and where each token's rows start.
    """

    tiles: list[tuple[slice, Members]]
    token_P: Tensor
    place_A: Tensor | None
    bags: tuple[Tensor, Tensor]

    def spread(self, value_A: Tensor) -> Tensor:
        """One value per row, [P]; 0 for padding, which then adds nothing to any gradient."""
        if self.place_A is None:
            return value_A
        return value_A.new_zeros(len(self.token_P)).index_copy(0, self.place_A, value_A)

    def collect(self, value_P: Tensor) -> Tensor:
        """One value per executed assignment, [A]."""
        return value_P if self.place_A is None else value_P.index_select(0, self.place_A)


def lay_out(dispatch: Dispatch, *, padded: bool) -> Rows:
    """Rows in the order of the experts, each expert's padded up to a size that oneDNN has met."""
    sizes = [padded_rows(count) if padded and count else count for count in dispatch.counts]
    tiles = list(_tiles(sizes))
    row_A, start_T = dispatch.bags
    if sizes == dispatch.counts:
        return Rows(tiles=tiles, token_P=dispatch.token_A, place_A=None, bags=(row_A, start_T))
    device = dispatch.token_A.device
    added_R = torch.tensor(sizes, device=device) - dispatch.counts_R
    shift_A = (added_R.cumsum(0) - added_R).repeat_interleave(
        dispatch.counts_R, output_size=len(dispatch.token_A)
    )
    place_A = torch.arange(len(shift_A), device=device) + shift_A
    token_P = dispatch.token_A.new_zeros(sum(sizes)).index_copy(0, place_A, dispatch.token_A)
    bags = (place_A.index_select(0, row_A), start_T)
    return Rows(tiles=tiles, token_P=token_P, place_A=place_A, bags=bags)


def _tiles(sizes: list[int]) -> Iterator[tuple[slice, Members]]:
    """Experts with rows, as many in a row as fill a tile; a larger one has a tile of its own."""
    members: Members = []
    start, rows = 0, 0
    for expert, size in enumerate(sizes):
        if members and rows + size > TILE_ROWS:
            yield slice(start, start + rows), members
            start, members, rows = start + rows, [], 0
        if size:
            members.append((expert, slice(rows, rows + size)))
            rows += size
    if members:
        yield slice(start, start + rows), members


def padded_rows(count: int) -> int:
    """Rows that a product of `count` rows runs with on oneDNN: at most 3 % more, or up to 8.

    oneDNN builds a kernel for every new size, which costs as much as the product; counts differ
    at every step, so they are rounded up to few sizes.
    """
    step = max(8, 1 << (count.bit_length() - 6)) if count > 64 else 8
    return -(-count // step) * step


# --------------------------------------------------------------------------------------- products


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_A: Tensor,
        rows: Rows,
        products: Products,
        recompute: bool,
        *pairs: Tensor,
    ) -> Tensor:
        y_PD = x_TD.new_empty(len(rows.token_P), x_TD.shape[1])
        hidden: list[Tensor] = []
        for tile, members in rows.tiles:
            x_ND = x_TD.index_select(0, rows.token_P[tile])
            hidden += _forward(x_ND, members, pairs, products, y_PD[tile])
        keep = any(ctx.needs_input_grad) and not recompute
        kept = [y_PD, *hidden] if keep else []
        ctx.save_for_backward(x_TD, gate_A, *pairs, *kept)
        ctx.rows, ctx.products, ctx.num_kept = rows, products, len(kept)
        return combine(y_PD, rows.bags, rows.spread(gate_A))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows, products = ctx.rows, ctx.products
        x_TD, gate_A, *rest = ctx.saved_tensors
        pairs, kept = rest[: len(rest) - ctx.num_kept], rest[len(rest) - ctx.num_kept :]
        grad_TD, gate_P = grad_TD.contiguous(), rows.spread(gate_A)
        dx_PD, dgate_P = x_TD.new_empty(len(rows.token_P), x_TD.shape[1]), torch.empty_like(gate_P)
        grads: list[Tensor | None] = [None] * len(pairs)
        for index, (tile, members) in enumerate(rows.tiles):
            token_N = rows.token_P[tile]
            x_ND = x_TD.index_select(0, token_N)
            if kept:
                y_ND, (h_NG, silu_NF) = kept[0][tile], kept[1 + 2 * index : 3 + 2 * index]
            else:
                y_ND = torch.empty_like(x_ND)
                h_NG, silu_NF = _forward(x_ND, members, pairs, products, y_ND)
            dy_ND = grad_TD.index_select(0, token_N)
            torch.sum(dy_ND * y_ND, -1, dtype=gate_P.dtype, out=dgate_P[tile])
            dy_ND *= gate_P[tile, None].to(dy_ND.dtype)
            da_NF = _each(products.input_grad, dy_ND, members, pairs[1::2])
            dh_NG = swiglu_backward(da_NF, h_NG, silu_NF)
            a_NF = silu_NF * h_NG.chunk(2, dim=-1)[1]
            _each(products.input_grad, dh_NG, members, pairs[::2], dx_PD[tile])
            for expert, own in members:
                for number, out, into in ((2 * expert, dh_NG, x_ND), (2 * expert + 1, dy_ND, a_NF)):
                    if ctx.needs_input_grad[5 + number]:
                        grad = products.weight_grad(out[own], into[own])
                        grads[number] = grad.to(pairs[number].dtype)
        x_grad_TD = combine(dx_PD, rows.bags, None)
        return x_grad_TD, rows.collect(dgate_P), None, None, None, *grads


def _forward(
    x_ND: Tensor,
    members: Members,
    pairs: Sequence[Tensor],
    products: Products,
    y_ND: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill the outputs of one tile; returns gate and up, and silu of the gate."""
    h_NG = _each(products.forward, x_ND, members, pairs[::2])
    silu_NF, a_NF = swiglu_activation(h_NG)
    _each(products.forward, a_NF, members, pairs[1::2], y_ND)
    return h_NG, silu_NF


def _each(
    product: Product,
    x_NI: Tensor,
    members: Members,
    weights: Sequence[Tensor],
    out_NO: Tensor | None = None,
) -> Tensor:
    """One product per expert of a tile, into one buffer."""
    if out_NO is None and len(members) == 1:
        return product(x_NI, weights[members[0][0]].to(x_NI.dtype))
    if out_NO is None:
        first = weights[members[0][0]]
        out_NO = x_NI.new_empty(len(x_NI), first.numel() // x_NI.shape[1])
    for expert, own in members:
        product(x_NI[own], weights[expert].to(x_NI.dtype), out_NO[own])
    return out_NO
