"""Published bandwidth tables, recomputed by the event model and compared bin by bin.

Their models are nominal sizes of equal layers, so they go through the event model alone. All
printed bandwidths lie on one grid, so the distance from theirs to ours is counted in grid bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe_sim.overlap import Array, at_round_end, round_time, strided
from fomoe_sim.trainer import read_data

# Bandwidths of the published tables, bit/s; neighbours differ by a factor of 1.207.
GRID_BPS: Array = np.logspace(-1, 3, 50) * 1e9
STREAMING_LOCAL_STEPS, LAYERS_PER_FRAGMENT, EAGER_LOCAL_STEPS = 100, 3, 100
# (table, factor of its own or nominal sizes, least exact cells, most cells more than one bin off)
BANDWIDTH_TABLES = (
    ("streaming-diloco-4", True, 46, 0),
    ("streaming-diloco-4", False, 0, 1),
    ("scaling-laws-6", True, 30, 0),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure, ours and theirs; `bins_between` counts on the bandwidth grid, else None."""

    row: str
    column: str
    ours: float
    published: float
    bins_between: int | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Published figures beside ours; `tolerance` says in words what `passed` means."""

    name: str
    source: str
    unit: str
    cells: tuple[Cell, ...]
    tolerance: str
    summary: str
    passed: bool


def printed(gbit_per_s: float) -> float:
    """A bandwidth as the tables print it: rounded to two decimals, then to one."""
    return round(round(float(gbit_per_s), 2), 1)


def alike(theirs_printed: float) -> list[int]:
    """Grid bins that print as a published bandwidth."""
    found = [i for i, bps in enumerate(GRID_BPS) if printed(bps / 1e9) == theirs_printed]
    assert found, f"{theirs_printed} Gbit/s is not on the published grid"
    return found


def bins_between(ours_gbit: float, theirs_printed: float) -> int:
    """Grid bins from a printed bandwidth to ours; the nearest where several bins print alike."""
    own = int(np.argmin(np.abs(np.log(GRID_BPS / 1e9 / ours_gbit))))
    return min((own - i for i in alike(theirs_printed)), key=abs)


def row_gbit(
    table: dict[str, Any], model: dict[str, Any], method: str, factor: float
) -> list[float]:
    """The first bandwidths of the grid that reach the utilisations of a row, Gbit/s."""
    layers, step_s = int(model["num_layers"]), model["step_time_s"]
    if method.startswith("H="):
        local_steps = int(method.removeprefix("H="))
    else:
        local_steps = 1 if method == "data-parallel" else STREAMING_LOCAL_STEPS
    bits = factor * model["params"] * (4 if method.endswith("fp4") else table["bits"])
    ring = 2 * (1 - 1 / table["num_sites"])
    steps = np.full(GRID_BPS.shape, float(local_steps))
    fragments = -(-layers // LAYERS_PER_FRAGMENT)
    streams = method.startswith("streaming")
    time = round_time(
        layer_s=np.tile(ring * bits / layers / GRID_BPS, (layers, 1)),
        step_s=step_s,
        local_steps=steps,
        sends=strided(layers, steps, fragments) if streams else at_round_end(layers, steps),
        overlap_steps=1 if "overlapped" in method else None,
    )
    reached = local_steps * step_s / time
    wanted = read_data("published")["utilisations"]
    assert reached[-1] >= max(wanted), f"{method}: the grid does not reach {max(wanted)}"
    return [float(GRID_BPS[(reached >= share - 1e-12).argmax()] / 1e9) for share in wanted]


def bandwidth_table(name: str, fitted: bool, min_exact: int, max_outside: int) -> Table:
    """Compare a bandwidth table: all but `max_outside` cells within one bin, enough exact."""
    data = read_data("published")
    table = data["tables"][name]
    factor = table["factor"] if fitted else 1.0
    cells = []
    for model, rows in table["printed"].items():
        for method, theirs in rows.items():
            ours = row_gbit(table, table["models"][model], method, factor)
            for share, own, their in zip(data["utilisations"], ours, theirs, strict=True):
                cell = Cell(
                    row=f"{model} {method}",
                    column=f"{share:.0%}",
                    ours=printed(own),
                    published=their,
                    bins_between=bins_between(own, their),
                )
                cells.append(cell)
    bins = [abs(cell.bins_between or 0) for cell in cells]
    exact, within = bins.count(0), sum(distance <= 1 for distance in bins)
    share = f"all but {max_outside}" if max_outside else "all"
    return Table(
        name=name if fitted else f"{name}-nominal",
        source=table["source"],
        unit=f"Gbit/s, bits times {factor:.4g}" + (", a fit to this table" if fitted else ""),
        cells=tuple(cells),
        tolerance=f"{share} within one bin, at least {min_exact} exact",
        summary=f"{exact} of {len(cells)} exact, {within} within one bin",
        passed=len(cells) - within <= max_outside and exact >= min_exact,
    )


def impossible_table() -> Table:
    """Published rows below their own conservation floor, all of which must be found so.

    A utilisation u means a round of H T / u seconds, so a link carries at least u x bits / (H T).
    The printed figure gets its benefit of the doubt: the largest grid value that prints like it,
    and the bits that the table's factor leaves.
    """
    data = read_data("published")
    table = data["tables"]["eager-updates-5"]
    cells, below = [], 0
    for name, rows in table["printed"].items():
        model = table["models"][name]
        bits = table["factor"] * model["params"] * table["bits"] * 2 * (1 - 1 / table["num_sites"])
        for share, value in zip(data["utilisations"], rows["1-outer-step-fp4"], strict=True):
            floor = share * bits / (EAGER_LOCAL_STEPS * model["step_time_s"])
            cells.append(Cell(row=name, column=f"{share:.0%}", ours=floor / 1e9, published=value))
            below += bool(GRID_BPS[max(alike(value))] < floor)
    return Table(
        name="eager-updates-5",
        source=table["source"],
        unit="Gbit/s; ours is the least possible bandwidth",
        cells=tuple(cells),
        tolerance="every published cell is refused as impossible",
        summary=f"{below} of {len(cells)} refused",
        passed=below == len(cells),
    )


def predictions() -> list[dict[str, Any]]:
    """Rows of both bandwidth tables that are not printed here, from the same code and factor."""
    found = []
    for name in ("streaming-diloco-4", "scaling-laws-6"):
        table = read_data("published")["tables"][name]
        for model, sizes in table["models"].items():
            for method in table["methods"] if model not in table["printed"] else ():
                figures = row_gbit(table, sizes, method, table["factor"])
                found.append(
                    {"table": name, "model": model, "method": method, "gbit_per_s": figures}
                )
    return found
