"""Published bandwidth tables, recomputed by the event model and compared bin by bin.

All printed bandwidths lie on one grid (`fomoe_sim.event.GRID_BPS`), so the distance between ours
and theirs is counted in grid bins. A table has one factor for all its cells; rows that nobody
printed come out of the same code with the same factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe_sim import published
from fomoe_sim.event import GRID_BPS, ImpossibleResult, check_conservation, required_bandwidth
from fomoe_sim.event_spec import EventSpec, equal_layers, send_at_round_end, send_fragments
from fomoe_sim.published import UTILISATIONS, BandwidthTable, Model


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure, ours and theirs.

    Attributes:
        bins_between: ours minus theirs on the bandwidth grid; None for figures off the grid.
        error: ours minus theirs in the table's unit, or relative where the tolerance is.
    """

    row: str
    column: str
    ours: float
    published: float
    bins_between: int | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One published table beside ours.

    Attributes:
        unit: of the figures.
        tolerance: what `passed` means, in words.
        summary: the counts or errors that were compared with the tolerance.
    """

    name: str
    source: str
    unit: str
    cells: tuple[Cell, ...]
    tolerance: str
    summary: str
    passed: bool


# ------------------------------------------------------------------------------- bandwidth tables


def printed(gbit_per_s: float) -> float:
    """A bandwidth as the tables print it: rounded to two decimals, then to one."""
    return round(round(float(gbit_per_s), 2), 1)


def bins_between(ours_gbit: float, theirs_printed: float) -> int:
    """Grid bins from a printed bandwidth to ours; the nearest where several bins print alike."""
    grid = GRID_BPS / 1e9
    own = int(np.argmin(np.abs(np.log(grid / ours_gbit))))
    alike = [i for i, value in enumerate(grid) if printed(value) == theirs_printed]
    assert alike, f"{theirs_printed} Gbit/s is not on the published grid"
    return min((own - i for i in alike), key=abs)


def table_spec(table: BandwidthTable, model: Model, method: str, factor: float) -> EventSpec:
    """One row of a bandwidth table as the event model's input."""
    layers = model.num_layers
    if method.startswith("H="):
        local_steps = int(method.removeprefix("H="))
    else:
        local_steps = 1 if method == "data-parallel" else published.STREAMING_LOCAL_STEPS
    streaming = method.startswith("streaming")
    if streaming:
        sends = send_fragments(layers, local_steps, published.LAYERS_PER_FRAGMENT)
    else:
        sends = send_at_round_end(layers, local_steps)
    return EventSpec(
        layer_bits=equal_layers(
            model.params,
            layers,
            bits=4 if method.endswith("fp4") else table.bits,
            num_sites=table.num_sites,
        ),
        step_time_s=model.step_time_s,
        local_steps=local_steps,
        sends=sends,
        overlap_steps=1 if "overlapped" in method else None,
        bits_factor=factor,
    )


def row_gbit(table: BandwidthTable, model: Model, method: str, factor: float) -> list[float]:
    """Bandwidths of one row, Gbit/s on the grid, one per utilisation."""
    spec = table_spec(table, model, method, factor)
    return [float(value) / 1e9 for value in required_bandwidth(spec, UTILISATIONS)]


def bandwidth_cells(table: BandwidthTable, factor: float) -> Iterator[Cell]:
    """The printed cells of a bandwidth table beside ours."""
    for model in table.models:
        for method, theirs in table.printed.get(model.name, {}).items():
            ours = row_gbit(table, model, method, factor)
            for share, own, their in zip(UTILISATIONS, ours, theirs, strict=True):
                yield Cell(
                    row=f"{model.name} {method}",
                    column=f"{share:.0%}",
                    ours=printed(own),
                    published=their,
                    bins_between=bins_between(own, their),
                )


def bandwidth_table(
    table: BandwidthTable, *, factor: float, name: str, min_exact: int, max_outside: int
) -> Table:
    """Compare a bandwidth table: all but `max_outside` cells within one bin, enough exact."""
    cells = tuple(bandwidth_cells(table, factor))
    bins = [abs(cell.bins_between or 0) for cell in cells]
    exact, within = bins.count(0), sum(distance <= 1 for distance in bins)
    share = f"all but {max_outside}" if max_outside else "all"
    tolerance = f"{share} within one bin, at least {min_exact} exact"
    return Table(
        name=name,
        source=table.source,
        unit=f"Gbit/s, factor {factor:.4g}",
        cells=cells,
        tolerance=tolerance,
        summary=f"{exact} of {len(cells)} exact, {within} within one bin",
        passed=len(cells) - within <= max_outside and exact >= min_exact,
    )


def impossible_table() -> Table:
    """The published rows below their own conservation floor: every one must be refused.

    The printed figure gets its benefit of the doubt: the largest grid value that prints like it,
    and the bits that the table's factor leaves.
    """
    table, steps = published.EAGER_UPDATES, published.EAGER_LOCAL_STEPS
    cells, refused = [], 0
    for model in table.models:
        ring = equal_layers(model.params, 1, bits=table.bits, num_sites=table.num_sites)
        bits = table.factor * sum(ring)
        (method,) = table.methods
        for share, value in zip(UTILISATIONS, table.printed[model.name][method], strict=True):
            largest = max(bps for bps in GRID_BPS if printed(bps / 1e9) == value)
            floor = share * bits / (steps * model.step_time_s)
            row, column = f"{model.name} {method}", f"{share:.0%}"
            cells.append(Cell(row=row, column=column, ours=floor / 1e9, published=value))
            try:
                check_conservation(
                    bits=bits,
                    bandwidth_bps=largest,
                    utilisation=share,
                    local_steps=steps,
                    step_time_s=model.step_time_s,
                )
            except ImpossibleResult:
                refused += 1
    return Table(
        name=table.name,
        source=table.source,
        unit="Gbit/s; ours is the least possible bandwidth",
        cells=tuple(cells),
        tolerance="every published cell is refused as impossible",
        summary=f"{refused} of {len(cells)} refused",
        passed=refused == len(cells),
    )


def predictions() -> list[dict[str, Any]]:
    """Every row of both bandwidth tables, printed or not, from the same code and factor."""
    return [
        {
            "table": table.name,
            "model": model.name,
            "method": method,
            "gbit_per_s": row_gbit(table, model, method, table.factor),
        }
        for table in (published.STREAMING_DILOCO, published.SCALING_LAWS)
        for model in table.models
        for method in table.methods
    ]
