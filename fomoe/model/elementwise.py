"""RMSNorm and rotary positions in few passes over memory.

On CPU torch builds both from many small operations, each of which reads and writes the whole
hidden state, and again in the backward pass. Accelerators have fused kernels of their own.

Shapes: N rows, D model, S sequence, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (1910.07467)."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight_D, eps).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        scale_N1 = norm_N1.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (x_ND * scale_N1).mul_(weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        size = x_ND.shape[-1]
        # LayerNorm's kernel with a mean of 0. It also subtracts each row's mean gradient, which is
        # added again below.
        x_grad_ND, weight_grad_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_ND,
            x_ND,
            [size],
            torch.zeros_like(scale_N1),
            scale_N1,
            weight_D,
            None,
            [True, True, False],
        )
        mean_N1 = (grad_ND @ weight_D).unsqueeze(-1) / size
        return x_grad_ND.add_(mean_N1 * scale_N1), weight_grad_D, None


def rotate(x: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotary positions on the last two dimensions [S, H], halves paired (2104.09864)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        left, right = x.chunk(2, dim=-1)
        return (x * cos_SH + torch.cat([-right, left], dim=-1) * sin_SH).to(x.dtype)
    return _Rotate.apply(x, cos_SH, sin_SH)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SH, sin_SH)
        return turn(x, cos_SH, sin_SH, 1, out=x.new_empty(x.shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos_SH, sin_SH = ctx.saved_tensors
        return turn(grad, cos_SH, sin_SH, -1, out=torch.empty_like(grad)), None, None


def turn(x: Tensor, cos_SH: Tensor, sin_SH: Tensor, sign: int, *, out: Tensor) -> Tensor:
    """Rotate by the angles (sign 1) or back (-1, which is also the gradient), without a graph."""
    half = x.shape[-1] // 2
    torch.mul(x, cos_SH, out=out)
    sin = sin_SH[:, :half]  # both halves of the table are equal
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out
