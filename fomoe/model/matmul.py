"""Matrix products on the fastest kernels that this machine has.

In fp32 on CPU, torch multiplies with MKL, which uses only 256-bit kernels on CPUs that are not
Intel's. oneDNN, which is part of the same wheel, uses their 512-bit units and is twice as fast
there (docs/performance.md). On other machines torch's own choice is kept.

oneDNN compiles a kernel for every number of rows that a product has, and keeps it: half a megabyte
each, hundreds of megabytes for experts, whose rows differ at every step. So oneDNN gets the rows in
pieces of a few sizes, and torch computes the remaining rows.

Shapes: N rows, I in, O out.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.errors import ConfigError

# Below this many rows, putting the narrower operand first costs more than it saves.
_MANY_ROWS = 512

# Smallest piece: for fewer rows a call of oneDNN costs more than its kernel saves.
_PIECE_ROWS = 64


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


@functools.cache
def pieces(rows: int) -> tuple[tuple[slice, ...], slice]:
    """Cut rows into pieces of a few sizes, the largest first, and the remaining rows.

    The size of a piece is the number of rows that are left, rounded down to its two leading binary
    digits: 64, 96, 128, 192, 256, 384 and so on.
    """
    found, start = [], 0
    while (left := rows - start) >= _PIECE_ROWS:
        digits = left.bit_length() - 2
        found.append(slice(start, start + (left >> digits << digits)))
        start = found[-1].stop
    return tuple(found), slice(start, rows)


def _onednn(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NI, w_OI, None, "none", [], "")


def _onednn_forward(x_NI: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    rows = x_NI.shape[0]
    whole, left = pieces(rows)
    if out is None and whole and whole[0].stop == rows:
        return _onednn(x_NI, w_OI)
    y_NO = x_NI.new_empty(rows, w_OI.shape[0]) if out is None else out
    for piece in whole:
        y_NO[piece] = _onednn(x_NI[piece], w_OI)
    if left.start < rows:
        torch.mm(x_NI[left], w_OI.t(), out=y_NO[left])
    return y_NO


def _onednn_input_grad(y_NO: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    return _onednn_forward(y_NO, w_OI.t(), out)


def _onednn_weight_grad(y_NO: Tensor, x_NI: Tensor, out: Tensor | None = None) -> Tensor:
    whole, left = pieces(x_NI.shape[0])
    if not whole:
        return _torch_weight_grad(y_NO, x_NI, out)
    grad_OI = _onednn_piece_grad(y_NO[whole[0]], x_NI[whole[0]])
    total_OI = grad_OI.contiguous() if out is None else out.copy_(grad_OI)
    for piece in whole[1:]:
        total_OI += _onednn_piece_grad(y_NO[piece], x_NI[piece])
    if left.start < left.stop:
        total_OI.addmm_(y_NO[left].t(), x_NI[left])
    return total_OI


def _onednn_piece_grad(y_NO: Tensor, x_NI: Tensor) -> Tensor:
    """oneDNN copies its first operand into rows, so the narrower one comes first where it pays."""
    if y_NO.shape[1] > x_NI.shape[1] and x_NI.shape[0] >= _MANY_ROWS:
        return _onednn(x_NI.t(), y_NO.t()).t()
    return _onednn(y_NO.t(), x_NI.t())


TORCH = Products(_torch_forward, _torch_input_grad, _torch_weight_grad)
ONEDNN = Products(_onednn_forward, _onednn_input_grad, _onednn_weight_grad)


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has the oneDNN product that inductor also uses for linear maps."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether it is, by the CPU's description and not by a timing: a run must use the same kernels
    each time."""
    path = Path("/proc/cpuinfo")
    cpu = path.read_text(errors="replace") if path.exists() else platform.processor()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn() and wide and has_idle_wide_units(cpu)


def has_idle_wide_units(cpu: str) -> bool:
    """Whether MKL leaves 512-bit units idle.

    MKL uses those of Intel CPUs. AMD's family 25 (Zen 4) runs a 512-bit instruction as two passes
    through a 256-bit unit, so there is nothing to gain.

    Args:
        cpu: the system's description of a CPU with AVX-512.
    """
    family = re.search(r"^cpu family\s*: (\d+)", cpu, re.M)
    halves = "AuthenticAMD" in cpu and family is not None and int(family[1]) <= 25
    return "GenuineIntel" not in cpu and not halves


def choose_products(kind: str, x: Tensor) -> Products:
    """Products for operands like x; `kind` is model.matmul: auto, torch or onednn."""
    applies = x.device.type == "cpu" and x.dtype == torch.float32
    if kind == "torch" or not applies or torch.is_autocast_enabled("cpu"):
        return TORCH
    return ONEDNN if kind == "onednn" or onednn_is_faster() else TORCH


def check_matmul(kind: str) -> None:
    """Raises ConfigError if oneDNN is requested and this torch is built without it."""
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
