"""What goes wrong and what it costs: stragglers, site failures, quorum, expert coverage.

A failed site is down until it is repaired and has fetched what it lacks (`fomoe_sim.rejoin`).
Failures and coverage are closed forms; stragglers are sampled with a fixed seed
(`fomoe_sim.stragglers`), so equal questions get equal answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, exp
from typing import Any

import numpy as np

from fomoe.errors import ConfigError
from fomoe_sim.hardware import central
from fomoe_sim.rejoin import rejoin
from fomoe_sim.scenario import Scenario
from fomoe_sim.stragglers import StepTimes, round_time_percentiles
from fomoe_sim.timing import step_times
from fomoe_sim.traffic import Floats

# Llama-3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, table 5),
# at more than 90 % effective training time over 466 interruptions.
ACCELERATOR_MTBF_HOURS = 54 * 24 * 16_384 / 419
REPAIR_HOURS = 0.1 * 54 * 24 / 466
PERCENTILES = (50, 90, 99)
HOUR, HOURS_PER_DAY = 3600.0, 24.0


@dataclass(frozen=True, kw_only=True)
class RiskOptions:
    """What to assume about sites.

    Attributes:
        step_variation: standard deviation over mean of one step's time.
        slow_probability, slow_factor: chance that a site is slower by that factor for a round.
        quorum: sites that a round waits for; None: all.
        mtbf_hours: of one site; None: the accelerators' rate times their number.
        repair_hours: until a failed site is back.
    """

    step_variation: float = 0.0
    slow_probability: float = 0.0
    slow_factor: float = 1.0
    quorum: int | None = None
    mtbf_hours: float | None = None
    repair_hours: float = REPAIR_HOURS


def check_risk(options: RiskOptions, num_sites: int) -> None:
    """Refuse options that make no sense together; their ranges are checked with all flags.

    Raises:
        ConfigError: naming the flag.
    """
    if (options.slow_probability > 0) != (options.slow_factor > 1):
        rule = "needs both --slow-probability above 0 and --slow-factor above 1"
        raise ConfigError("--slow-factor", options.slow_factor, rule)
    if options.quorum is not None and options.quorum > num_sites:
        rule = f"must be between 1 and the {num_sites} sites"
        raise ConfigError("--quorum", options.quorum, rule)


def at_least(count: int, num_sites: int, chance: float) -> float:
    """Probability that at least `count` of K independent events of equal chance happen."""
    terms = (
        comb(num_sites, j) * chance**j * (1 - chance) ** (num_sites - j)
        for j in range(count, num_sites + 1)
    )
    return min(1.0, sum(terms))


def coverage(scenario: Scenario, mtbf_hours: Floats, downtime_hours: Floats) -> tuple[float, float]:
    """Events per hour in which some expert loses its last live holder, and share of time without.

    Sites fail and return independently (exponential times). A set of holders goes from one live
    holder to none at the rate sum_i P(i up) / mtbf_i x P(all others down), which is P(all down) x
    sum_i 1 / downtime_i. Sets are summed, which counts sets that share sites as if they were
    independent.
    """
    down = downtime_hours / (mtbf_hours + downtime_hours)
    rate = share = 0.0
    for members, numel in scenario.holdings.groups:
        sets = np.unique(members[numel > 0], axis=0)
        all_down = down[sets].prod(axis=1)
        rate += float((all_down * (1 / downtime_hours)[sets].sum(axis=1)).sum())
        share += float(all_down.sum())
    return rate, share


def risk_columns(scenario: Scenario, row: dict[str, Any], options: RiskOptions) -> dict[str, Any]:
    """Risk of one answered configuration over its whole run."""
    sites = scenario.cluster.sites
    num_sites = len(sites)
    check_risk(options, num_sites)
    counts = np.array([site.count for site in sites], float)
    mtbf = np.full(num_sites, options.mtbf_hours or 0.0)
    mtbf = mtbf if options.mtbf_hours else ACCELERATOR_MTBF_HOURS / counts
    amounts, seconds = rejoin(scenario)
    downtime = options.repair_hours + seconds / HOUR
    hours = HOURS_PER_DAY * row["days"]
    quorum = options.quorum or num_sites
    # Sites differ little in availability; the mean stands for them in the binomial.
    enough = at_least(quorum, num_sites, float((mtbf / (mtbf + downtime)).mean()))
    failures = hours / mtbf
    columns: dict[str, Any] = {
        "site_mtbf_hours": float(mtbf.min()),
        "repair_hours": options.repair_hours,
        "quorum": quorum,
        "failures_per_run": float(failures.sum()),
        "time_share_with_quorum": enough,
        "days_with_failures": row["days"] / enough if enough > 1e-9 else None,
        "rejoin_bytes": int(amounts.max()),
        "rejoin_time_s": float(seconds.max()),
        "rejoin_bytes_per_run": float((failures * amounts).sum()),
    }
    if scenario.method == "fomoe" and scenario.shape.num_experts:
        fleet = sum(site.count * central(site.price_per_hour) for site in sites)
        events, share = (hours * x for x in coverage(scenario, mtbf, downtime))
        columns |= {
            "coverage_loss_events": events,
            "coverage_loss_probability": 1 - exp(-events),
            "coverage_pause_hours": share,
            "coverage_cost_usd": share * fleet,
        }
    if options.step_variation or options.slow_probability:
        columns |= _stragglers(scenario, row, options, quorum)
    return columns


def _stragglers(
    scenario: Scenario, row: dict[str, Any], options: RiskOptions, quorum: int
) -> dict[str, float]:
    """Percentiles of the round time over sampled rounds."""
    steps = int(row["local_steps"])
    times = StepTimes(
        mean_s=tuple(step_times(scenario, scenario.mfu[1]).tolist()),
        variation=options.step_variation,
        slow_probability=options.slow_probability,
        slow_factor=options.slow_factor,
    )
    found = round_time_percentiles(
        times,
        local_steps=steps,
        sync_s=row["exposed_s_per_round"],
        percentiles=PERCENTILES,
        quorum=quorum,
    )
    return {f"round_time_p{p}_s": float(t) for p, t in zip(PERCENTILES, found, strict=True)}
