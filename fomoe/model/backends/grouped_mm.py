"""grouped_mm: torch's own grouped products; bf16 on accelerators, also fp32 on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoe.model.backends.base import Dispatch, Stacks
from fomoe.model.backends.stacked import GroupedProducts, run_stacked

_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

# The kernels read 16 bytes at a time along both widths.
ALIGNMENT_BYTES = 16


def _forward(x: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    return _grouped_mm(x, w.transpose(1, 2), offs=dispatch.ends_R)


def _input_grad(y: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    return _grouped_mm(y, w, offs=dispatch.ends_R)


def _weight_grad(y: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    """For a group without rows the kernel writes zeros: its product sums no elements."""
    return _grouped_mm(y.t(), x, offs=dispatch.ends_R)


PRODUCTS = GroupedProducts(forward=_forward, input_grad=_input_grad, weight_grad=_weight_grad)


def run_grouped_mm(
    x_TD: Tensor,
    gate_A: Tensor,
    dispatch: Dispatch,
    stacks: Stacks,
    *,
    matmul: str,
    recompute: bool,
) -> Tensor:
    """See `Backend`."""
    return run_stacked(x_TD, gate_A, dispatch, stacks, PRODUCTS, recompute)
