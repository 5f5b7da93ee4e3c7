"""`fomoe project`: what would this run cost, does it fit, and how long does it take?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fomoe.errors import ConfigError
from fomoe_sim.answer import Row, answer
from fomoe_sim.flags import add_question_flags, check_methods, check_question
from fomoe_sim.output import explain, risk_lines, sources_lines, to_csv, to_json, to_table
from fomoe_sim.plot import write_plot
from fomoe_sim.question import Point, build_scenario, has_experts, methods_asked
from fomoe_sim.ranges import MOST_LOCAL_STEPS, flag_of
from fomoe_sim.risk import REPAIR_HOURS, RiskOptions, risk_columns
from fomoe_sim.scenario import Scenario
from fomoe_sim.sweep import read_axes, sweep

LEAST_BPS, MOST_BPS = 1e3, 1e15  # of --solve


def add_command(subparsers: Any) -> None:
    """Register `project` with the subparsers of an argparse parser."""
    parser = subparsers.add_parser(
        "project", help="project traffic, memory, time and money of a run, before it is bought"
    )
    add_question_flags(parser)
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--method", help="fomoe, diloco, photon, streaming, spes, ddp, fsdp, ep; a config's"
    )
    group.add_argument("--compare", metavar="M,M", help="several methods side by side")
    group.add_argument(
        "--sweep",
        nargs="+",
        metavar="AXIS=VALUES",
        help="grid of options: 1,2,4, or 32..512 (doubling), or 1..100..1 (with a step)",
    )
    group.add_argument(
        "--solve", choices=("bandwidth", "local_steps"), help="least value that reaches a target"
    )
    group.add_argument("--utilisation", type=float, help="that target, between 0 and 1")
    risk = parser.add_argument_group("what may go wrong")
    risk.add_argument("--step-variation", type=float, help="deviation over mean of a step's time")
    risk.add_argument("--slow-probability", type=float, help="chance of a slow site per round")
    risk.add_argument("--slow-factor", type=float, help="how much slower it is")
    risk.add_argument("--quorum", type=int, help="sites that a round waits for; all by default")
    risk.add_argument("--mtbf-hours", type=float, help="between failures of one site")
    risk.add_argument("--repair-hours", type=float, help="until a failed site is back")
    shown = parser.add_argument_group("how it is shown")
    shown.add_argument("--json", action="store_true", help="one object, or a list of them")
    shown.add_argument("--csv", action="store_true", help="all columns, one row per configuration")
    shown.add_argument("--plot", metavar="OUT.svg", help="also draw utilisation over bandwidth")
    shown.add_argument(
        "--explain", action="store_true", help="what each column means, its unit, our defaults"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer and print; 0, or 1 if a stated cluster can hold none of the answers."""
    if args.explain:
        if args.json or args.csv:
            raise ConfigError("--explain", "", "is text: leave --json and --csv out")
        print(explain())
        return 0
    check_question(args)
    _check_output(args)
    methods = methods_asked(args)
    axes = read_axes(args.sweep) if args.sweep else {}
    check_methods(args, methods, experts=has_experts(args), axes=tuple(axes))
    points = {method: point_of(args, method) for method in methods}
    refused: list[str] = []
    if args.sweep:
        rows, refused = sweep(args, methods, points, axes)
    else:
        rows = [_answer(args, points[method]) for method in methods]
    _print(args, rows, single=not (args.sweep or args.compare))
    if args.plot:
        write_plot(args.plot, rows)
    for reason in refused:
        print(f"left out: {reason}", file=sys.stderr)
    if args.cluster and not any(row["fits"] for row in rows):
        verdict = rows[0]["memory_verdict"]
        print(f"fomoe: --cluster {args.cluster}: {verdict}", file=sys.stderr)
        return 1
    return 0


def point_of(args: argparse.Namespace, method: str) -> Point:
    """The flags' own point for a method."""
    return Point(
        method=method,
        bits=args.bits,
        fragments=args.fragments,
        overlap_steps=args.overlap_steps,
        other_link=args.solve == "bandwidth",
    )


def _check_output(args: argparse.Namespace) -> None:
    if args.json and args.csv:
        raise ConfigError("--csv", "", "contradicts --json")
    if (args.solve is None) != (args.utilisation is None):
        lonely = "--solve" if args.utilisation is None else "--utilisation"
        rule = "needs both --solve and --utilisation"
        raise ConfigError(lonely, args.solve or args.utilisation, rule)
    if args.utilisation is not None and not 0 < args.utilisation < 1:
        raise ConfigError("--utilisation", args.utilisation, "must lie between 0 and 1")
    if args.solve == "bandwidth" and args.bandwidth:
        raise ConfigError("--bandwidth", args.bandwidth, "contradicts --solve bandwidth")
    if args.solve == "local_steps" and args.local_steps:
        raise ConfigError("--local-steps", args.local_steps, "contradicts --solve local_steps")
    if args.method and args.compare:
        raise ConfigError("--method", args.method, "contradicts --compare, which lists methods")
    if args.sweep and args.solve:
        raise ConfigError("--sweep", args.sweep, "contradicts --solve")
    if args.plot and Path(args.plot).suffix != ".svg":
        raise ConfigError("--plot", args.plot, "must end in .svg")
    given = [name for name in RISK_FLAGS if getattr(args, name) is not None]
    if args.sweep and given:
        raise ConfigError(flag_of(given[0]), getattr(args, given[0]), "is not computed in a sweep")


RISK_FLAGS = (
    "step_variation",
    "slow_probability",
    "slow_factor",
    "quorum",
    "mtbf_hours",
    "repair_hours",
)


def _risk_options(args: argparse.Namespace) -> RiskOptions:
    return RiskOptions(
        step_variation=args.step_variation or 0.0,
        slow_probability=args.slow_probability or 0.0,
        slow_factor=1.0 if args.slow_factor is None else args.slow_factor,
        quorum=args.quorum,
        mtbf_hours=args.mtbf_hours,
        repair_hours=REPAIR_HOURS if args.repair_hours is None else args.repair_hours,
    )


def _answer(args: argparse.Namespace, point: Point) -> Row:
    scenario = build_scenario(args, point)
    if args.solve:
        scenario = solve(scenario, args.solve, args.utilisation)
    row = answer(scenario)
    row["risk"] = risk_columns(scenario, row, _risk_options(args))
    return row


def solve(scenario: Scenario, what: str, target: float) -> Scenario:
    """The least bandwidth of equal links, or the least H, that reaches a utilisation.

    Raises:
        ConfigError: if nothing in the searched range reaches it.
    """

    def with_value(value: float) -> Scenario:
        if what == "bandwidth":
            cluster = scenario.cluster.with_bandwidth(value, value)
            return replace(scenario, cluster=cluster)
        return replace(scenario, local_steps=round(value))

    low, high = (LEAST_BPS, MOST_BPS) if what == "bandwidth" else (1.0, MOST_LOCAL_STEPS)
    best = answer(with_value(high))
    if best["utilisation"] < target:
        shared = best["slowest_link"].startswith("uplink")
        rest = best["slowest_link"] if shared else "fixed cost, latency and slower sites"
        rule = (
            f"is not reached by {scenario.label}: {what} {high:g} gives "
            f"{best['utilisation']:.3f} (what remains: {rest})"
        )
        raise ConfigError("--utilisation", target, rule)
    while high / low > 1.001 and (what == "bandwidth" or high - low > 1):
        middle = (low * high) ** 0.5 if what == "bandwidth" else (low + high) // 2
        reached = answer(with_value(middle))["utilisation"] >= target
        low, high = (low, middle) if reached else (middle, high)
    lowest = what == "local_steps" and answer(with_value(low))["utilisation"] >= target
    return with_value(low if lowest else high)


def _print(args: argparse.Namespace, rows: list[Row], *, single: bool) -> None:
    if args.json:
        print(to_json(rows, single=single))
    elif args.csv:
        print(to_csv(rows), end="")
    else:
        print(to_table(rows))
        if args.sweep:
            print("units, meanings, and the source of every default: fomoe project --explain")
        else:
            print("\n".join(["", *risk_lines(rows), "", *sources_lines(_replaced(args))]))


def _replaced(args: argparse.Namespace) -> frozenset[str]:
    """Defaults that this question does not use."""
    names: set[str] = set()
    if args.config:
        names |= {"sites", "batch tokens", "tokens of the run"}
    if args.calibration:
        names |= {"link efficiency, fixed cost", "rtt"}
    if args.mfu or args.step_time or (args.calibration and args.config):
        names |= {"mfu (MoE)", "mfu (dense)"}
    return frozenset(names)
