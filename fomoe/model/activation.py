"""SwiGLU's activation, silu(gate) * up, with a backward that fills one buffer.

Gate and up are the two halves of one product's output. Autograd would make a gradient for each half
and then copy both into one.

Shapes: N rows, F hidden, G = 2F.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_activation(h_NG: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) and silu(gate) * up of h = [gate, up] (2002.05202), without a graph."""
    gate_NF, up_NF = h_NG.chunk(2, dim=-1)
    silu_NF = F.silu(gate_NF)
    return silu_NF, silu_NF * up_NF


def swiglu_backward(grad_NF: Tensor, h_NG: Tensor, silu_NF: Tensor) -> Tensor:
    """Gradient of h; overwrites `grad_NF`."""
    gate_NF, up_NF = h_NG.chunk(2, dim=-1)
    dh_NG = torch.empty_like(h_NG)
    dgate_NF, dup_NF = dh_NG.chunk(2, dim=-1)
    torch.mul(grad_NF, silu_NF, out=dup_NF)
    grad_NF.mul_(up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF, gate_NF, grad_input=dgate_NF)
    return dh_NG


class SwiGLUActivation(torch.autograd.Function):
    """`swiglu_activation` for autograd."""

    @staticmethod
    def forward(ctx: Any, h_NG: Tensor) -> Tensor:
        silu_NF, a_NF = swiglu_activation(h_NG)
        ctx.save_for_backward(h_NG, silu_NF)
        return a_NF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        h_NG, silu_NF = ctx.saved_tensors
        return swiglu_backward(grad_NF.clone(), h_NG, silu_NF)
