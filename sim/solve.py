"""The least bandwidth or H with which something holds: bisection over `evaluate`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fomoe_sim.evaluate import Columns, evaluate, grid, vary
from fomoe_sim.question import Question
from fomoe_sim.trainer import ConfigError
from fomoe_sim.units import MOST_LOCAL_STEPS

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
        return vary(question, local_steps=round(value))
    return vary(question, cluster=question.cluster.with_bandwidth(value, value))
