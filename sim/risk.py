"""What goes wrong and what it costs: stragglers, site failures, quorum, expert coverage.

Failures and coverage are closed forms; stragglers are sampled with a fixed seed
(`fomoe_sim.stragglers`), so equal questions get equal answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, exp, prod
from typing import Any

from fomoe.errors import ConfigError
from fomoe_sim.hardware import central
from fomoe_sim.memory import FLOAT32
from fomoe_sim.scenario import Scenario
from fomoe_sim.stragglers import StepTimes, round_time_percentiles
from fomoe_sim.timing import step_times

# Llama-3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, table 5),
# at more than 90 % effective training time over 466 interruptions.
ACCELERATOR_MTBF_HOURS = 54 * 24 * 16_384 / 419
REPAIR_HOURS = 0.1 * 54 * 24 / 466
PERCENTILES = (50, 90, 99)


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
    """Refuse options that make no sense.

    Raises:
        ConfigError: naming the flag.
    """
    if (options.slow_probability > 0) != (options.slow_factor > 1):
        rule = "needs both --slow-probability above 0 and --slow-factor above 1"
        raise ConfigError("--slow-factor", options.slow_factor, rule)
    for flag, value in (("mtbf", options.mtbf_hours), ("repair", options.repair_hours)):
        if value is not None and value <= 0:
            raise ConfigError(f"--{flag}-hours", value, "must be above 0")
    if options.quorum is not None and not 1 <= options.quorum <= num_sites:
        rule = f"must be between 1 and the {num_sites} sites"
        raise ConfigError("--quorum", options.quorum, rule)


def at_least(count: int, num_sites: int, chance: float) -> float:
    """Probability that at least `count` of K independent events of equal chance happen."""
    terms = (
        comb(num_sites, j) * chance**j * (1 - chance) ** (num_sites - j)
        for j in range(count, num_sites + 1)
    )
    return min(1.0, sum(terms))


def coverage_rate(scenario: Scenario, mtbf_hours: list[float], repair_hours: float) -> float:
    """Expected events per hour in which some expert loses its last live holder.

    Sites fail and return independently (exponential times). A set of holders goes from one live
    holder to none at the rate sum_i 1/mtbf_i x P(i up) x P(all others down); sets are summed, which
    counts sets that share sites as if they were independent.
    """
    down = [repair_hours / (mtbf + repair_hours) for mtbf in mtbf_hours]
    rate = 0.0
    for members, numel in scenario.holdings.groups:
        for holders, size in zip(members.tolist(), numel.tolist(), strict=True):
            if not size:
                continue
            # P(i up, the others down) / mtbf_i = P(all down) / repair, as up_i / down_i is
            # mtbf_i / repair: every holder adds the same.
            rate += len(holders) * prod(down[site] for site in holders) / repair_hours
    return rate


def risk_columns(scenario: Scenario, row: dict[str, Any], options: RiskOptions) -> dict[str, Any]:
    """Risk of one answered configuration over its whole run."""
    sites = scenario.cluster.sites
    num_sites = len(sites)
    check_risk(options, num_sites)
    mtbf = [options.mtbf_hours or ACCELERATOR_MTBF_HOURS / site.count for site in sites]
    repair, hours = options.repair_hours, 24 * row["days"]
    up = [m / (m + repair) for m in mtbf]
    quorum = options.quorum or num_sites
    # Sites differ little in availability; the mean stands for them in the binomial.
    enough = at_least(quorum, num_sites, sum(up) / num_sites)
    failures = sum(hours / m for m in mtbf)
    held = scenario.traffic.held.astype(float)
    rejoin = FLOAT32 * held * (1 + scenario.outer_vectors)
    slowest = max(
        8 * amount / (site.down_bps * scenario.cluster.efficiency)
        for amount, site in zip(rejoin.tolist(), sites, strict=True)
    )
    fleet = sum(site.count * central(site.price_per_hour) for site in sites)
    columns: dict[str, Any] = {
        "site_mtbf_hours": min(mtbf),
        "repair_hours": repair,
        "quorum": quorum,
        "failures_per_run": failures,
        "time_share_with_quorum": enough,
        "days_with_failures": row["days"] / enough,
        "rejoin_bytes": int(rejoin.max()),
        "rejoin_time_s": slowest,
        "rejoin_bytes_per_run": float(failures * rejoin.mean()),
    }
    if scenario.method == "fomoe" and scenario.shape.num_experts:
        columns |= _coverage(scenario, mtbf, repair, hours, fleet)
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


def _coverage(
    scenario: Scenario, mtbf: list[float], repair: float, hours: float, fleet: float
) -> dict[str, float]:
    """Chance and cost of an expert without live holder: all sites wait for the first to return."""
    events = coverage_rate(scenario, mtbf, repair) * hours
    fewest = min(members.shape[1] for members, _ in scenario.holdings.groups)
    pause = repair / fewest  # the first of n independent repairs
    return {
        "coverage_loss_events": events,
        "coverage_loss_probability": 1 - exp(-events),
        "coverage_pause_hours": events * pause,
        "coverage_cost_usd": events * pause * fleet,
    }
