"""SwiGLU's activation, silu(gate) * up, with a backward that fills one buffer.

Gate and up stand side by side in one product's output. Autograd would give each half its own
gradient and copy both together.

Shapes: N rows, F hidden, G = 2F.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_activation(h_NG: Tensor) -> Tensor:
    """silu(gate) * up of h = [gate, up] (2002.05202), without a graph."""
    gate_NF, up_NF = h_NG.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def swiglu_backward(grad_NF: Tensor, h_NG: Tensor) -> Tensor:
    """Gradient of h; overwrites `grad_NF`."""
    gate_NF, up_NF = h_NG.chunk(2, dim=-1)
    dh_NG = torch.empty_like(h_NG)
    dgate_NF, dup_NF = dh_NG.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate_NF, out=dup_NF)
    dup_NF.mul_(grad_NF)
    grad_NF.mul_(up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_NF, gate_NF, grad_input=dgate_NF)
    return dh_NG


class SwiGLUActivation(torch.autograd.Function):
    """`swiglu_activation` in a graph."""

    @staticmethod
    def forward(ctx: Any, h_NG: Tensor) -> Tensor:
        ctx.save_for_backward(h_NG)
        return swiglu_activation(h_NG)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (h_NG,) = ctx.saved_tensors
        return swiglu_backward(grad_NF.clone(), h_NG)
