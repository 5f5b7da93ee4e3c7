"""Run the measurements, print their table, write bench/latest.json, compare with the baseline."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import baseline
from bench.answers import answer_rows
from bench.codecs import sync_rows
from bench.growth import growth_rows
from bench.layers import Row, layer_rows, peak_rate
from bench.machine import Machine, find_machine, load_average
from bench.peaks import peak_rows
from bench.plot import growth
from bench.proxy import proxy_rows
from bench.steps import memory_rows, step_rows
from bench.transports import transport_rows
from fomoe.figures import SUFFIXES
from fomoe.hostmemory import keep_freed_memory

LATEST = Path(__file__).parent / "latest.json"
# Each table and the part that it belongs to.
TABLES = {
    "layers": "layers",
    "steps": "steps",
    "memory": "memory",
    "peaks": "memory",
    "growth": "growth",
    "proxy": "proxy",
    "answers": "answers",
    "sync": "sync",
    "transports": "sync",
}
PARTS = tuple(dict.fromkeys(TABLES.values()))


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; exit status 0, whatever the comparison says."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's CPU time"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; repeatable")
    parser.add_argument("--store", action="store_true", help="keep the ratios as the baseline")
    parser.add_argument("--plot", type=Path, help="draw the growth of cost: .svg, .png or .pdf")
    parser.add_argument(
        "--stored", type=Path, help="with --plot: draw these rows (JSON Lines); nothing is measured"
    )
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix not in SUFFIXES:
        parser.error(f"--plot {args.plot} must end in .svg, .png or .pdf")
    if args.stored:
        if not args.plot:
            parser.error("--stored needs --plot")
        growth([json.loads(row) for row in args.stored.read_text().splitlines()]).save(args.plot)
        return 0
    if args.clock == "cpu" and (args.threads or torch.get_num_threads()) != 1:
        parser.error("--clock cpu counts the waiting of threads for each other; add --threads 1")
    machine = find_machine(args.device, args.threads, args.clock)
    result = measure(machine, args.only or PARTS)
    print_tables(result, args.only or PARTS)
    LATEST.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot and result["growth"]:
        growth(result["growth"]).save(args.plot)
    if args.store:
        baseline.store(result, whole=not args.only)
    lines = baseline.compare(result, baseline.load(), whole=not args.only)
    print("\n".join(["", "against the baseline", *lines]))
    return 0


def measure(machine: Machine, parts: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """All rows of the parts; the allocator is set as in training, for every candidate."""
    if machine.device.type == "cpu":
        keep_freed_memory()
    result: dict[str, Any] = {
        "kind": f"{machine.kind}, {machine.clock} clock",
        "torch": torch.__version__,
        "load_before": load_average(),
        "peak_gflops": peak_rate(machine),
    }
    result["layers"] = []
    for shape in machine.layers if "layers" in parts else ():
        print(f"layer {shape.name} ...", file=sys.stderr)
        result["layers"] += layer_rows(machine, shape)
    peak = max(result["peak_gflops"].values())
    rest: dict[str, Callable[[], list[Row]]] = {
        "steps": lambda: step_rows(machine, peak),
        "memory": lambda: memory_rows(machine),
        "peaks": lambda: peak_rows(machine),
        "growth": lambda: growth_rows(machine),
        "proxy": lambda: proxy_rows(machine),
        "answers": lambda: answer_rows(machine),
        "sync": lambda: sync_rows(machine),
        "transports": lambda: transport_rows(machine),
    }
    for name, work in rest.items():
        if TABLES[name] in parts:
            print(f"{name} ...", file=sys.stderr)
        result[name] = work() if TABLES[name] in parts else []
    result["load_after"] = load_average()
    return result


def print_tables(result: dict[str, Any], parts: Sequence[str]) -> None:
    """The rows of every part as aligned text."""
    peak = ", ".join(f"{name} {rate:.0f}" for name, rate in result["peak_gflops"].items())
    print(f"{result['kind']}, torch {result['torch']}; matrix peak {peak} GFLOP/s")
    print(f"load average {result['load_before']:.1f} before, {result['load_after']:.1f} after")
    if "proxy" in parts and not result["proxy"]:
        print("proxy: left out, it needs an accelerator")
    for table in TABLES:
        if result[table]:
            print(f"\n{table}")
            print_table(result[table])


def print_table(rows: list[Row]) -> None:
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


if __name__ == "__main__":
    sys.exit(main())
