"""Documents dealt by kind: k-means over the n-grams of their text, in parts of equal length.

Every site computes the parts for itself, so they must be equal on every CPU. A document is the
square roots of its n-grams' shares, rounded to integers; sums and products of those are exact in
float64, whatever their order, and division and square root are correctly rounded everywhere.

Shapes: N documents, V counters, K parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fomoe.data.sources import Document

_NGRAM = 4  # bytes
_COUNTERS = 1024
_UNIT = 4096  # the length of a document's vector; products stay far below 2^53
_SAMPLE = 4096  # documents that the means are fitted to
_RESTARTS, _ITERATIONS = 4, 20
_BLOCK = 4096  # documents whose distances are computed at a time


def deal_by_kind(documents: list[Document], num_parts: int, seed: int) -> list[list[Document]]:
    """Parts of about equal length, each of documents that resemble each other.

    A part may be longer than an even share by one document. Documents keep their order.
    """
    vectors_NV = np.stack([_vector(document.text) for document in documents])
    lengths_N = np.array([len(document.text) for document in documents], np.int64)
    if num_parts == 1 or len(documents) <= num_parts:
        return [documents[part::num_parts] for part in range(num_parts)]
    rng = np.random.Generator(np.random.PCG64([seed, 0xC1]))
    sample = rng.permutation(len(documents))[:_SAMPLE]
    sampled_NV = vectors_NV[sample].astype(np.float64)
    means_KV = min(
        (_fit(sampled_NV, lengths_N[sample], num_parts, rng) for _ in range(_RESTARTS)),
        key=lambda found: found[0],
    )[1]
    part_N = _assign(_distances(vectors_NV, means_KV), lengths_N)
    return [[documents[i] for i in np.flatnonzero(part_N == part)] for part in range(num_parts)]


def _vector(text: str) -> np.ndarray:
    """Square roots of the shares of hashed n-grams, int16 [V], of length `_UNIT`."""
    data = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    data = np.pad(data, (0, max(0, _NGRAM - len(data))))
    grams = np.zeros(len(data) - _NGRAM + 1, np.uint32)
    for place in range(_NGRAM):
        grams = (grams << np.uint32(8)) | data[place : place + len(grams)]
    hashed = (grams * np.uint32(2_654_435_761)) >> np.uint32(22)  # Knuth's multiplier; 10 bits
    counts = np.bincount(hashed, minlength=_COUNTERS)
    return np.rint(_UNIT * np.sqrt(counts / len(grams))).astype(np.int16)


def _distances(vectors_NV: np.ndarray, means_KV: np.ndarray) -> np.ndarray:
    """Squared distances less each document's own square, exact integers in float64 [N, K]."""
    squares_K = (means_KV * means_KV).sum(1)
    blocks = range(0, len(vectors_NV), _BLOCK)
    parts = [vectors_NV[i : i + _BLOCK].astype(np.float64, copy=False) @ means_KV.T for i in blocks]
    found: np.ndarray = squares_K - 2 * np.concatenate(parts)
    return found


def _fit(
    vectors_NV: np.ndarray, lengths_N: np.ndarray, num_parts: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """How far the documents are from their parts' means, and the means, integers [K, V]."""
    first = int(rng.integers(len(vectors_NV)))
    means = [vectors_NV[first]]
    squares_N = (vectors_NV**2).sum(1)
    for _ in range(num_parts - 1):  # k-means++: far documents are the likelier seeds
        far_N = (_distances(vectors_NV, np.stack(means)).min(1) + squares_N).astype(np.int64)
        total_N = np.cumsum(np.maximum(far_N, 0) + 1)
        chosen = int(np.searchsorted(total_N, rng.integers(int(total_N[-1])), side="right"))
        means.append(vectors_NV[chosen])
    means_KV = np.stack(means)
    part_N, away = np.full(len(vectors_NV), -1), 0.0
    for _ in range(_ITERATIONS):
        distances_NK = _distances(vectors_NV, means_KV)
        moved_N = _assign(distances_NK, lengths_N)
        away = float((distances_NK[np.arange(len(moved_N)), moved_N] + squares_N).sum())
        if (moved_N == part_N).all():
            break
        part_N = moved_N
        for part in np.unique(part_N):
            means_KV[part] = np.rint(vectors_NV[part_N == part].sum(0) / (part_N == part).sum())
    return away, means_KV


def _assign(distances_NK: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """The nearest part that has room, int [N]: those that would lose most choose first."""
    num_parts = distances_NK.shape[1]
    room = [-(-int(lengths_N.sum()) // num_parts)] * num_parts
    ordered_NK = np.argsort(distances_NK, axis=1, kind="stable")
    two = np.take_along_axis(distances_NK, ordered_NK[:, :2], axis=1)
    part_N = np.zeros(len(lengths_N), np.int64)
    for i in np.argsort(two[:, 0] - two[:, 1], kind="stable"):
        wishes: Sequence[int] = ordered_NK[i].tolist()
        # A part with any room takes the document, which may be longer than the room.
        part = next((part for part in wishes if room[part] > 0), wishes[0])
        part_N[i] = part
        room[part] -= int(lengths_N[i])
    return part_N
