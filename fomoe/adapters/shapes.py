"""The adapters as parameters, and who holds which of their rows (no torch).

A is [R, in] and B is [R, out], R the largest rank, so that a rank dimension is a row of both. A
client of rank r holds rows 0 to r. The rows are cut at the distinct ranks; a range is held by the
clients whose rank covers it.
"""

from __future__ import annotations

from fomoe.adapters.nesting import cuts_of

A, B = "lora_A", "lora_B"


def adapter_shapes(
    targets: dict[str, tuple[int, int]], max_rank: int
) -> list[tuple[str, tuple[int, int]]]:
    """Name and shape of every adapter matrix.

    Args:
        targets: [out, in] of every adapted matrix.
    """
    return [
        (f"{module}.{part}", (max_rank, width))
        for module, (out, inner) in targets.items()
        for part, width in ((A, inner), (B, out))
    ]


def rank_ranges(ranks: tuple[int, ...]) -> list[tuple[int, int, tuple[int, ...]]]:
    """First row, end and holders of every range of rows."""
    cuts = cuts_of(ranks)
    return [
        (start, stop, tuple(client for client, rank in enumerate(ranks) if rank >= stop))
        for start, stop in zip((0, *cuts), cuts, strict=False)
    ]
