"""Why a plan is the best one: what binds, what keeps cheaper plans out, or why nothing is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe_sim.answer import Row
from fomoe_sim.output import scaled
from fomoe_sim.scenario import Scenario


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration, its row, and the constraints that it breaks."""

    scenario: Scenario
    row: Row
    broken: tuple[str, ...]


def describe(row: Row) -> str:
    """One plan in words."""
    return (
        f"{row['method']}, r = {row['replication_factor']:.3g}, H = {row['local_steps']}, "
        f"{row['bits']:g} bits, {row['fragments']} fragments, overlap {row['overlap_steps']}, "
        f"recompute {row['recompute']}: "
        f"{row['days']:.3g} days, {scaled(row['cost_usd_low'])} to "
        f"{scaled(row['cost_usd_high'])} USD, utilisation {100 * row['utilisation']:.1f} %"
    )


def why(best: Candidate, candidates: Sequence[Candidate]) -> list[str]:
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


def nothing(candidates: Sequence[Candidate]) -> str:
    """One line: why no candidate is left, and the nearest."""
    counts = Counter(name for candidate in candidates for name in candidate.broken)
    parts = ", ".join(f"{name} refuses {count}" for name, count in counts.most_common())
    fewest = min(candidates, key=lambda c: (len(c.broken), c.row["cost_usd"]))
    hint = fewest.row["memory_verdict"] if "memory" in fewest.broken else describe(fewest.row)
    return f"nothing of {len(candidates)} configurations is left: {parts}; nearest: {hint}"
