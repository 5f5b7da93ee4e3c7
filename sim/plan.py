"""`fomoe plan`: which method and settings suit these sites and constraints, and what binds?

Every candidate is costed by the code behind `fomoe project`. Constraints refuse candidates, the
rest is ranked by cost, and the Pareto set shows what more money, time or syncing would buy.
Fewer executed assignments make a token cheaper and a model worse; the planner does not predict
losses, so it keeps to a least executed share and a largest H instead.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fomoe.errors import ConfigError
from fomoe_sim.answer import Row, answers
from fomoe_sim.flags import add_question_flags, check_question
from fomoe_sim.output import scaled, to_table
from fomoe_sim.plan_config import missing_features, write_config
from fomoe_sim.question import Point, build_scenario, has_experts
from fomoe_sim.risk import RiskOptions, risk_columns
from fomoe_sim.scenario import LAYERS_PER_FRAGMENT, Scenario
from fomoe_sim.search import placements

LOCAL_STEPS = (8, 16, 32, 64, 100, 128, 256, 512)
BITS = (32, 8, 4)
# Largest H: Streaming DiLoCo and SPES sync every 100 steps (arXiv 2501.18512, 2602.11543).
MAX_LOCAL_STEPS = 100
# Least executed share: half of the assignments is what plain skipping runs at r = K/2, the most
# skipping that this project has trained at.
MIN_EXECUTED = 0.5
ROUND_METHODS = ("fomoe", "diloco", "spes")
STEP_METHODS = ("ddp", "fsdp", "ep")
RULES = ("memory", "executed share", "deadline", "budget", "coverage risk")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration, its row, and the constraints that it breaks."""

    scenario: Scenario
    row: Row
    broken: tuple[str, ...]


def add_command(subparsers: Any) -> None:
    """Register `plan` with the subparsers of an argparse parser."""
    parser = subparsers.add_parser(
        "plan", help="search settings for given sites and constraints, and say what binds"
    )
    add_question_flags(parser)
    group = parser.add_argument_group("constraints")
    group.add_argument("--method", help="keep to one method")
    group.add_argument("--budget", type=float, help="USD for the run, at central prices")
    group.add_argument("--deadline-days", type=float, help="of the run")
    group.add_argument("--max-coverage-risk", type=float, help="chance to lose an expert's holders")
    group.add_argument(
        "--min-executed", type=float, default=MIN_EXECUTED, help="least share of assignments run"
    )
    group.add_argument(
        "--max-local-steps", type=int, default=MAX_LOCAL_STEPS, help="largest H to consider"
    )
    group.add_argument(
        "--trainable", action="store_true", help="only what fomoe train runs as it stands"
    )
    shown = parser.add_argument_group("how it is shown")
    shown.add_argument("--json", action="store_true")
    shown.add_argument("--out", metavar="FILE.yaml", help="write the best plan as a config")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print, and write; 1 with one line if nothing meets the constraints."""
    check_question(args)
    _check_constraints(args)
    candidates = search(args)
    allowed = [candidate for candidate in candidates if not candidate.broken]
    if not allowed:
        raise ConfigError("plan", "", _nothing(candidates))
    front = pareto(allowed)
    best = min(front, key=lambda c: (c.row["cost_usd"], c.row["days"]))
    reasons = why(best, candidates)
    gaps = missing_features(best.scenario)
    if args.json:
        rows = [candidate.row for candidate in front]
        report = {"best": best.row, "why": reasons, "missing": gaps, "pareto": rows}
        print(json.dumps(report, indent=2))
    else:
        rows = sorted((c.row for c in front), key=lambda row: row["cost_usd"])
        print(f"{len(candidates)} configurations, {len(allowed)} allowed, {len(front)} in the")
        print("Pareto set (days, cost, local steps, executed share), cheapest first:")
        print(to_table(rows, limit=15))
        print("\nbest (cheapest):", describe(best.row))
        print("\n".join(f"  {reason}" for reason in reasons))
        if gaps:
            print("  fomoe train lacks: " + "; ".join(gaps) + " (--trainable keeps to what it has)")
    if args.out:
        write_config(args.out, best.scenario)
        print(f"wrote {args.out}")
    return 0


def _check_constraints(args: argparse.Namespace) -> None:
    for name in ("budget", "deadline_days", "max_coverage_risk", "max_local_steps"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be above 0")
    if not 0 <= args.min_executed <= 1:
        raise ConfigError("--min-executed", args.min_executed, "must lie in [0, 1]")
    if args.local_steps and args.local_steps > args.max_local_steps:
        rule = f"exceeds --max-local-steps {args.max_local_steps}"
        raise ConfigError("--local-steps", args.local_steps, rule)
    if args.out and Path(args.out).suffix not in (".yaml", ".yml"):
        raise ConfigError("--out", args.out, "must end in .yaml")
    if args.json and args.out:
        raise ConfigError("--out", args.out, "contradicts --json: it prints more than one object")
    if args.config:
        raise ConfigError("--config", args.config, "is already decided; plan starts from --model")


# ------------------------------------------------------------------------------------------ search


def search(args: argparse.Namespace) -> list[Candidate]:
    """All candidates of the grid, with the constraints that each breaks."""
    found: list[Candidate] = []
    for scenario in scenarios(args):
        if args.trainable and missing_features(scenario):
            continue
        steps = [h for h in _axis(args.local_steps, LOCAL_STEPS) if h <= args.max_local_steps]
        if scenario.traffic.every_step:
            steps = steps[:1]
        for row in answers(scenario, steps or [args.max_local_steps], None):
            here = replace(scenario, local_steps=int(row["local_steps"]))
            found.append(Candidate(scenario=here, row=row, broken=broken(args, here, row)))
    if not found:
        raise ConfigError("plan", "", "nothing of the grid can be trained as it stands")
    return found


def _axis(fixed: int | None, values: tuple[int, ...]) -> tuple[int, ...]:
    return values if fixed is None else (fixed,)


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    """Everything but local steps: method, placement, bits, fragments, overlap."""
    methods = (args.method,) if args.method else (*ROUND_METHODS, *STEP_METHODS)
    experts = has_experts(args)
    found = []
    for method in methods:
        if method in ("ep", "fomoe", "spes") and not experts:
            continue  # without routed experts these are DDP and DiLoCo
        plain = argparse.Namespace(**{**vars(args), "replication": None})
        base = build_scenario(plain, Point(method=method))
        placed = method in ("fomoe", "spes")
        tables = [
            table
            for recompute in _recompute(args)
            for table in _tables(replace(base, recompute=recompute), args.replication, placed)
        ]
        whole = base.shape.num_layers
        parts = (1, -(-whole // LAYERS_PER_FRAGMENT)) if method in ROUND_METHODS else (1,)
        for table in tables:
            for bits in _axis(args.bits, BITS):
                for fragments in _axis(args.fragments, parts):
                    overlaps = (0, 1) if fragments > 1 else (0,)
                    found += [
                        replace(table, bits=bits, fragments=fragments, overlap_steps=overlap)
                        for overlap in _axis(args.overlap_steps, overlaps)
                    ]
    return found


def _recompute(args: argparse.Namespace) -> tuple[Literal["none", "selective", "full"], ...]:
    if args.recompute:
        return (args.recompute,)
    return ("none",) if args.trainable else ("selective", "full")


def _tables(base: Scenario, replication: int | None, placed: bool) -> list[Scenario]:
    return placements(base, replication) if placed else [base]


def broken(args: argparse.Namespace, scenario: Scenario, row: Row) -> tuple[str, ...]:
    """Constraints that a candidate breaks."""
    checks = {
        "memory": row["fits"],
        "executed share": row["executed_fraction"] >= args.min_executed,
        "deadline": args.deadline_days is None or row["days"] <= args.deadline_days,
        "budget": args.budget is None or row["cost_usd"] <= args.budget,
    }
    if args.max_coverage_risk is not None and scenario.method == "fomoe":
        risk = risk_columns(scenario, row, RiskOptions())
        row["coverage_loss_probability"] = risk["coverage_loss_probability"]
        checks["coverage risk"] = risk["coverage_loss_probability"] <= args.max_coverage_risk
    return tuple(name for name, kept in checks.items() if not kept)


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates that no other one beats in days, cost, local steps and executed share at once."""

    def scores(candidate: Candidate) -> tuple[float, ...]:
        row = candidate.row
        return row["days"], row["cost_usd"], row["local_steps"], -row["executed_fraction"]

    front: list[tuple[tuple[float, ...], Candidate]] = []
    for candidate in sorted(candidates, key=scores):
        own = scores(candidate)
        # Sorted by days, so only an earlier candidate can beat this one.
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) for other, _ in front):
            front.append((own, candidate))
    return [candidate for _, candidate in front]


# ----------------------------------------------------------------------------------------- reasons


def describe(row: Row) -> str:
    """One plan in words."""
    return (
        f"{row['method']}, r = {row['replication_factor']:.3g}, H = {row['local_steps']}, "
        f"{row['bits']:g} bits, {row['fragments']} fragments, overlap {row['overlap_steps']}, "
        f"recompute {row['recompute']}: "
        f"{row['days']:.3g} days, {scaled(row['cost_usd_low'])} to "
        f"{scaled(row['cost_usd_high'])} USD, utilisation {100 * row['utilisation']:.1f} %"
    )


def why(best: Candidate, candidates: list[Candidate]) -> list[str]:
    """Which resource binds, and which constraints keep cheaper plans out."""
    row = best.row
    waiting = row["exposed_s_per_round"] / row["round_time_s"]
    uneven = max(0.0, 1 - row["utilisation"] - waiting)
    shares = {
        "compute": row["utilisation"],
        "the link": waiting,
        "waiting for slower sites": uneven,
    }
    binds = max(shares, key=lambda name: shares[name])
    parts = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    reasons = [f"binding resource: {binds} (of a round: {parts}; {row['slowest_link']})"]
    reasons.append(f"memory: {row['memory_verdict']}")
    cheaper = [c for c in candidates if c.row["cost_usd"] < row["cost_usd"] and c.broken]
    counts = Counter(name for candidate in cheaper for name in candidate.broken)
    for name, count in counts.most_common():
        reasons.append(f"{count} cheaper configurations break the {name} constraint")
    others: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: c.row["cost_usd"]):
        if candidate.row["method"] != row["method"]:
            others.setdefault(candidate.row["method"], candidate)
    for name, other in others.items():
        times = other.row["cost_usd"] / row["cost_usd"]
        note = f" and breaks {', '.join(other.broken)}" if other.broken else ""
        reasons.append(f"cheapest {name}: {times:.3g} x the cost{note}")
    return reasons


def _nothing(candidates: list[Candidate]) -> str:
    """One line: why no candidate is left, and the nearest."""
    counts = Counter(name for candidate in candidates for name in candidate.broken)
    parts = ", ".join(f"{name} refuses {count}" for name, count in counts.most_common())
    fewest = min(candidates, key=lambda c: (len(c.broken), c.row["cost_usd"]))
    hint = fewest.row["memory_verdict"] if "memory" in fewest.broken else describe(fewest.row)
    return f"nothing of {len(candidates)} configurations is left: {parts}; nearest: {hint}"
