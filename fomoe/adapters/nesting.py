"""Who takes part in a round, at which ranks a client trains, and with which factor (no torch).

Every choice is a function of the seed and the step, so that a resumed run makes it again.
"""

from __future__ import annotations

import numpy as np

from fomoe.adapters.options import AdaptersConfig

_WHO, _RANKS = 0xC11E, 0x7A4C  # keep the two streams of numbers apart


def cuts_of(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The distinct ranks, ascending: where rows are cut into segments."""
    return tuple(sorted(set(ranks)))


def participants(adapters: AdaptersConfig, seed: int, round_idx: int) -> tuple[int, ...]:
    """The clients that train in a round, ascending; at least one."""
    num_clients = len(adapters.ranks)
    count = max(1, round(adapters.participation * num_clients))
    if count == num_clients:
        return tuple(range(num_clients))
    draw = np.random.Generator(np.random.PCG64([seed, _WHO, round_idx]))
    return tuple(sorted(draw.choice(num_clients, count, replace=False).tolist()))


def truncations(
    adapters: AdaptersConfig, client: int, *, seed: int, step: int, part: int = 0
) -> tuple[int, ...]:
    """The ranks over which a client's loss is the mean, its own first.

    Args:
        seed: of the experiment.
        step: inner step.
        part: micro-batch of the step.
    """
    own = adapters.ranks[client]
    below = [rank for rank in cuts_of(adapters.ranks) if rank < own]
    if adapters.nesting in ("none", "rows") or not below:
        return (own,)
    if adapters.nesting == "all":
        return (own, *below)
    draw = _draw(seed, client, step, part)
    if adapters.nesting == "full+1":
        return (own, below[int(draw.integers(len(below)))])
    between = below[1:]
    middle = [between[int(draw.integers(len(between)))]] if between else []
    return (own, below[0], *middle)


def row_ranks(
    adapters: AdaptersConfig, client: int, num_rows: int, *, seed: int, step: int, part: int = 0
) -> list[int] | None:
    """With nesting `rows`: a rank for every sequence of a batch, the first its own."""
    own = adapters.ranks[client]
    cuts = [rank for rank in cuts_of(adapters.ranks) if rank <= own]
    if adapters.nesting != "rows" or len(cuts) == 1:
        return None
    draw = _draw(seed, client, step, part)
    return [own, *(cuts[i] for i in draw.integers(len(cuts), size=num_rows - 1))]


def passes_per_step(adapters: AdaptersConfig, client: int) -> int:
    """Forward and backward passes of one micro-batch."""
    return len(truncations(adapters, client, seed=0, step=0))


def mean_passes(adapters: AdaptersConfig) -> float:
    """Forward and backward passes of a micro-batch, mean over the clients."""
    clients = range(len(adapters.ranks))
    return sum(passes_per_step(adapters, client) for client in clients) / len(clients)


def scale_at(adapters: AdaptersConfig, rank: int) -> float:
    """The factor of an adapter that is used at a rank."""
    if adapters.scaling == "constant":
        return adapters.scale
    return adapters.scale / (rank if adapters.scaling == "alpha/r" else rank**0.5)


def _draw(seed: int, client: int, step: int, part: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, _RANKS, client, step, part]))
