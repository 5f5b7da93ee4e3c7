"""Matrix products on the fastest kernels that this machine has.

In fp32 on CPU, torch multiplies with MKL, which keeps to 256-bit kernels on CPUs of other makers;
oneDNN, which the same wheel carries, uses their AVX-512 units and is twice as fast there
(docs/performance.md). Elsewhere torch's own choice stands.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.errors import ConfigError

# Below this many rows, turning the narrower operand costs more than it saves.
_MANY_ROWS = 512


class Product(Protocol):
    """One matrix product; it fills and returns `out` where that is given."""

    def __call__(self, left: Tensor, right: Tensor, out: Tensor | None = None, /) -> Tensor: ...


class Products(NamedTuple):
    """The three products that a linear map needs: forward, input gradient, weight gradient.

    torch's also take a batch of operands, [B, N, I] and [B, O, I].

    Attributes:
        forward: x_NI, w_OI -> x @ w.T, [N, O].
        input_grad: y_NO, w_OI -> y @ w, [N, I].
        weight_grad: y_NO, x_NI -> y.T @ x, [O, I].
    """

    forward: Product
    input_grad: Product
    weight_grad: Product


def _torch_forward(x_NI: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    return _mm(x_NI)(x_NI, w_OI.mT, out=out)


def _torch_input_grad(y_NO: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    return _mm(y_NO)(y_NO, w_OI, out=out)


def _torch_weight_grad(y_NO: Tensor, x_NI: Tensor, out: Tensor | None = None) -> Tensor:
    return _mm(y_NO)(y_NO.mT, x_NI, out=out)


def _mm(operand: Tensor) -> Callable[..., Tensor]:
    return torch.mm if operand.ndim == 2 else torch.bmm


def _onednn_forward(x_NI: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    if not x_NI.shape[0]:
        return x_NI.new_zeros(0, w_OI.shape[0]) if out is None else out
    y_NO = torch.ops.mkldnn._linear_pointwise(x_NI, w_OI, None, "none", [], "")
    return y_NO if out is None else out.copy_(y_NO)


def _onednn_input_grad(y_NO: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    return _onednn_forward(y_NO, w_OI.t(), out)


def _onednn_weight_grad(y_NO: Tensor, x_NI: Tensor, out: Tensor | None = None) -> Tensor:
    """oneDNN copies its first operand into rows: give it the narrower one where that pays."""
    if not x_NI.shape[0]:
        return y_NO.new_zeros(y_NO.shape[1], x_NI.shape[1]) if out is None else out.zero_()
    if y_NO.shape[1] > x_NI.shape[1] and x_NI.shape[0] >= _MANY_ROWS:
        grad_OI = _onednn_forward(x_NI.t(), y_NO.t()).t()
        return grad_OI.contiguous() if out is None else out.copy_(grad_OI)
    return _onednn_forward(y_NO.t(), x_NI.t(), out)


TORCH = Products(_torch_forward, _torch_input_grad, _torch_weight_grad)
ONEDNN = Products(_onednn_forward, _onednn_input_grad, _onednn_weight_grad)


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has the oneDNN product that inductor, too, lowers linear maps to."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """A fact of the machine, not a timing: the same run must not take other kernels next time."""
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else platform.processor()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn() and wide and "GenuineIntel" not in vendor


def choose_products(kind: str, x: Tensor) -> Products:
    """Products for operands like x; `kind` is model.matmul: auto, torch or onednn."""
    applies = x.device.type == "cpu" and x.dtype == torch.float32
    if kind == "torch" or not applies or torch.is_autocast_enabled("cpu"):
        return TORCH
    return ONEDNN if kind == "onednn" or onednn_is_faster() else TORCH


def check_matmul(kind: str) -> None:
    """Raises ConfigError if oneDNN is asked for and this torch is built without it."""
    if kind == "onednn" and not has_onednn():
        raise ConfigError("model.matmul", kind, "needs a torch that is built with oneDNN")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor, products: Products) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI)
        ctx.products = products
        return products.forward(x_NI, w_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NI, w_OI = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        x_grad = ctx.products.input_grad(grad_NO, w_OI) if ctx.needs_input_grad[0] else None
        w_grad = ctx.products.weight_grad(grad_NO, x_NI) if ctx.needs_input_grad[1] else None
        return x_grad, w_grad, None


def linear(x: Tensor, w_OI: Tensor, kind: str) -> Tensor:
    """x @ w.T over the last dimension of x."""
    products = choose_products(kind, x)
    if products is TORCH:
        return F.linear(x, w_OI)
    y_NO = _Linear.apply(x.reshape(-1, x.shape[-1]), w_OI, products)
    return y_NO.view(*x.shape[:-1], w_OI.shape[0])


class Linear(nn.Module):
    """A linear map without bias, its weight [out, in] uninitialised."""

    def __init__(self, in_size: int, out_size: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.kind)
