"""The one function: `evaluate(grids of questions) -> columns`.

`project`, `--sweep`, `--solve` and `plan` all ask here, so one question has one answer. A grid is a
question whose local steps, bits, fragments, overlap and bandwidth are arrays; all that does not
depend on them is computed once per grid, and syncs that overlap with compute are timed by the event
model for all grids at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe_sim.columns import Load, columns_of, details
from fomoe_sim.overlap import rounds
from fomoe_sim.question import Question
from fomoe_sim.sites import Answered, Grid, answer, grid
from fomoe_sim.traffic import Floats

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Answers of all points in the order of the grids.

    Attributes:
        values: by column name, one entry per point.
        owners: index of each point's grid.
        answered: of each grid.
    """

    values: dict[str, list[Any]]
    owners: list[int]
    answered: list[Answered]

    def rows(self) -> list[Row]:
        """One mapping per point."""
        names = list(self.values)
        points = zip(*self.values.values(), strict=True)
        return [dict(zip(names, point, strict=True)) for point in points]


def evaluate(grids: list[Grid]) -> Columns:
    """Answer every point of every grid.

    Raises:
        ConfigError: if a site's step is too small for its accelerators.
    """
    answered = [answer(one.question) for one in grids]
    loads = [_load(one, found) for one, found in zip(grids, answered, strict=True)]
    times = _rounds(grids, answered, loads)
    values: dict[str, list[Any]] = {}
    owners: list[int] = []
    parts = zip(grids, answered, loads, times, strict=True)
    for index, (one, found, load, time) in enumerate(parts):
        size = len(one.local_steps)
        for name, column in columns_of(one, found, load, time).items():
            listed = column.tolist() if isinstance(column, np.ndarray) else [column] * size
            values.setdefault(name, []).extend(listed)
        owners += [index] * size
    return Columns(values=values, owners=owners, answered=answered)


def answer_one(question: Question) -> Row:
    """One question's row, with what only one answer shows."""
    columns = evaluate([grid(question)])
    return columns.rows()[0] | details(columns.answered[0])


# ------------------------------------------------------------------------------------------- links


def _load(one: Grid, found: Answered) -> Load:
    """The slowest link of one exchange, over sites, directions and shared uplinks."""
    cluster, traffic = one.question.cluster, found.traffic
    several = cluster.num_sites > 1
    tokens = traffic.token_bytes * found.tokens
    elements = np.stack([traffic.sent, traffic.received])  # [2, K]
    moved = np.stack([tokens, tokens])
    shared = [elements[:, inside].sum(axis=1) for inside in cluster.uplink_members]
    extra = [moved[:, inside].sum(axis=1) for inside in cluster.uplink_members]
    bits = np.concatenate([elements.ravel(), *shared])[:, None] * one.bits
    bits = bits + 8 * np.concatenate([moved.ravel(), *extra])[:, None]
    nominal = np.concatenate(
        [cluster.own_bps.ravel(), np.repeat([rate for _, rate in cluster.uplinks], 2)]
    )
    rates = np.repeat(nominal[:, None], len(one.bits), axis=1)
    own = 2 * cluster.num_sites
    rates[:own] = np.where(np.isnan(one.bandwidth), rates[:own], one.bandwidth)
    rates = cluster.efficiency * rates
    seconds = bits / rates
    slowest = seconds.argmax(axis=0)
    points = np.arange(len(one.bits))
    # Own links up, then down, then each shared uplink both ways.
    names = [f"{site.name} {way}" for way in ("up", "down") for site in cluster.sites]
    names += [f"uplink {name} {way}" for name, _ in cluster.uplinks for way in ("up", "down")]
    return Load(
        transfer_s=several * seconds[slowest, points],
        bits=several * bits[slowest, points],
        rate_bps=rates[slowest, points],
        latency_s=several * (cluster.sync_fixed_s + traffic.hops * cluster.rtt_ms / 1000 / 2),
        where=[names[index] if several else "none" for index in slowest.tolist()],
    )


# ------------------------------------------------------------------------------------------ rounds


def _rounds(grids: list[Grid], answered: list[Answered], loads: list[Load]) -> list[Floats]:
    """Time of a round of every grid at the low, central and high share of peak, [3, P] each."""
    found: list[Floats] = []
    weights, asked, targets = [], [], []
    for one, known, load in zip(grids, answered, loads, strict=True):
        method, steps = one.question.method, one.local_steps
        every, ones = method.every_step, np.ones(len(steps))
        # A pseudo-gradient is there after the last step, so that nothing hides without overlap;
        # fragments of one step are sent together.
        parts = ones if every else np.minimum(one.fragments, steps)
        exchange = load.transfer_s + parts * load.latency_s
        step_s = known.step_s.max(axis=1)[:, None]  # [3, 1]
        hides = step_s if method.hidden == "step" else 0.0
        waits = np.maximum(0.0, exchange - hides)
        found.append(steps * (step_s + waits) if every else steps * step_s + exchange)
        beside = (method.hidden == "layers") | ((one.overlap_steps > 0) & (not every))
        points = np.nonzero(beside & bool(load.latency_s or load.transfer_s.any()))[0]
        schedule = (ones, ones, -ones) if every else (steps, one.fragments, one.overlap_steps)
        for end in range(3):
            rows = (load.transfer_s, step_s[end, 0] * ones, load.latency_s * ones, *schedule)
            asked.append(np.stack(rows)[:, points])
            weights.append(_weights(known))
            targets.append((found[-1][end], points, (steps if every else ones)[points]))
    names = ("transfer_s", "step_s", "fixed_s", "local_steps", "fragments", "overlap_steps")
    which = np.repeat(np.arange(len(asked)), [one.shape[1] for one in asked])
    columns = dict(zip(names, np.concatenate(asked, axis=1), strict=True))
    times = np.split(rounds(weights, which, **columns), np.cumsum([a.shape[1] for a in asked]))
    for (target, points, repeats), time in zip(targets, times[:-1], strict=True):
        target[points] = repeats * time
    return found


def _weights(known: Answered) -> tuple[float, ...]:
    """Share of the exchange in each layer, by what each syncs: embedding first, head last."""
    shape, traffic = known.question.shape, known.traffic
    layers = np.array(shape.layer_shared, float)
    table = shape.vocab_size * shape.d_model
    layers[0] += table
    layers[-1] += shape.d_model + (0 if shape.tied else table)
    layers *= float(traffic.shared.max()) / layers.sum()
    if shape.num_moe_layers:
        layers[shape.num_dense :] += float(traffic.experts.max()) / shape.num_moe_layers
    return tuple(layers / layers.sum()) if layers.sum() else (0.0,) * shape.num_layers
