"""`fomoe validate`: what others published or measured, beside what `evaluate` answers.

Whole runs, the trainer's own gains and the measured links go through `evaluate`, the function that
`fomoe project` asks; the bandwidth tables go through the event model alone. Every row has a bound,
and the command fails past it. No constant changed after the rows kept aside.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fomoe_sim import memory
from fomoe_sim.cluster import Cluster, uniform_cluster
from fomoe_sim.evaluate import answer_one, evaluate, grid
from fomoe_sim.methods import METHODS
from fomoe_sim.options import Ask
from fomoe_sim.question import Question, build
from fomoe_sim.shape import ModelShape, read_shape
from fomoe_sim.step import Inside
from fomoe_sim.tables import (
    BANDWIDTH_TABLES,
    Cell,
    Table,
    bandwidth_table,
    impossible_table,
    predictions,
    printed,
)
from fomoe_sim.traffic import cyclic_holdings
from fomoe_sim.trainer import read_data


def all_tables() -> list[Table]:
    """Every table that is compared, with its bound."""
    return [
        *run_tables(),
        gains_table(),
        *measured_tables(),
        *(bandwidth_table(*entry) for entry in BANDWIDTH_TABLES),
        impossible_table(),
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


# ------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The one flag of `fomoe validate`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 0 if every bound is kept, else 1."""
    tables, predicted = all_tables(), predictions()
    passed = all(table.passed for table in tables)
    score = read_data("published")["predicted_score"]
    if args.json:
        report = {
            "passed": passed,
            "tables": [asdict(table) for table in tables],
            "predictions": predicted,
            "predicted_score": score,
        }
        print(json.dumps(report, indent=1))
    else:
        print("\n\n".join([*map(table_text, tables), predictions_text(predicted, score)]))
        print("\n" + summary_text(tables))
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


def predictions_text(predicted: list[dict[str, Any]], score: dict[str, list[int]]) -> str:
    """Rows that were predicted before their figures were seen, and how many were exact."""
    shares = " ".join(f"{share:>6.0%}" for share in read_data("published")["utilisations"])
    lines = [f"{'predicted before their figures were seen [Gbit/s]':<58}{shares}"]
    for row in predicted:
        name = f"{row['table']} {row['model']} {row['method']}"
        figures = " ".join(f"{printed(value):6}" for value in row["gbit_per_s"])
        lines.append(f"  {name:<56}{figures}")
    words = ", ".join(f"{name} {exact} of {of} exact" for name, (exact, of) in score.items())
    return "\n".join([*lines, f"  score, counted against the papers by hand: {words}"])


def summary_text(tables: list[Table]) -> str:
    """One line per table."""
    width = max(len(table.name) for table in tables)
    return "\n".join(
        f"{'ok  ' if table.passed else 'MISS'} {table.name:<{width}}  {table.summary}"
        for table in tables
    )
