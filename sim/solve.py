"""What else `evaluate` is asked: the least value with which a goal holds, and what moves most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fomoe_sim.cluster import Cluster
from fomoe_sim.evaluate import Columns, evaluate
from fomoe_sim.options import MOST_LOCAL_STEPS
from fomoe_sim.question import Question
from fomoe_sim.sites import grid
from fomoe_sim.trainer import ConfigError

LEAST_BPS, MOST_BPS = 1e3, 1e15
CLOSE = 1.0005  # ratio of a solved bandwidth to one that is too low
POINTS = 65
Holds = Callable[[Columns], list[bool]]


def utilisation_of(target: float) -> Holds:
    """Whether sites compute for at least that share of the time."""
    return lambda columns: [value >= target for value in columns.values["utilisation"]]


def days_within(limit: float) -> Holds:
    """Whether the run takes no more days."""
    return lambda columns: [value <= limit for value in columns.values["days"]]


def least(question: Question, what: str, holds: Holds, goal: str) -> Question:
    """The question at the least value with which the goal holds.

    Args:
        what: `bandwidth`, of every site's own link, or `local_steps`.
        goal: the option that states the goal, for the refusal.

    Raises:
        ConfigError: if the goal does not hold at the largest value; says what is left.
    """
    whole = what == "local_steps"
    low, high = (1.0, float(MOST_LOCAL_STEPS)) if whole else (LEAST_BPS, MOST_BPS)
    ends = evaluate([grid(question, **{what: [low, high]})])
    at_low, at_high = holds(ends)
    if not at_high:
        last = ends.rows()[1]
        shared = last["slowest_link"].startswith("uplink")
        rest = (
            last["slowest_link"] if shared else "fixed cost, latency, slower sites, inside of sites"
        )
        rule = (
            f"is not reached by {question.label}: {what} {high:g} gives utilisation "
            f"{last['utilisation']:.3f} and {last['days']:.3g} days (what remains: {rest})"
        )
        raise ConfigError(goal, "", rule)
    if at_low:
        return _at(question, what, low)
    while (high - low > 1) if whole else (high / low > CLOSE):
        values = np.geomspace(low, high, POINTS)
        if whole:
            values = np.unique(np.round(np.concatenate([values, [low + 1]])))
        kept = holds(evaluate([grid(question, **{what: values})]))
        # The first that holds has one before it that fails: the invariant of a bisection.
        first = next(index for index, ok in enumerate(kept) if ok and index)
        low, high = float(values[first - 1]), float(values[first])
    return _at(question, what, high)


def _at(question: Question, what: str, value: float) -> Question:
    if what == "local_steps":
        return replace(question, local_steps=round(value))
    return replace(question, cluster=question.cluster.with_bandwidth(value, value))


# ----------------------------------------------------------------------------------------- tornado


def tornado(question: Question) -> list[tuple[str, float, float]]:
    """(assumption, fewest days, most days), each assumption alone, the widest first."""
    cluster, ask = question.cluster, question.ask
    base = evaluate([grid(question)]).rows()[0]
    # As many failures a site as all of them have on average.
    mtbf = 24 * base["days"] * cluster.num_sites / base["failures_per_run"]
    steps = [max(1, round(question.local_steps * factor)) for factor in (0.5, 2.0)]
    changes: dict[str, list[dict[str, Any]]] = {
        "every link, half and twice": [{"cluster": _scaled(cluster, f)} for f in (0.5, 2.0)],
        "link efficiency 0.6 and 1": [
            {"cluster": replace(cluster, efficiency=share)} for share in (0.6, 1.0)
        ],
        "round trip, a quarter and 4 times": [
            {"cluster": replace(cluster, rtt_ms=cluster.rtt_ms * f)} for f in (0.25, 4.0)
        ],
        "local steps, half and twice": [{"local_steps": count} for count in steps],
        "bits, half and twice": [{"bits": min(32.0, question.bits * f)} for f in (0.5, 2.0)],
        "failures, 4 times as many and a quarter": [
            {"ask": replace(ask, mtbf_hours=f * mtbf)} for f in (0.25, 4.0)
        ],
        "batch, half and twice": [{"batch_tokens": question.batch_tokens * f} for f in (0.5, 2.0)],
    }
    found = [("shares of peak, high and low", base["days_low"], base["days_high"])]
    for name, pair in changes.items():
        try:
            values = evaluate([grid(replace(question, **one)) for one in pair]).values["days"]
        except ConfigError:
            continue  # half of the batch may be too small for the accelerators
        found.append((name, min(values), max(values)))
    return sorted(found, key=lambda item: item[1] / item[2])


def _scaled(cluster: Cluster, factor: float) -> Cluster:
    sites = tuple(
        replace(site, up_bps=site.up_bps * factor, down_bps=site.down_bps * factor)
        for site in cluster.sites
    )
    uplinks = tuple((name, rate * factor) for name, rate in cluster.uplinks)
    return replace(cluster, sites=sites, uplinks=uplinks)
