"""`fomoe validate`: what others published or measured, beside what `evaluate` answers.

Whole runs, the trainer's own gains and the measured links go through `evaluate`, the function that
`fomoe project` asks. The bandwidth tables' models are nominal sizes of equal layers, so they go
through the event model alone; all their bandwidths lie on one grid, so the distance from theirs to
ours is counted in grid bins. Every row has a bound, and the command fails past it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fomoe_sim import memory
from fomoe_sim.cluster import Cluster, uniform_cluster
from fomoe_sim.columns import loss_ratio
from fomoe_sim.evaluate import answer_one, evaluate, grid
from fomoe_sim.methods import METHODS
from fomoe_sim.options import Ask
from fomoe_sim.overlap import Array, at_round_end, round_time, strided
from fomoe_sim.question import Question, build
from fomoe_sim.shape import ModelShape, read_shape
from fomoe_sim.step import Inside
from fomoe_sim.traffic import cyclic_holdings
from fomoe_sim.trainer import read_data

# Bandwidths of the published tables, bit/s; neighbours differ by a factor of 1.207.
GRID_BPS: Array = np.logspace(-1, 3, 50) * 1e9
STREAMING_LOCAL_STEPS, LAYERS_PER_FRAGMENT = 100, 3
# (table, its rows, factor of its own or nominal sizes, least exact, most that are over one bin off)
BANDWIDTH_TABLES = (
    ("streaming-diloco-4", "printed", True, 46, 0),
    ("streaming-diloco-4", "printed", False, 0, 1),
    ("streaming-diloco-4", "held_out", True, 23, 0),
    ("scaling-laws-6", "printed", True, 30, 0),
    ("scaling-laws-6", "held_out", True, 16, 1),
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


def all_tables() -> list[Table]:
    """Every table that is compared, with its bound."""
    return [
        *run_tables(),
        gains_table(),
        *measured_tables(),
        law_table(),
        *(bandwidth_table(*entry) for entry in BANDWIDTH_TABLES),
    ]


# ------------------------------------------------------------------------------ through evaluate


def run_tables() -> list[Table]:
    """Whole runs: those that are bound, and those kept aside."""
    found = []
    for aside in (False, True):
        chosen = [run for run in read_data("published")["runs"] if run.get("aside", False) == aside]
        cells = tuple(map(_compared, chosen))
        errors = [abs(cell.error or 0) for cell in cells]
        limits = [run.get("bound", 0.0) for run in chosen]
        kept = sum(error <= limit + 1e-12 for error, limit in zip(errors, limits, strict=True))
        bounds = ", ".join(f"{100 * bound:.0f} %" for bound in sorted({*limits} - {0.0}))
        found.append(
            Table(
                name="runs-aside" if aside else "runs",
                source="see sim/data/published.yaml, row by row",
                unit="GPU hours, tokens/s per accelerator, GiB, or whether it fits (1)",
                cells=cells,
                tolerance=f"each row's own: {bounds}",
                summary=f"{kept} of {len(cells)} within bounds, worst {100 * max(errors):.0f} %",
                passed=kept == len(cells),
            )
        )
    return found


def _compared(run: dict[str, Any]) -> Cell:
    """One published run, asked on one site."""
    row = answer_one(build(Ask(sites=1, **run["ask"]), "ddp"))
    # An allocator reads all of an accelerator's memory but CUDA's own context.
    parts = row["memory_parts"].items()
    inside = [p["bytes"] for n, p in parts if p["where"] != "host" and n != memory.RESERVED]
    ours = {
        "gpu_hours": 24 * row["days"] * row["accelerators"],
        "tokens_per_s": row["tokens_per_s"] / row["accelerators"],
        "gib": sum(inside) / 2**30,
        "fits": float(row["fits"]),
    }
    (column,) = [name for name in ours if name in run]
    theirs = float(run[column])
    error = ours[column] / theirs - 1
    return Cell(row=run["name"], column=column, ours=ours[column], published=theirs, error=error)


def gains_table() -> Table:
    """How much faster the trainer's own step is where it skips, against its measurements."""
    data = read_data("published")["gains"]
    full, cells = _own_step(data, None), []
    for executed, gain in data["gains"].items():
        ours, column = full / _own_step(data, float(executed)), f"{executed}"
        error = ours / gain - 1
        cells.append(Cell(row="step time", column=column, ours=ours, published=gain, error=error))
    worst = max(abs(cell.error or 0) for cell in cells)
    return Table(
        name="own-gains",
        source=data["source"],
        unit="times as fast as with all experts, by executed share",
        cells=tuple(cells),
        tolerance=f"each within {100 * data['bound']:.0f} %",
        summary=f"worst error {100 * worst:.1f} %",
        passed=worst <= data["bound"],
    )


def _own_step(data: dict[str, Any], executed: float | None) -> float:
    """Seconds of a step of the trainer's, with all experts resident or a share executed."""
    shape = read_shape("own-step", data["shape"], "published gains")
    question = _question(
        shape,
        uniform_cluster(2, accelerator=data["accelerator"], count=1, up_bps=1e9, down_bps=1e9),
        "fomoe",
        replication=1 if executed else 2,
        batch_tokens=2.0 * data["tokens"],
        inside=Inside(
            seq_len=shape.seq_len,
            micro_batch=data["tokens"] // shape.seq_len,
            recompute=("none",),
            precision="fp32",
        ),
        router=(("execute_target", executed),),
    )
    return float(answer_one(question)["step_time_s"])


def _question(
    shape: ModelShape, cluster: Cluster, method: str, *, replication: int, **more: Any
) -> Question:
    """A question about a shape that is no preset."""
    options: dict[str, Any] = {
        "local_steps": 1,
        "bits": 32.0,
        "fragments": 1,
        "overlap_steps": 0,
    }
    return Question(
        ask=Ask(),
        shape=shape,
        cluster=cluster,
        method=METHODS[method],
        label=method,
        holdings=cyclic_holdings(shape, cluster.num_sites, replication),
        replication=float(replication),
        tokens=1e9,
        **(options | more),
    )


def measured_tables() -> list[Table]:
    """Shaped TCP links: ring volume over bandwidth, and with our default efficiency and cost."""
    data = read_data("published")["measured"]
    shape, count = read_shape("measured", data["shape"], "published measured"), data["num_sites"]
    cluster = replace(
        uniform_cluster(count, accelerator="H100", count=1, up_bps=1e9, down_bps=1e9), rtt_ms=0.0
    )
    links = {"ring": replace(cluster, efficiency=1.0, sync_fixed_s=0.0), "defaults": cluster}
    points = [(h, rate) for h in data["percent"] for rate in data["bandwidth_bps"]]
    theirs = [value for row in data["percent"].values() for value in row]
    found = []
    for name, link in links.items():
        question = _question(
            shape,
            link,
            "diloco",
            replication=count,
            batch_tokens=float(count * shape.seq_len),
            inside=Inside(seq_len=shape.seq_len),
            step_time_s=data["step_time_s"],
        )
        steps, rates = zip(*points, strict=True)
        answers = evaluate([grid(question, local_steps=steps, bandwidth=rates)])
        ours = [100 * share for share in answers.values["utilisation"]]
        cells = tuple(
            Cell(row=f"H={h}", column=f"{rate / 1e6:.0f}M", ours=o, published=t, error=o - t)
            for (h, rate), o, t in zip(points, ours, theirs, strict=True)
        )
        mean = float(np.mean([abs(cell.error or 0) for cell in cells]))
        bound = data["bounds"][name]
        found.append(
            Table(
                name=f"measured-tcp-{name}",
                source=data["source"],
                unit="% utilisation",
                cells=cells,
                tolerance=f"mean error at most {bound} points",
                summary=f"mean error {mean:.2f} points",
                passed=mean <= bound,
            )
        )
    return found


def law_table() -> Table:
    """DiLoCo's loss over data-parallel's: the law of `token_overhead` beside printed losses."""
    law, cells = read_data("published")["diloco_law"], []
    for size, (parallel, *losses) in law["losses"].items():
        for replicas, loss in zip(law["replicas"], losses, strict=False):
            ours, theirs = loss_ratio(law, size, replicas), loss / parallel
            row, error = f"{size / 1e6:.0f} M parameters", ours / theirs - 1
            column = f"K={replicas}"
            cells.append(Cell(row=row, column=column, ours=ours, published=theirs, error=error))
    worst = max(abs(cell.error or 0) for cell in cells)
    return Table(
        name="diloco-law",
        source=law["source"],
        unit="loss over data-parallel's",
        cells=tuple(cells),
        tolerance=f"each within {100 * law['bound']:.1f} %",
        summary=f"worst error {100 * worst:.1f} %",
        passed=worst <= law["bound"],
    )


# -------------------------------------------------------------------------------- bandwidth tables


def printed(gbit_per_s: float) -> float:
    """A bandwidth as the tables print it: rounded to two decimals, then to one."""
    return round(round(float(gbit_per_s), 2), 1)


def bins_between(ours_gbit: float, theirs_printed: float) -> int:
    """Grid bins from a printed bandwidth to ours; the nearest where several bins print alike."""
    own = int(np.argmin(np.abs(np.log(GRID_BPS / 1e9 / ours_gbit))))
    alike = [i for i, bps in enumerate(GRID_BPS) if printed(bps / 1e9) == theirs_printed]
    assert alike, f"{theirs_printed} Gbit/s is not on the published grid"
    return min((own - i for i in alike), key=abs)


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


def bandwidth_table(name: str, part: str, fitted: bool, min_exact: int, max_outside: int) -> Table:
    """Compare a bandwidth table: all but `max_outside` cells within one bin, enough exact."""
    data = read_data("published")
    table = data["tables"][name]
    factor = table["factor"] if fitted else 1.0
    cells = []
    for model, rows in table[part].items():
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
    held_out = part == "held_out"
    fit = ", a fit to the table's other models" if held_out else ", a fit to this table"
    return Table(
        name=name + ("-held-out" if held_out else "" if fitted else "-nominal"),
        source=table["source"],
        unit=f"Gbit/s, bits times {factor:.4g}" + (fit if fitted else ""),
        cells=tuple(cells),
        tolerance=f"{share} within one bin, at least {min_exact} exact",
        summary=f"{exact} of {len(cells)} exact, {within} within one bin",
        passed=len(cells) - within <= max_outside and exact >= min_exact,
    )


# ------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The one flag of `fomoe validate`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 0 if every bound is kept, else 1."""
    tables = all_tables()
    passed = all(table.passed for table in tables)
    if args.json:
        report = {"passed": passed, "tables": [asdict(table) for table in tables]}
        print(json.dumps(report, indent=1))
    else:
        print("\n\n".join([*map(table_text, tables), summary_text(tables)]))
    return 0 if passed else 1


def table_text(table: Table) -> str:
    """One table, row by row; a cell reads `ours / theirs (error or bins between)`."""
    rows: dict[str, list[Cell]] = {}
    for cell in table.cells:
        rows.setdefault(cell.row, []).append(cell)
    width = max(map(len, rows))
    cell_width = max(len(_cell_text(cell)) for cell in table.cells)
    lines = [f"{table.name}: {table.source} [{table.unit}]"]
    for row, cells in rows.items():
        figures = "".join(f"  {cell.column} {_cell_text(cell):<{cell_width}}" for cell in cells)
        lines.append(f"  {row:<{width}}{figures}".rstrip())
    return "\n".join([*lines, f"  {table.summary} (tolerance: {table.tolerance})"])


def _cell_text(cell: Cell) -> str:
    between = ""
    if cell.bins_between is not None:
        between = f" ({cell.bins_between:+d})".replace("+0", "0")
    elif cell.error is not None and cell.column.endswith("M"):
        between = f" ({cell.error:+.2f})"
    elif cell.error is not None:
        between = f" ({100 * cell.error:+.1f} %)"
    return f"{cell.ours:.4g} / {cell.published:.4g}{between}"


def summary_text(tables: list[Table]) -> str:
    """One line per table."""
    width = max(len(table.name) for table in tables)
    return "\n".join(
        f"{'ok  ' if table.passed else 'MISS'} {table.name:<{width}}  {table.summary}"
        for table in tables
    )
