"""`fomoe validate`: recompute every published table with its formula and compare cell by cell.

A simulator earns the right to predict by reproducing first. Each table names its source and its
tolerance; the command fails if any tolerance is missed. Bandwidth rows that nobody printed are
listed as predictions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from fomoe_sim import published
from fomoe_sim.anchors import (
    activation_table,
    deepseek_tables,
    intellect_table,
    measured_table,
)
from fomoe_sim.published import UTILISATIONS
from fomoe_sim.reproduce import (
    Cell,
    Table,
    bandwidth_table,
    impossible_table,
    predictions,
    printed,
)


def all_tables() -> list[Table]:
    """Every table that is reproduced, with its tolerance."""
    streaming, laws = published.STREAMING_DILOCO, published.SCALING_LAWS
    nominal = f"{streaming.name}-nominal"
    return [
        bandwidth_table(
            streaming, factor=streaming.factor, name=streaming.name, min_exact=46, max_outside=0
        ),
        bandwidth_table(streaming, factor=1.0, name=nominal, min_exact=0, max_outside=1),
        bandwidth_table(laws, factor=laws.factor, name=laws.name, min_exact=30, max_outside=0),
        impossible_table(),
        measured_table(calibrated=False, max_error=2.5),
        measured_table(calibrated=True, max_error=1.5),
        intellect_table(),
        activation_table(),
        *deepseek_tables(),
    ]


def add_command(subparsers: Any) -> None:
    """Register `validate` with the subparsers of an argparse parser."""
    parser = subparsers.add_parser(
        "validate", help="recompute the published tables and compare cell by cell"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 0 if every tolerance is met, else 1."""
    return run_validate(as_json=args.json)


def run_validate(*, as_json: bool) -> int:
    """Recompute, print, and return the exit code."""
    tables, predicted = all_tables(), predictions()
    if as_json:
        report = {
            "passed": all(table.passed for table in tables),
            "tables": [asdict(table) for table in tables],
            "predictions": predicted,
        }
        print(json.dumps(report, indent=1))
    else:
        print("\n\n".join([*map(table_text, tables), predictions_text(predicted)]))
        print("\n" + summary_text(tables))
    return 0 if all(table.passed for table in tables) else 1


def table_text(table: Table) -> str:
    """One table, row by row; a cell reads `ours / theirs (bins between)`."""
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
    ours = f"{cell.ours:.4g}"
    between = "" if cell.bins_between is None else f" ({cell.bins_between:+d})"
    return f"{ours} / {cell.published:g}{between}".replace("(+0)", "(0)")


def predictions_text(predicted: list[dict[str, Any]]) -> str:
    """Rows without printed figures."""
    tables = {table.name: table for table in (published.STREAMING_DILOCO, published.SCALING_LAWS)}
    shares = " ".join(f"{share:>6.0%}" for share in UTILISATIONS)
    lines = [f"{'predictions: rows without printed figures [Gbit/s]':<58}{shares}"]
    for row in predicted:
        if row["model"] not in tables[row["table"]].printed:
            name = f"{row['table']} {row['model']} {row['method']}"
            figures = " ".join(f"{printed(value):6}" for value in row["gbit_per_s"])
            lines.append(f"  {name:<56}{figures}")
    return "\n".join(lines)


def summary_text(tables: list[Table]) -> str:
    """One line per table."""
    width = max(len(table.name) for table in tables)
    return "\n".join(
        f"{'ok  ' if table.passed else 'MISS'} {table.name:<{width}}  {table.summary}"
        for table in tables
    )
