"""Causal grouped-query attention with rotary positions and optional qk-norm.

The products over the sequence are torch's scaled_dot_product_attention. Training in fp32 on CPU
takes `_Blocks` instead where sequences are short: its kernels are tuned for long ones, and the
backward pass of theirs takes 1.3 times as long at 512 tokens (docs/performance.md).

Shapes: B batch, S sequence, D model, N heads, G key-value heads, H head size, M = B x N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.config import ModelConfig
from fomoe.model.elementwise import RMSNorm, rotate
from fomoe.model.matmul import Linear, linear

# Longest sequence for which blocks are at least as fast; rows of a block; bytes of its scores.
_LONGEST, _BLOCK_ROWS, _BLOCK_BYTES = 512, 64, 2 << 20


class Attention(nn.Module):
    """One layer's attention; queries, keys and values are one product over joined weights."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_size, self.qk_norm, self.matmul = model.head_size, model.qk_norm, model.matmul
        q_size, kv_size = model.num_heads * model.head_size, model.kv_heads * model.head_size
        self.sizes = (q_size, kv_size, kv_size)
        self.q_proj = Linear(model.d_model, q_size, model.matmul)
        self.k_proj = Linear(model.d_model, kv_size, model.matmul)
        self.v_proj = Linear(model.d_model, kv_size, model.matmul)
        self.o_proj = Linear(q_size, model.d_model, model.matmul)
        if model.qk_norm != "none":
            full = model.qk_norm == "full"
            self.q_norm = RMSNorm(q_size if full else model.head_size, model.norm_eps)
            self.k_norm = RMSNorm(kv_size if full else model.head_size, model.norm_eps)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        q, k, v = linear(x_BSD, weight, self.matmul).split(self.sizes, dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSNH, k_BSGH, v_BSGH = (t.view(batch, seq, -1, self.head_size) for t in (q, k, v))
        if self.qk_norm == "head":
            q_BSNH, k_BSGH = self.q_norm(q_BSNH), self.k_norm(k_BSGH)
        q_BNSH = rotate(q_BSNH.transpose(1, 2), cos_SH, sin_SH)
        k_BGSH = rotate(k_BSGH.transpose(1, 2), cos_SH, sin_SH)
        out_BNSH = attend(q_BNSH, k_BGSH, v_BSGH.transpose(1, 2))
        return self.o_proj(out_BNSH.transpose(1, 2).reshape(batch, seq, -1))


def attend(q_BNSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor) -> Tensor:
    """softmax(q k' / sqrt(H)) v over the positions so far, [B, N, S, H]."""
    grouped = q_BNSH.shape[1] != k_BGSH.shape[1]
    plain = q_BNSH.device.type == "cpu" and q_BNSH.dtype == v_BGSH.dtype == torch.float32
    trains = torch.is_grad_enabled() and q_BNSH.requires_grad
    if plain and trains and not grouped and q_BNSH.shape[2] <= _LONGEST:
        flat = (t.reshape(-1, *t.shape[2:]) for t in (q_BNSH, k_BGSH, v_BGSH))
        out_MSH: Tensor = _Blocks.apply(*flat)
        return out_MSH.view_as(q_BNSH)
    return F.scaled_dot_product_attention(
        q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=grouped
    )


class _Blocks(torch.autograd.Function):
    """Attention by blocks of queries whose scores fit a cache; the backward pass scores again.

    A block of rows meets all keys up to its last row, so of the scores above the diagonal only
    those inside a block's own square are computed, and masked.
    """

    @staticmethod
    def forward(ctx: Any, q_MSH: Tensor, k_MSH: Tensor, v_MSH: Tensor) -> Tensor:
        q_MSH = q_MSH * q_MSH.shape[-1] ** -0.5
        out_MSH = torch.empty_like(q_MSH)
        for heads, rows in _blocks(q_MSH):
            share = _shares(q_MSH[heads, rows], k_MSH[heads, : rows.stop])
            out_MSH[heads, rows] = torch.bmm(share, v_MSH[heads, : rows.stop])
        ctx.save_for_backward(q_MSH, k_MSH, v_MSH, out_MSH)
        return out_MSH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_MSH, k_MSH, v_MSH, out_MSH = ctx.saved_tensors
        dq_MSH, dk_MSH, dv_MSH = (
            torch.empty_like(q_MSH),
            torch.zeros_like(k_MSH),
            torch.zeros_like(v_MSH),
        )
        pull_MS1 = (grad_MSH * out_MSH).sum(-1, keepdim=True)
        for heads, rows in _blocks(q_MSH):
            seen = slice(0, rows.stop)
            q, grad, k = q_MSH[heads, rows], grad_MSH[heads, rows], k_MSH[heads, seen]
            share = _shares(q, k)
            dv_MSH[heads, seen] += torch.bmm(share.transpose(1, 2), grad)
            dscore = torch.bmm(grad, v_MSH[heads, seen].transpose(1, 2))
            dscore.sub_(pull_MS1[heads, rows]).mul_(share)
            dq_MSH[heads, rows] = torch.bmm(dscore, k)
            dk_MSH[heads, seen] += torch.bmm(dscore.transpose(1, 2), q)
        return dq_MSH.mul_(q_MSH.shape[-1] ** -0.5), dk_MSH, dv_MSH


def _blocks(q_MSH: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads and rows of each block."""
    num_heads, seq, _ = q_MSH.shape
    together = max(2, _BLOCK_BYTES // (4 * _BLOCK_ROWS * seq))
    for head in range(0, num_heads, together):
        for row in range(0, seq, _BLOCK_ROWS):
            yield slice(head, head + together), slice(row, min(row + _BLOCK_ROWS, seq))


def _shares(q_MRH: Tensor, k_MCH: Tensor) -> Tensor:
    """Softmax of a block's scores, [M, R, C]: its rows are the last R of C positions."""
    score = torch.bmm(q_MRH, k_MCH.transpose(1, 2))
    rows, columns = score.shape[1:]
    score[:, :, columns - rows :] += score.new_full((rows, rows), -torch.inf).triu(1)
    return score.softmax(-1)
