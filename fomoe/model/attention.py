"""Causal grouped-query attention with rotary positions and optional qk-norm.

The products over the sequence are torch's scaled_dot_product_attention. Training in fp32 on CPU
takes `_Blocks` instead where sequences are short: torch's kernel computes every score again in the
backward pass, which is faster for long sequences only (docs/performance.md).

Shapes: B batch, S sequence, D model, N heads, G key-value heads, H head size; M heads of some
sequences, R rows of a block, C the positions that they attend to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.config import ModelConfig
from fomoe.model.elementwise import RMSNorm, rotate, turn
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
        q_BNSH, k_BGSH, v_BGSH = (t.transpose(1, 2) for t in (q_BSNH, k_BSGH, v_BSGH))
        out_BNSH = attend(q_BNSH, k_BGSH, v_BGSH, cos_SH, sin_SH)
        return self.o_proj(out_BNSH.transpose(1, 2).reshape(batch, seq, -1))


def attend(
    q_BNSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, cos_SH: Tensor, sin_SH: Tensor
) -> Tensor:
    """softmax(q k' / sqrt(H)) v with a causal mask, [B, N, S, H]; q and k are rotated first."""
    grouped = q_BNSH.shape[1] != k_BGSH.shape[1]
    plain = q_BNSH.device.type == "cpu" and q_BNSH.dtype == v_BGSH.dtype == torch.float32
    trains = torch.is_grad_enabled() and q_BNSH.requires_grad
    if plain and trains and not grouped and q_BNSH.shape[2] <= _LONGEST:
        out_BNSH: Tensor = _Blocks.apply(q_BNSH, k_BGSH, v_BGSH, cos_SH, sin_SH)
        return out_BNSH
    return F.scaled_dot_product_attention(
        rotate(q_BNSH, cos_SH, sin_SH),
        rotate(k_BGSH, cos_SH, sin_SH),
        v_BGSH,
        is_causal=True,
        enable_gqa=grouped,
    )


class _Blocks(torch.autograd.Function):
    """Attention by blocks of queries whose scores fit a cache; it keeps each block's softmax.

    A block of rows is multiplied by all keys up to its last row, so of the scores above the
    diagonal only those inside the block's own square are computed, and masked. As many whole
    sequences as fill a block are computed together; each is rotated and laid out just before.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, cos_SH: Tensor, sin_SH: Tensor
    ) -> Tensor:
        scale = q_BNSH.shape[-1] ** -0.5
        out_BNSH = _heads_side_by_side(q_BNSH)
        kept = []
        for own in _sequences(q_BNSH):
            out = out_BNSH[own]
            q = turn(q_BNSH[own], cos_SH * scale, sin_SH * scale, 1, out=out.new_empty(out.shape))
            k = turn(k_BNSH[own], cos_SH, sin_SH, 1, out=out.new_empty(out.shape))
            q_MSH, k_MSH, v_MSH = q.flatten(0, 1), k.flatten(0, 1), v_BNSH[own].flatten(0, 1)
            kept += [q_MSH, k_MSH, v_MSH]
            for rows in _blocks(q_MSH):
                share = _shares(q_MSH[:, rows], k_MSH[:, : rows.stop])
                out_MRH = torch.bmm(share, v_MSH[:, : rows.stop])
                out[:, :, rows] = out_MRH.unflatten(0, out.shape[:2])
                kept.append(share)
        ctx.save_for_backward(cos_SH, sin_SH, *kept)
        return out_BNSH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BNSH: Tensor) -> tuple[Tensor | None, ...]:
        cos_SH, sin_SH, *saved = ctx.saved_tensors
        kept = iter(saved)
        scale = grad_BNSH.shape[-1] ** -0.5
        dq_BNSH, dk_BNSH, dv_BNSH = (_heads_side_by_side(grad_BNSH) for _ in range(3))
        for own in _sequences(grad_BNSH):
            q_MSH, k_MSH, v_MSH = next(kept), next(kept), next(kept)
            grad = grad_BNSH[own]
            grad_MSH, dq_MSH = grad.flatten(0, 1), torch.empty_like(q_MSH)
            dk_MSH, dv_MSH = torch.zeros_like(k_MSH), torch.zeros_like(v_MSH)
            for rows in _blocks(q_MSH):
                seen, share = slice(0, rows.stop), next(kept)
                dv_MSH[:, seen] += torch.bmm(share.mT, grad_MSH[:, rows])
                dshare = torch.bmm(grad_MSH[:, rows], v_MSH[:, seen].mT)
                dscore = torch.ops.aten._softmax_backward_data(dshare, share, -1, share.dtype)
                dq_MSH[:, rows] = torch.bmm(dscore, k_MSH[:, seen])
                dk_MSH[:, seen] += torch.bmm(dscore.mT, q_MSH[:, rows])
            dq, dk, dv = (t.view_as(grad) for t in (dq_MSH, dk_MSH, dv_MSH))
            turn(dq, cos_SH * scale, sin_SH * scale, -1, out=dq_BNSH[own])
            turn(dk, cos_SH, sin_SH, -1, out=dk_BNSH[own])
            dv_BNSH[own] = dv
        return dq_BNSH, dk_BNSH, dv_BNSH, None, None


def _heads_side_by_side(x_BNSH: Tensor) -> Tensor:
    """An empty tensor of this shape, in the memory order of the projections."""
    batch, heads, seq, size = x_BNSH.shape
    return x_BNSH.new_empty(batch, seq, heads, size).transpose(1, 2)


def _sequences(x_BNSH: Tensor) -> Iterator[slice]:
    """Sequences whose blocks are computed together."""
    batch, heads, seq, _ = x_BNSH.shape
    together = max(1, _BLOCK_BYTES // (4 * _BLOCK_ROWS * seq * heads))
    for first in range(0, batch, together):
        yield slice(first, first + together)


def _blocks(x_MSH: Tensor) -> Iterator[slice]:
    """Rows of each block."""
    seq = x_MSH.shape[1]
    for row in range(0, seq, _BLOCK_ROWS):
        yield slice(row, min(row + _BLOCK_ROWS, seq))


def _shares(q_MRH: Tensor, k_MCH: Tensor) -> Tensor:
    """Softmax of a block's scores, [M, R, C]: its rows are the last R of C positions."""
    score = torch.bmm(q_MRH, k_MCH.transpose(1, 2))
    rows, columns = score.shape[1:]
    score[:, :, columns - rows :] += score.new_full((rows, rows), -torch.inf).triu(1)
    return score.softmax(-1)
