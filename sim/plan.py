"""`fomoe plan`: which method and settings suit these sites and constraints, and what binds?

Every candidate is costed by the code behind `fomoe project`. Constraints refuse candidates, the
rest is ranked by cost, and the Pareto set shows what more money, time or syncing would buy.
Fewer executed assignments make a token cheaper and a model worse; the planner does not predict
losses, so it keeps to a least executed share and a largest H instead.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fomoe.errors import ConfigError
from fomoe_sim.answer import Row, answer, answers
from fomoe_sim.flags import PLACED, add_question_flags, check_methods, check_question
from fomoe_sim.memory import capacity_verdict, site_memories
from fomoe_sim.methods import check_method
from fomoe_sim.output import to_table
from fomoe_sim.plan_config import missing_features, write_config
from fomoe_sim.question import Point, build_scenario, has_experts
from fomoe_sim.reasons import Candidate, describe, nothing, why
from fomoe_sim.risk import RiskOptions, risk_columns
from fomoe_sim.scenario import LAYERS_PER_FRAGMENT, Scenario
from fomoe_sim.search import placements
from fomoe_sim.sites import check_replication
from fomoe_sim.traffic import EVERY_STEP

LOCAL_STEPS = (8, 16, 32, 64, 100, 128, 256, 512)
BITS = (32, 8, 4)
# Largest H: Streaming DiLoCo and SPES sync every 100 steps (arXiv 2501.18512, 2602.11543).
MAX_LOCAL_STEPS = 100
# Least executed share: half of the assignments is what plain skipping runs at r = K/2, the most
# skipping that this project has trained at.
MIN_EXECUTED = 0.5
# Photon is DiLoCo's cost, and Streaming DiLoCo is DiLoCo with fragments, low bits and overlap.
NEEDS_EXPERTS = ("fomoe", "spes", "ep")
SEARCHED = ("fomoe", "diloco", "spes", "ddp", "fsdp", "ep")


Recompute = Literal["none", "experts", "selective", "full"]


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
    front = pareto([c for c in timed(args, pareto(allowed)) if not c.broken])
    if not front:
        raise ConfigError("plan", "", nothing(candidates))
    best = min(front, key=lambda c: (c.row["cost_usd"], c.row["days"]))
    reasons = why(best, candidates)
    gaps = missing_features(best.scenario)
    if args.json:
        rows = [candidate.row for candidate in front]
        report = {"best": best.row, "why": reasons, "missing": gaps, "pareto": rows}
        print(json.dumps(report, indent=2))
    else:
        rows = sorted((c.row for c in front), key=lambda row: row["cost_usd"])
        print(f"{len(candidates)} configurations, {len(allowed)} allowed; the {len(front)} that no")
        print("other beats in days, cost, local steps and executed share at once, cheapest first:")
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
    if args.local_steps and args.local_steps > args.max_local_steps:
        rule = f"exceeds --max-local-steps {args.max_local_steps}"
        raise ConfigError("--local-steps", args.local_steps, rule)
    if args.out and Path(args.out).suffix not in (".yaml", ".yml"):
        raise ConfigError("--out", args.out, "must end in .yaml")
    if args.json and args.out:
        raise ConfigError("--out", args.out, "contradicts --json: it prints more than one object")
    if args.config:
        raise ConfigError("--config", args.config, "is already decided; plan starts from --model")
    methods = [check_method(args.method)] if args.method else list(SEARCHED)
    experts = has_experts(args)
    check_methods(args, methods, experts=experts)
    if args.method in NEEDS_EXPERTS and not experts:
        raise ConfigError("--method", args.method, "has no meaning for a model without experts")
    if args.max_coverage_risk is not None and "fomoe" not in methods:
        rule = f"has no meaning for method {args.method}, whose sites hold every expert"
        raise ConfigError("--max-coverage-risk", args.max_coverage_risk, rule)


# ------------------------------------------------------------------------------------------ search


def search(args: argparse.Namespace) -> list[Candidate]:
    """All candidates of the grid, with the constraints that each breaks."""
    found: list[Candidate] = []
    lacking: list[list[str]] = []
    for scenario in scenarios(args):
        if args.trainable and (gaps := missing_features(scenario)):
            lacking.append(gaps)
            continue
        steps = [h for h in _axis(args.local_steps, LOCAL_STEPS) if h <= args.max_local_steps]
        if scenario.traffic.every_step:
            steps = steps[:1]
        for row in answers(scenario, steps or [args.max_local_steps], None):
            here = replace(scenario, local_steps=int(row["local_steps"]))
            found.append(Candidate(scenario=here, row=row, broken=broken(args, here, row)))
    if not found:
        fewest = (
            "; ".join(sorted(lacking, key=lambda gaps: len(gaps))[0])
            if lacking
            else "routed experts of this model"
        )
        rule = f"leaves nothing: fomoe train lacks at least {fewest}"
        raise ConfigError("--trainable", "", rule)
    return found


def timed(args: argparse.Namespace, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates as `fomoe project` answers them: the search is analytic, overlap is events."""
    found = []
    for candidate in candidates:
        row = answer(candidate.scenario)
        rules = broken(args, candidate.scenario, row)
        found.append(replace(candidate, row=row, broken=rules))
    return found


def _axis(fixed: int | None, values: tuple[int, ...]) -> tuple[int, ...]:
    return values if fixed is None else (fixed,)


def scenarios(args: argparse.Namespace) -> list[Scenario]:
    """Everything but local steps: method, placement, bits, fragments, overlap."""
    experts = has_experts(args)
    found = []
    for method in (args.method,) if args.method else SEARCHED:
        if method in NEEDS_EXPERTS and not experts:
            continue  # without routed experts these are DDP and DiLoCo
        plain = argparse.Namespace(**{**vars(args), "replication": None})
        # The grid's fragments; a stated number is checked against the layers here.
        base = build_scenario(plain, Point(method=method, fragments=args.fragments))
        check_replication(args.replication, base.cluster.num_sites)
        for recompute in _recompute(args, experts):
            for table in _tables(replace(base, recompute=recompute), args.replication):
                found += _syncs(args, table)
    return found


def _recompute(args: argparse.Namespace, experts: bool) -> tuple[Recompute, ...]:
    """Choices to try; a stated step time has its recomputation in it, so there is one."""
    if args.recompute:
        return (args.recompute,)
    if not args.trainable:
        return ("selective",) if args.step_time else ("selective", "full")
    if args.step_time:
        return ("none",)
    return ("none", "experts", "full") if experts else ("none", "full")


def _tables(base: Scenario, replication: int | None) -> list[Scenario]:
    return placements(base, replication) if base.method in PLACED else [base]


def _syncs(args: argparse.Namespace, table: Scenario) -> list[Scenario]:
    """One placement under every number of bits, fragments and steps of overlap."""
    if table.method in EVERY_STEP:
        return [replace(table, bits=bits) for bits in _axis(args.bits, BITS)]
    by_size = -(-table.shape.num_layers // LAYERS_PER_FRAGMENT)
    parts = (by_size,) if table.method == "streaming" else (1, by_size)
    return [
        replace(table, bits=bits, fragments=fragments, overlap_steps=overlap)
        for bits in _axis(args.bits, BITS)
        for fragments in _axis(args.fragments, parts)
        for overlap in _axis(args.overlap_steps, (0, 1) if fragments > 1 else (0,))
    ]


def broken(args: argparse.Namespace, scenario: Scenario, row: Row) -> tuple[str, ...]:
    """Constraints that a candidate breaks."""
    over = capacity_verdict(scenario) is not None
    checks = {
        "capacity": not over,
        "memory": all(m.fits for m in site_memories(scenario)) if over else row["fits"],
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
