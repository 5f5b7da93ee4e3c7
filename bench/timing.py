"""Timing side by side: every candidate runs once per turn, so that a busy moment meets them all.

Two clocks: `wall`, and `cpu`, the CPU time of this process. On a shared machine the second, with
one thread, does not count what other work takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_MAX_TURNS = 15


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one candidate, one value per turn."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Range of the middle half over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: Timing) -> float:
        """This candidate's time over another's: the median of the turns' own ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def side_by_side(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    clock: str = "wall",
    min_turns: int = 5,
) -> dict[str, Timing]:
    """Time all candidates in turns until the budget is used, at least `min_turns` times each."""
    for work in candidates.values():  # memory, kernels and caches of first calls
        work()
        work()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for turn in range(_MAX_TURNS):
        if turn >= min_turns and time.perf_counter() - started > budget_s:
            break
        for name, work in candidates.items():
            seconds[name].append(_time_once(work, clock))
    return {name: Timing(seconds=values) for name, values in seconds.items()}


def _time_once(work: Callable[[], object], clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    started = now()
    work()
    if cuda:
        torch.cuda.synchronize()
    return now() - started
