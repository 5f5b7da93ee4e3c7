"""What a server makes of the clients' adapters: the baselines, as functions of all clients.

They need every client's matrices in one place, so they run with all clients in one process. The
sync of pre-training, which needs no server, is the method itself.

Shapes: R the largest rank, r a client's, D inputs, O outputs. Delta W = s * B^T A, [O, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Matrices = dict[str, Tensor]  # by `<module>.lora_A` or `<module>.lora_B`


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a client sends after a round.

    Attributes:
        weight: its part in the means; above 0.
        scale: its factor s.
        a, b: its matrices by module, [r, in] and [r, out].
    """

    weight: float
    scale: float
    a: Matrices
    b: Matrices


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's adapters by module, [R, in] and [R, out], and its factor at rank R."""

    scale: float
    a: Matrices
    b: Matrices


Rule = Callable[[Sequence[Upload], Server], tuple[Matrices, Matrices]]


def zero_pad_values(uploads: Sequence[Upload], server: Server) -> tuple[Matrices, Matrices]:
    """The mean of matrices that are padded with zeros to rank R.

    A row that not all clients have shrinks, the first rows of A, which no one trained away from
    their start, included.
    """
    return _padded(uploads, server, like=None)


def zero_pad_deltas(uploads: Sequence[Upload], server: Server) -> tuple[Matrices, Matrices]:
    """The server's matrices plus the mean of padded changes: rows are diluted and do not shrink."""
    return _padded(uploads, server, like=server)


def hetlora(uploads: Sequence[Upload], server: Server) -> tuple[Matrices, Matrices]:
    """Zero-padded values, each client weighted by the Frobenius norm of its product (2401.06432).

    The norm is over all adapted layers. Self-pruning of ranks, which that paper adds, is in
    `fomoe.adapters.pruning`.
    """
    weighted = [
        Upload(weight=u.scale * product_norm(u.a, u.b), scale=u.scale, a=u.a, b=u.b)
        for u in uploads
    ]
    if not sum(u.weight for u in weighted):  # nothing is learned yet
        weighted = list(uploads)
    return _padded(weighted, server, like=None)


def flexlora(uploads: Sequence[Upload], server: Server) -> tuple[Matrices, Matrices]:
    """The best rank-R product for the weighted mean of the clients' products (2402.11505)."""
    a, b = {}, {}
    for name in server.a:
        stack_a, stack_b = stack(uploads, name)
        a[name], b[name] = truncated(stack_a, stack_b, len(server.a[name]), server.scale)
    return a, b


def segments_svd(uploads: Sequence[Upload], server: Server) -> tuple[Matrices, Matrices]:
    """The segment mean, its rows then rotated so that every prefix is the best of its rank."""
    a, b = segment_means(uploads, server)
    for name in a:
        a[name], b[name] = truncated(a[name], server.scale * b[name], len(a[name]), server.scale)
    return a, b


RULES: dict[str, Rule] = {
    "zero-pad-values": zero_pad_values,
    "zero-pad-deltas": zero_pad_deltas,
    "hetlora": hetlora,
    "flexlora": flexlora,
    "segments-svd": segments_svd,
}


# ------------------------------------------------------------------------------------------ pieces


def stack(uploads: Sequence[Upload], name: str) -> tuple[Tensor, Tensor]:
    """FLoRA's stack of one layer (2409.05976): the mean of the products is B^T A, exactly.

    Returns:
        A [sum of r, in] and B [sum of r, out], which carries weights and factors.
    """
    total = sum(u.weight for u in uploads)
    a = torch.cat([u.a[name] for u in uploads])
    b = torch.cat([u.b[name] * (u.scale * u.weight / total) for u in uploads])
    return a, b


def truncated(a: Tensor, b: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The best product of a rank for B^T A: s * B'^T A' with orthonormal rows of A'.

    Only small matrices are decomposed: B^T A = Q_b (R_b R_a^T) Q_a^T.

    Returns:
        A' [rank, in] and B' [rank, out] in fp32, by falling singular value; rows of 0 where the
        product has a lower rank.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(values))
    new_a = torch.zeros(rank, a.shape[1])
    new_b = torch.zeros(rank, b.shape[1])
    new_a[:kept] = (q_a @ right.T)[:, :kept].T.float()
    new_b[:kept] = (q_b @ (left * values))[:, :kept].T.float() / scale
    return new_a, new_b


def segment_means(uploads: Sequence[Upload], server: Server) -> tuple[Matrices, Matrices]:
    """The mean of every row over the clients that have it; the server's where none does."""

    def mean(own: Tensor, rows: list[tuple[float, Tensor]]) -> Tensor:
        total, weights = torch.zeros_like(own), torch.zeros(len(own), 1)
        for weight, values in rows:
            total[: len(values)] += weight * values
            weights[: len(values)] += weight
        return torch.where(weights > 0, total / weights.clamp_min(1e-30), own)

    a = {n: mean(own, [(u.weight, u.a[n]) for u in uploads]) for n, own in server.a.items()}
    b = {n: mean(own, [(u.weight, u.b[n]) for u in uploads]) for n, own in server.b.items()}
    return a, b


def product_norm(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Frobenius norm of B^T A over all layers, from [r, r] matrices only."""
    return sum(_squared_norm(a[name], b[name]) for name in a) ** 0.5


def product_error(uploads: Sequence[Upload], server: Server) -> float:
    """How far the product of the segment means is from the mean of the products, relative to it."""
    a, b = segment_means(uploads, server)
    wrong, whole = 0.0, 0.0
    for name in a:
        stack_a, stack_b = stack(uploads, name)
        # The difference of the two is the product of both factors, one below the other.
        both_b = torch.cat([server.scale * b[name], -stack_b])
        wrong += _squared_norm(torch.cat([a[name], stack_a]), both_b)
        whole += _squared_norm(stack_a, stack_b)
    return (wrong / whole) ** 0.5 if whole else 0.0


def _squared_norm(a: Tensor, b: Tensor) -> float:
    """Sum of the squares of B^T A. In fp64: the norm of a small difference of large products."""
    a, b = a.double(), b.double()
    return max(0.0, float(((a @ a.T) * (b @ b.T)).sum()))


def energy(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[float]:
    """Share of every rank dimension in the sum of |b_i|^2 |a_i|^2 over all layers."""
    by_dimension: Any = sum(
        a[n].square().sum(1).double() * b[n].square().sum(1).double() for n in a
    )
    return (by_dimension / by_dimension.sum().clamp_min(1e-300)).tolist()


def _padded(
    uploads: Sequence[Upload], server: Server, *, like: Server | None
) -> tuple[Matrices, Matrices]:
    """Means over all clients; rows that a client lacks count as 0, or as no change to `like`."""
    total = sum(u.weight for u in uploads)

    def mean(own: Tensor, rows: list[tuple[float, Tensor]]) -> Tensor:
        start = torch.zeros_like(own) if like is None else own
        change = torch.zeros_like(own)
        for weight, values in rows:
            change[: len(values)] += (weight / total) * (values - start[: len(values)])
        return start + change

    a = {n: mean(own, [(u.weight, u.a[n]) for u in uploads]) for n, own in server.a.items()}
    b = {n: mean(own, [(u.weight, u.b[n]) for u in uploads]) for n, own in server.b.items()}
    return a, b
