"""Split: one product per expert. The default on CPU; it runs on every device.

Experts run in tiles. The experts of a tile share one gather and one activation, so that many small
experts need no more calls than a few large ones, and a tile's buffers fit a CPU's cache, which the
buffers of all experts do not. Two small experts with nearly equal numbers of rows share one batched
product, so that each thread has a matrix of its own instead of half of one. No gradient is filled
with zeros beyond its own rows.

Shapes: T tokens, D model, F hidden, G = 2F, R resident experts, A executed assignments, P rows of
all experts with their padding, N rows of one tile, n rows of one expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe.model.activation import swiglu_activation, swiglu_backward
from fomoe.model.backends.base import Dispatch, Stacks, combine, compute_dtype
from fomoe.model.matmul import TORCH, Product, Products, choose_products

# Rows of a tile, unless one expert has more. From 512 to 8192 the times differ by a few per cent.
TILE_ROWS = 2048

# Experts of more rows have a product of their own, which keeps all threads busy.
PAIR_ROWS = 640

# Most rows by which the experts of a pair differ; or an eighth of the smaller, if that is more.
_UNEVEN = 8


def run_split(
    x_TD: Tensor,
    gate_A: Tensor,
    dispatch: Dispatch,
    stacks: Stacks,
    *,
    matmul: str,
    recompute: bool,
) -> Tensor:
    """See `Backend`."""
    dtype = compute_dtype(x_TD)
    products = choose_products(matmul, x_TD)
    rows = lay_out(dispatch, products)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _Split.apply(x_TD.to(dtype), gate_A, *stacks, rows, products, recompute)


# ------------------------------------------------------------------------------------------- rows


class Group(NamedTuple):
    """Experts of one product, and their rows within a tile: one expert, or two of equal size.

    Attributes:
        experts: their slots, ascending.
        rows: those of the first, then those of the second.
    """

    experts: tuple[int, ...]
    rows: slice

    def rows_of(self, value_NI: Tensor) -> Tensor:
        """[n, I], or [2, n, I]."""
        own = value_NI[self.rows]
        return own if len(self.experts) == 1 else own.view(2, -1, own.shape[-1])

    def weights_of(self, stack_ROI: Tensor) -> Tensor:
        """[O, I], or [2, O, I] in place."""
        first, last = self.experts[0], self.experts[-1]
        return stack_ROI[first] if first == last else stack_ROI[first : last + 1 : last - first]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the row of every executed assignment is.

    Attributes:
        tiles: rows of a tile, and its groups.
        token_P: token of each row; a padding row repeats some token.
        place_A: row of each executed assignment; None if assignment i is row i.
        bags: rows of each token, in the order of its choices, and where each token's rows start.
        empty: slots of experts without rows.
    """

    tiles: list[tuple[slice, list[Group]]]
    token_P: Tensor
    place_A: Tensor | None
    bags: tuple[Tensor, Tensor]
    empty: list[int]

    def spread(self, value_A: Tensor) -> Tensor:
        """One value per row, [P]; 0 for padding, which then adds nothing to any gradient."""
        if self.place_A is None:
            return value_A
        return value_A.new_zeros(len(self.token_P)).index_copy(0, self.place_A, value_A)

    def collect(self, value_P: Tensor) -> Tensor:
        """One value per executed assignment, [A]."""
        return value_P if self.place_A is None else value_P.index_select(0, self.place_A)


def lay_out(dispatch: Dispatch, products: Products) -> Rows:
    """Lay out the rows group by group; those of an expert are padded to its group's size."""
    counts = dispatch.counts
    groups = list(_groups(counts, products))
    tiles = list(_tiles(groups))
    row_A, start_T = dispatch.bags
    shifts, end = [0] * len(counts), 0  # of each expert's rows, from their place by slot
    before = [0, *itertools.accumulate(counts)]
    empty = [slot for slot, count in enumerate(counts) if not count]
    for experts, size in groups:
        for expert in experts:
            shifts[expert], end = end - before[expert], end + size
    if end == sum(counts) and not any(shifts):
        bags = (row_A, start_T)
        return Rows(tiles=tiles, token_P=dispatch.token_A, place_A=None, bags=bags, empty=empty)
    device = dispatch.token_A.device
    shift_A = torch.tensor(shifts, device=device).repeat_interleave(
        dispatch.counts_R, output_size=len(dispatch.token_A)
    )
    place_A = torch.arange(len(shift_A), device=device) + shift_A
    token_P = dispatch.token_A.new_zeros(end).index_copy(0, place_A, dispatch.token_A)
    bags = (place_A.index_select(0, row_A), start_T)
    return Rows(tiles=tiles, token_P=token_P, place_A=place_A, bags=bags, empty=empty)


def _groups(counts: list[int], products: Products) -> Iterator[tuple[tuple[int, ...], int]]:
    """The experts of each product, and the rows of one expert in it, with its padding."""
    small: list[int] = []
    for expert, count in enumerate(counts):
        if products is TORCH and 0 < count <= PAIR_ROWS:
            small.append(expert)
        elif count:
            yield (expert,), count
    small.sort(key=counts.__getitem__, reverse=True)
    while small:
        first = small.pop()
        if small and counts[small[-1]] - counts[first] <= max(_UNEVEN, counts[first] // 8):
            second = small.pop()
            yield (min(first, second), max(first, second)), counts[second]
        else:
            yield (first,), counts[first]


def _tiles(groups: list[tuple[tuple[int, ...], int]]) -> Iterator[tuple[slice, list[Group]]]:
    """Consecutive groups, as many as fill a tile; a larger group has a tile of its own."""
    members: list[Group] = []
    start, rows = 0, 0
    for experts, size in groups:
        size *= len(experts)
        if members and rows + size > TILE_ROWS:
            yield slice(start, start + rows), members
            start, members, rows = start + rows, [], 0
        members.append(Group(experts, slice(rows, rows + size)))
        rows += size
    if members:
        yield slice(start, start + rows), members


# --------------------------------------------------------------------------------------- products


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_A: Tensor,
        gate_up_RGD: Tensor,
        down_RDF: Tensor,
        frozen: tuple[Tensor, Tensor] | None,
        rows: Rows,
        products: Products,
        recompute: bool,
    ) -> Tensor:
        whole = Stacks(gate_up_RGD, down_RDF, frozen).whole(gate_up_RGD.dtype)
        y_PD = x_TD.new_empty(len(rows.token_P), x_TD.shape[1])
        hidden: list[Tensor] = []
        for tile, groups in rows.tiles:
            x_ND = x_TD.index_select(0, rows.token_P[tile])
            hidden += _forward(x_ND, groups, *whole, products, y_PD[tile])
        keep = any(ctx.needs_input_grad) and not recompute
        kept = [y_PD, *hidden] if keep else []
        ctx.save_for_backward(x_TD, gate_A, gate_up_RGD, down_RDF, *kept)
        ctx.frozen, ctx.rows, ctx.products = frozen, rows, products
        return combine(y_PD, rows.bags, rows.spread(gate_A))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows, products = ctx.rows, ctx.products
        x_TD, gate_A, own_gate_up, own_down, *kept = ctx.saved_tensors
        own = own_gate_up, own_down
        gate_up_RGD, down_RDF = whole = Stacks(*own, ctx.frozen).whole(own_down.dtype)
        grad_TD, gate_P = grad_TD.contiguous(), rows.spread(gate_A)
        dx_PD, dgate_P = x_TD.new_empty(len(rows.token_P), x_TD.shape[1]), torch.empty_like(gate_P)
        grads = [
            torch.empty_like(stack) if needed else None
            for stack, needed in zip(own, ctx.needs_input_grad[2:4], strict=True)
        ]
        for index, (tile, groups) in enumerate(rows.tiles):
            token_N = rows.token_P[tile]
            x_ND = x_TD.index_select(0, token_N)
            if kept:
                y_ND, (h_NG, silu_NF) = kept[0][tile], kept[1 + 2 * index : 3 + 2 * index]
            else:
                y_ND = torch.empty_like(x_ND)
                h_NG, silu_NF = _forward(x_ND, groups, *whole, products, y_ND)
            dy_ND = grad_TD.index_select(0, token_N)
            torch.sum(dy_ND * y_ND, -1, dtype=gate_P.dtype, out=dgate_P[tile])
            dy_ND *= gate_P[tile, None].to(dy_ND.dtype)
            da_NF = _each(products.input_grad, dy_ND, groups, down_RDF)
            dh_NG = swiglu_backward(da_NF, h_NG, silu_NF)
            a_NF = silu_NF * h_NG.chunk(2, dim=-1)[1]
            _each(products.input_grad, dh_NG, groups, gate_up_RGD, dx_PD[tile])
            for grad, out_NO, into_NI in zip(grads, (dh_NG, dy_ND), (x_ND, a_NF), strict=True):
                if grad is not None:
                    _weight_grads(products, groups, out_NO, into_NI, grad)
        for grad in grads:
            if grad is not None:
                grad[[slot for slot in rows.empty if slot < len(grad)]] = 0
        x_grad_TD = combine(dx_PD, rows.bags, None)
        return x_grad_TD, rows.collect(dgate_P), *grads, None, None, None, None


def _weight_grads(
    products: Products, groups: list[Group], out_NO: Tensor, into_NI: Tensor, grad_ROI: Tensor
) -> None:
    """Fill the rows of the trained experts among a tile's groups."""
    for group in groups:
        own = [slot for slot in group.experts if slot < len(grad_ROI)]
        if not own:
            continue
        pair = group.rows_of(out_NO), group.rows_of(into_NI)
        if len(group.experts) == 1 and out_NO.dtype == grad_ROI.dtype:
            products.weight_grad(*pair, grad_ROI[own[0]])
            continue
        both = products.weight_grad(*pair)
        for slot, grad_OI in zip(own, both.view(-1, *both.shape[-2:]), strict=False):
            grad_ROI[slot] = grad_OI


def _forward(
    x_ND: Tensor,
    groups: list[Group],
    gate_up_RGD: Tensor,
    down_RDF: Tensor,
    products: Products,
    y_ND: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill the outputs of one tile; returns gate and up, and silu of the gate."""
    h_NG = _each(products.forward, x_ND, groups, gate_up_RGD)
    silu_NF, a_NF = swiglu_activation(h_NG)
    _each(products.forward, a_NF, groups, down_RDF, y_ND)
    return h_NG, silu_NF


def _each(
    product: Product,
    x_NI: Tensor,
    groups: list[Group],
    stack_ROI: Tensor,
    out_NO: Tensor | None = None,
) -> Tensor:
    """One product per group of a tile, into one buffer."""
    if out_NO is None and len(groups) == len(groups[0].experts) == 1:
        return product(x_NI, groups[0].weights_of(stack_ROI).to(x_NI.dtype))
    if out_NO is None:
        out_NO = x_NI.new_empty(len(x_NI), stack_ROI[0].numel() // x_NI.shape[1])
    for group in groups:
        weights = group.weights_of(stack_ROI).to(x_NI.dtype)
        product(group.rows_of(x_NI), weights, group.rows_of(out_NO))
    return out_NO
