"""HetLoRA's self-pruning of ranks (2401.06432): a penalty on the last rows, and when they go.

A client of rank r that keeps the share g has a tail, rows floor(g r) to r. Its loss has the penalty
weight * sum over layers of |A_tail| |B_tail|, and if this norm is smaller after a round's steps
than before them, the tail goes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fomoe.adapters.shapes import A, B


def rank_after(rank: int, share: float) -> int:
    """Rows that are left of a rank when its tail goes; at least one."""
    return max(1, int(share * rank))


def tail_norm(matrices: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Sum over the layers of the product of the tail's norms, a scalar.

    Args:
        matrices: `<module>.lora_A` [r, in] and `<module>.lora_B` [r, out].
        start, stop: rows of the tail; without any the norm is 0.
    """
    norms = [
        a[start:stop].norm() * matrices[f"{name.removesuffix(A)}{B}"][start:stop].norm()
        for name, a in matrices.items()
        if name.endswith(f".{A}")
    ]
    return torch.stack(norms).sum()
