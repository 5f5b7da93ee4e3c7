"""A scenario with the step time, link and fixed cost of real runs instead of our defaults."""

from __future__ import annotations

import argparse
from dataclasses import replace

from fomoe.errors import ConfigError
from fomoe_sim.scenario import Scenario

UNSEEN_BPS = 1e18


def calibrated(
    args: argparse.Namespace, scenario: Scenario, *, own_recompute: str | None, other_link: bool
) -> Scenario:
    """The scenario with what `fomoe calibrate` found, if a file of it is named.

    Args:
        own_recompute: what the config's step recomputes, as the fitted runs did; None for a preset,
            whose step was not fitted.
        other_link: whether the question names bandwidths of its own, by whatever flag.
    """
    if not args.calibration:
        return scenario
    from fomoe_sim.calibrate import load_calibration

    found = load_calibration(args.calibration)
    cluster = replace(scenario.cluster, sync_fixed_s=found.sync_fixed_s, rtt_s=0.0)
    if not other_link:
        # No rate was seen: the link was too fast to matter.
        rate = found.effective_bps or UNSEEN_BPS
        cluster = replace(cluster.with_bandwidth(rate, rate), efficiency=1.0)
    elif found.link_efficiency is None:
        rule = "has no link efficiency: calibrate with --bandwidth to use it for another link"
        raise ConfigError("--calibration", args.calibration, rule)
    else:
        cluster = replace(cluster, efficiency=min(1.0, found.link_efficiency))
    if own_recompute is None:
        # Another model's step time is not this model's; only the link is taken over.
        return replace(scenario, cluster=cluster)
    if scenario.recompute != own_recompute:
        rule = f"contradicts --calibration, whose step recomputes {own_recompute} (the config's)"
        raise ConfigError("--recompute", scenario.recompute, rule)
    return replace(
        scenario,
        cluster=cluster,
        step_time_s=found.step_time_s,
        step_time_flops=found.step_flops,
        step_fixed_s=found.step_fixed_s,
    )
