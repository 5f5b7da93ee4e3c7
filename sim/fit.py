"""Lines through measured rounds: a fixed part and a slope, as far as the rounds can tell."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from fomoe_sim.runs import Round


def fit_link(rounds: list[Round]) -> tuple[float, float | None, bool, str]:
    """Fixed cost per sync, effective bandwidth, whether they were told apart, and a note."""
    line = fit_line([(r.num_syncs, 8 * r.wire_bytes, r.sync_s) for r in rounds])
    notes = {
        "one": "all rounds send the same bytes per sync: the fixed cost cannot be told from the "
        "bandwidth and counts as bandwidth; fit runs of different payloads together",
        "flat": "sync time does not grow with the bytes sent: all of it counts as fixed cost",
        "origin": "the best line has a negative fixed cost: it is taken as 0",
        "both": "",
    }
    rate = 1 / line.slope if line.slope else None
    return line.fixed, rate, line.kind != "one", notes[line.kind]


def fit_step(rounds: list[Round]) -> tuple[float, float | None, float]:
    """Time of the heaviest step, its FLOPs (None if they are unknown), and its fixed part."""
    flops = [r.step_flops for r in rounds if r.step_flops is not None]
    if len(flops) < len(rounds):
        return median(r.train_s / r.local_steps for r in rounds), None, 0.0
    line = fit_line([(1, f, r.train_s / r.local_steps) for f, r in zip(flops, rounds, strict=True)])
    return line.fixed + line.slope * max(flops), max(flops), line.fixed


@dataclass(frozen=True, kw_only=True)
class Line:
    """`fixed x count + slope x amount`; `kind` says what the points could decide: both, one (equal
    amounts: slope only), origin (a fixed part below 0 is taken as 0) or flat (fixed part only)."""

    fixed: float
    slope: float
    kind: str


def fit_line(points: list[tuple[float, float, float]]) -> Line:
    """The line through (count, amount, time) that minimises the relative error.

    Points of equal count and amount are first reduced to their median.
    """
    groups: dict[tuple[float, float], list[float]] = {}
    for count, amount, time_s in points:
        groups.setdefault((count, amount), []).append(time_s)
    counts = np.array([key[0] for key in groups], dtype=float)
    amounts = np.array([key[1] for key in groups], dtype=float)
    times = np.array([median(values) for values in groups.values()])
    through_origin = float(np.sum(amounts / times) / np.sum((amounts / times) ** 2))
    each = amounts / counts
    if each.max() < 1.05 * each.min():
        return Line(fixed=0.0, slope=through_origin, kind="one")
    columns = np.stack([counts / times, amounts / times], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    if slope <= 0:
        return Line(fixed=float(np.median(times / counts)), slope=0.0, kind="flat")
    if fixed < 0:
        return Line(fixed=0.0, slope=through_origin, kind="origin")
    return Line(fixed=float(fixed), slope=float(slope), kind="both")
