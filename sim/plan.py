"""`fomoe plan`: which method and settings suit these sites and constraints, and what binds?

Every candidate is answered by `evaluate`, as `fomoe project` would. Constraints refuse candidates,
the rest is ranked by cost, and the Pareto set shows what more money, time or syncing would buy. The
same accelerators on one site stand in the first row. Fewer executed assignments make a token
cheaper and a model worse; the planner does not predict that loss, so it keeps to a least executed
share and a largest H, and names the cheapest plan that they keep out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_sim.evaluate import Row, evaluate
from fomoe_sim.methods import BASELINE, METHODS, SEARCHED, method_of
from fomoe_sim.options import (
    ALL,
    Ask,
    add_flags,
    check_ask,
    check_methods,
    parallel_text,
    read_flags,
    read_parallel,
)
from fomoe_sim.question import (
    Question,
    baseline,
    build,
    check_replication,
    has_experts,
    slot_holdings,
)
from fomoe_sim.show import WIDTH, days, to_table
from fomoe_sim.sites import Answered, Grid, grid, over_capacity
from fomoe_sim.step import Inside
from fomoe_sim.traffic import cyclic_holdings
from fomoe_sim.trainconfig import config_tree, cyclic_factor, write_config
from fomoe_sim.trainer import CODECS, ConfigError, capacity_slots
from fomoe_sim.units import flag_of, percent, scaled

# All accelerators of a site share its states, as the trainer's ranks do.
_SHARDED = "tp=1,pp=1,cp=1,ep=1,shard={},zero=3"
LOCAL_STEPS = (8, 16, 32, 64, 100, 128, 256, 512)
BITS = tuple(CODECS[name].mean_bits for name in ("fp32", "int8", "int4"))
LAYERS_PER_FRAGMENT = 3


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a plan must keep to, see `fomoe_sim.options.OPTIONS`; None: nothing."""

    method: str | None = None
    budget: float | None = None
    deadline_days: float | None = None
    max_coverage_risk: float | None = None
    min_executed: float = 0.5
    max_local_steps: int = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One configuration: its row, the constraints that it breaks, and its grid's answer."""

    row: Row
    broken: tuple[str, ...]
    found: Answered = field(repr=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the question and of the constraints, and how the plan is shown."""
    add_flags(parser)
    add_flags(parser, ["trainable", "wide", "json", "out"], Constraints)


def run(args: argparse.Namespace) -> int:
    """Search, print, and write; 1 with one line if nothing meets the constraints."""
    ask: Ask = read_flags(args)
    limits: Constraints = read_flags(args, Constraints)
    check_ask(ask)
    _check(args, ask, limits)
    trainable = args.trainable or bool(args.out)
    ask, (candidates, one) = _with_sequences(ask, limits, trainable=trainable)
    allowed = [candidate for candidate in candidates if not candidate.broken]
    if not allowed:
        raise ConfigError("plan", "", nothing(candidates))
    front = pareto(allowed)
    best = min(front, key=lambda c: (c.row["cost_usd"], c.row["days"]))
    reasons = why(best, candidates, one)
    start = ""
    if args.out:
        start = write_config(args.out, planned(best), best.found.question.cluster.sites)
    shown = sorted(front, key=lambda c: c.row["cost_usd"])
    if args.json:
        rows = [{**c.row, "command": command(ask, c)} for c in shown]
        top = {**best.row, "command": command(ask, best)}
        gaps = [] if best.row["needs"] == "runs today" else best.row["needs"].split("; ")
        report = {"best": top, "why": reasons, "missing": gaps, "pareto": rows, "one_site": one}
        print(json.dumps(report, indent=2))
        return 0
    print(f"{len(candidates)} configurations, {len(allowed)} allowed; the {len(front)} that no")
    print("other beats in days, cost, local steps and executed share at once, cheapest first:")
    print(to_table([one, *(c.row for c in shown)], limit=16, wide=args.wide))
    print(f"\nbest (cheapest): {describe(best.row)}")
    for reason in [*reasons, f"again: {command(ask, best)}"]:
        filled = textwrap.wrap(reason, WIDTH - 4, break_on_hyphens=False, break_long_words=False)
        print("\n".join(("  " if index == 0 else "    ") + x for index, x in enumerate(filled)))
    if args.out:
        print(f"wrote {args.out}; {start}")
    return 0


def _with_sequences(
    ask: Ask, limits: Constraints, *, trainable: bool
) -> tuple[Ask, tuple[list[Candidate], Row]]:
    """The question with a step that is large enough, and what `search` finds.

    Where the size of a step is not said, it is the default or 2, 4 or 8 times as much: the first
    with which every accelerator has a sequence.
    """
    try:
        return ask, search(ask, limits, trainable=trainable)
    except ConfigError as error:
        if ask.batch_tokens or ask.config or error.field != "--batch-tokens":
            raise
        refused = error
    default = build(replace(ask, replication=None), limits.method or SEARCHED[0]).batch_tokens
    for factor in (2, 4, 8):
        larger = replace(ask, batch_tokens=factor * default)
        try:
            return larger, search(larger, limits, trainable=trainable)
        except ConfigError as error:
            if error.field != "--batch-tokens":
                raise
    raise refused


def _check(args: argparse.Namespace, ask: Ask, limits: Constraints) -> None:
    if ask.local_steps and ask.local_steps > limits.max_local_steps:
        rule = f"exceeds --max-local-steps {limits.max_local_steps}"
        raise ConfigError("--local-steps", ask.local_steps, rule)
    if args.out and Path(args.out).suffix not in (".yaml", ".yml"):
        raise ConfigError("--out", args.out, "must end in .yaml")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise ConfigError("--out", args.out, "is in a folder that does not exist")
    if args.json and args.out:
        raise ConfigError("--out", args.out, "contradicts --json: it prints more than one object")
    if ask.config:
        raise ConfigError("--config", ask.config, "is already decided; plan starts from --model")
    methods = [method_of(limits.method).name] if limits.method else list(SEARCHED)
    experts = has_experts(ask)
    check_methods(ask, methods, experts=experts)
    if limits.method and not experts and _needs_experts(limits.method):
        rule = "has no meaning for a model without experts"
        raise ConfigError("--method", limits.method, rule)
    if limits.max_coverage_risk is not None and not any(METHODS[m].skips for m in methods):
        rule = f"has no meaning for method {limits.method}, whose sites hold every expert"
        raise ConfigError("--max-coverage-risk", limits.max_coverage_risk, rule)


def _needs_experts(method: str) -> bool:
    """Without routed experts these are DDP and DiLoCo."""
    return METHODS[method].placed or METHODS[method].crosses == "tokens"


# ------------------------------------------------------------------------------------------ search


def search(ask: Ask, limits: Constraints, *, trainable: bool) -> tuple[list[Candidate], Row]:
    """All candidates with the constraints that each breaks, and one site's row."""
    experts = has_experts(ask)
    grids: list[Grid] = []
    lacking: list[list[str]] = []
    for method in (limits.method,) if limits.method else SEARCHED:
        if not experts and _needs_experts(method):
            continue
        plain = build(replace(ask, replication=None), method)
        check_replication(ask.replication, plain.cluster.num_sites)
        if trainable:
            plain = _as_trained(ask, plain, experts)
        for question in _placements(ask, plain):
            grids.append(_settings(ask, question, trainable=trainable))
    first = baseline(grids[0].question)
    columns = evaluate([*grids, grid(first)])
    rows = columns.rows()
    found: list[Candidate] = []
    for row, owner in zip(rows[:-1], columns.owners[:-1], strict=True):
        known = columns.answered[owner]
        if trainable and row["needs"] != "runs today":
            lacking.append(row["needs"].split("; "))
            continue
        found.append(Candidate(row=row, broken=broken(limits, row, known), found=known))
    if not found:
        fewest = (
            "; ".join(sorted(lacking, key=lambda gaps: len(gaps))[0])
            if lacking
            else "routed experts of this model"
        )
        rule = f"leaves nothing: fomoe train lacks at least {fewest}"
        raise ConfigError("--trainable", "", rule)
    return found, rows[-1]


def _as_trained(ask: Ask, question: Question, experts: bool) -> Question:
    """The layout and the recomputation that the trainer has."""
    chosen: tuple[str, ...] = ("none", "experts", "full") if experts else ("none", "full")
    if ask.recompute or ask.step_time:
        chosen = (ask.recompute or "none",)
    counts = {site.count for site in question.cluster.sites}
    layout = question.inside.parallel
    if not layout and counts != {1}:
        layout = read_parallel(_SHARDED.format(max(counts) if len(counts) == 1 else ALL))
    inside = replace(question.inside, recompute=chosen, parallel=layout)
    return replace(question, inside=inside)


def _placements(ask: Ask, base: Question) -> list[Question]:
    """The question under every replication factor, evenly and by what each site's memory holds."""
    num_sites, shape = base.cluster.num_sites, base.shape
    if not base.method.placed or ask.capacity:
        return [base]
    wanted = [ask.replication] if ask.replication else list(range(1, num_sites + 1))
    found = []
    for r in wanted:
        if base.cluster.capacities is None:
            even = cyclic_holdings(shape, num_sites, r)
            found.append(replace(base, holdings=even, replication=float(r)))
    capacity = base.cluster.capacities or _memory_capacity(base)
    for target in [*wanted, *([] if ask.replication else [None])]:
        room = sum(min(limit, shape.num_experts) for limit in capacity)
        if room < shape.num_experts * (target or 1):
            continue  # an expert would have too few holders
        slots = capacity_slots(capacity, shape.num_experts, target)
        if target and len(set(slots)) == 1 and base.cluster.capacities is None:
            continue  # even: cyclic has it
        holdings, replication = slot_holdings(shape, num_sites, slots)
        found.append(replace(base, holdings=holdings, replication=replication))
    if not found:
        rule = f"has capacity for too few of the {shape.num_experts} experts"
        raise ConfigError("--cluster", base.cluster.name, rule)
    return found


def _memory_capacity(base: Question) -> tuple[int, ...]:
    """Experts per layer that each site's memory holds, [K], by a line through two placements.

    The candidates themselves are checked again, so an estimate is enough.
    """
    num_sites, experts = base.cluster.num_sites, base.shape.num_experts
    ends = [cyclic_holdings(base.shape, num_sites, r) for r in (1, num_sites)]
    grids = [grid(replace(base, holdings=one, replication=1.0)) for one in ends]
    few, many = evaluate(grids).answered
    found = []
    for site in range(num_sites):
        low, high = (one.layouts[site].bytes for one in (few, many))
        counts = [float(one.traffic.residents[:, site].mean()) for one in (few, many)]
        each = (high - low) / max(counts[1] - counts[0], 1e-9)
        room = base.cluster.sites[site].accelerator.memory_bytes - low
        holds = counts[0] + room / each if each > 0 else experts
        found.append(int(max(0, min(experts, holds))))
    return tuple(found)


def _settings(ask: Ask, question: Question, *, trainable: bool) -> Grid:
    """One placement under every H, bits, fragments and overlap."""
    every = question.method.every_step
    steps = (ask.local_steps,) if ask.local_steps else LOCAL_STEPS[: 1 if every else None]
    bits = (ask.bits,) if ask.bits else BITS[: 1 if every and trainable else None]
    size = -(-question.shape.num_layers // LAYERS_PER_FRAGMENT)
    if trainable:  # it cuts the layers evenly
        size = max(n for n in range(1, size + 1) if question.shape.num_layers % n == 0)
    parts = (1,) if every else (1, size)
    if question.method.layers_per_fragment:
        parts = (size,)
    overlaps = (0,) if every else (0, 1)
    if not every:
        parts = (ask.fragments,) if ask.fragments else parts
        overlaps = (ask.overlap_steps,) if ask.overlap_steps is not None else overlaps
    points = [
        point
        for point in product(steps, bits, parts, overlaps)
        if (point[2] > 1 or not point[3] or ask.overlap_steps is not None)
        and not (trainable and _uneven(question.shape.num_layers, *point))
    ]
    if not points:
        rule = f"leaves no plan that can be trained: {ask.fragments or 1} fragments must divide "
        rule += f"{question.shape.num_layers} layers and H, and overlaps be below their quotient"
        field = "--overlap-steps" if ask.fragments is None else "--fragments"
        raise ConfigError(field, ask.fragments or ask.overlap_steps, rule)
    names = ("local_steps", "bits", "fragments", "overlap_steps")
    return grid(question, **dict(zip(names, np.array(points, float).T, strict=True)))


def _uneven(num_layers: int, steps: int, _: float, fragments: int, overlap: int) -> bool:
    """Whether the trainer would refuse to cut steps and layers so, or to overlap so many steps."""
    return bool(
        steps % fragments or num_layers % fragments or (overlap and overlap >= steps // fragments)
    )


def broken(limits: Constraints, row: Row, known: Answered) -> tuple[str, ...]:
    """Constraints that a candidate breaks."""
    over = bool(over_capacity(known))
    checks = {
        "capacity": not over,
        "memory": over or row["fits"],
        "executed share": row["executed_fraction"] >= limits.min_executed - 1e-12,
        "local steps": known.question.method.every_step
        or row["local_steps"] <= limits.max_local_steps,
        "deadline": limits.deadline_days is None or row["days"] <= limits.deadline_days,
        "budget": limits.budget is None or row["cost_usd"] <= limits.budget,
        "coverage risk": limits.max_coverage_risk is None
        or row["coverage_loss_probability"] <= limits.max_coverage_risk,
    }
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


# ------------------------------------------------------------------------------------------- words


def describe(row: Row) -> str:
    """One plan in words."""
    return (
        f"{row['method']}, r = {row['replication_factor']:.3g}, H = {row['local_steps']}, "
        f"{row['bits']:g} bits, {row['fragments']} fragments, overlap {row['overlap_steps']}: "
        f"{days(row['days'])}, {scaled(row['cost_usd'])} USD"
    )


def why(best: Candidate, candidates: list[Candidate], one: Row) -> list[str]:
    """What binds, what one site would take, and which constraints keep cheaper plans out."""
    row = best.row
    waiting = row["exposed_s_per_round"] / row["round_time_s"]
    uneven = max(0.0, 1 - row["utilisation"] - waiting)
    reasons = [
        f"binding resource: {row['binds']} (of a round: compute {percent(row['utilisation'])}, the "
        f"link {percent(waiting)}, slower sites {percent(uneven)}; {row['slowest_link']})",
        f"memory: {row['memory_verdict']}; experts per site {row['residents']}; {row['layout']}",
        f"{BASELINE}, the same accelerators: {days(one['days'])}, {scaled(one['cost_usd'])} USD",
        f"at equal work {days(row['days_at_equal_work'])}, goodput {percent(row['goodput'])}, "
        f"an expert's last live holder lost with probability "
        f"{percent(row['coverage_loss_probability'])}",
    ]
    if row["needs"] != "runs today":
        reasons.append(f"fomoe train lacks: {row['needs']} (--trainable keeps to what it has)")
    cheaper = [c for c in candidates if c.row["cost_usd"] < row["cost_usd"] and c.broken]
    counts = Counter(name for candidate in cheaper for name in candidate.broken)
    for name, count in counts.most_common():
        out = min((c for c in cheaper if name in c.broken), key=lambda c: c.row["cost_usd"])
        words = f"{count} cheaper configurations break the {name} constraint"
        reasons.append(f"{words}; the cheapest: {describe(out.row)}")
    others: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: c.row["cost_usd"]):
        if candidate.row["method"] != row["method"]:
            others.setdefault(candidate.row["method"], candidate)
    for name, other in others.items():
        times = other.row["cost_usd"] / row["cost_usd"]
        note = f" and breaks {', '.join(other.broken)}" if other.broken else ""
        reasons.append(f"cheapest {name}: {scaled(times)} x the cost{note}")
    return reasons


def nothing(candidates: list[Candidate]) -> str:
    """One line: why no candidate is left, and the nearest."""
    counts = Counter(name for candidate in candidates for name in candidate.broken)
    parts = ", ".join(f"{name} refuses {count}" for name, count in counts.most_common())
    fewest = min(candidates, key=lambda c: (len(c.broken), c.row["cost_usd"]))
    hint = fewest.row["memory_verdict"] if "memory" in fewest.broken else describe(fewest.row)
    return f"nothing of {len(candidates)} configurations is left: {parts}; nearest: {hint}"


def planned(candidate: Candidate) -> dict[str, Any]:
    """The candidate as nested options of a config."""
    row, known = candidate.row, candidate.found
    names = ("local_steps", "bits", "fragments", "overlap_steps")
    return config_tree(replace(known.question, **{n: row[n] for n in names}), known)


def command(ask: Ask, candidate: Candidate) -> str:
    """The `fomoe project` command that gives the candidate's row."""
    row, question = candidate.row, candidate.found.question
    method, inside, plain = question.method, question.inside, vars(Ask())
    values = {name: value for name, value in vars(ask).items() if value != plain[name]}
    values.pop("replication", None)
    values |= {"method": row["method"], "local_steps": row["local_steps"], "bits": row["bits"]}
    if not method.every_step:
        values |= {"fragments": row["fragments"], "overlap_steps": row["overlap_steps"]}
    if method.placed and question.shape.num_experts:
        counts = question.holdings.residents.max(axis=0).tolist()
        even = cyclic_factor(question)
        values |= {"replication": even} if even else {"capacity": ",".join(map(str, counts))}
    if question.split != "speed":
        values["split"] = question.split
    if inside.parallel and not ask.parallel:
        values["parallel"] = parallel_text(inside.parallel)
    if inside.recompute != Inside(seq_len=1).recompute:
        values["recompute"] = row["recompute"]
    words = [f"{flag_of(name)} {shlex.quote(_plain(value))}" for name, value in values.items()]
    return " ".join(["fomoe project", *words])


def _plain(value: Any) -> str:
    return f"{value:.17g}" if isinstance(value, float) else str(value)
