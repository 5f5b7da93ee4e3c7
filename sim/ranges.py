"""Which numbers the flags take: finite, and within limits beyond which nothing is a real question.

The limits keep every product of the formulas finite, so that no answer is infinite or not a number.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from fomoe.errors import ConfigError

MOST_SITES = 256
MOST_LOCAL_STEPS = 1_000_000
MOST_USD = 1e6  # of one accelerator-hour or GB


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers up to a limit: from `low`, or from above 0.

    Attributes:
        low: least number; None: any above 0.
    """

    high: float
    low: float | None = None


RANGES = {
    "sites": Range(high=MOST_SITES),
    "accelerators": Range(high=1e6),
    "price": Range(high=MOST_USD, low=0),
    "rtt_ms": Range(high=1e6, low=0),
    "replication": Range(high=MOST_SITES),
    "local_steps": Range(high=MOST_LOCAL_STEPS),
    "bits": Range(high=32),
    "fragments": Range(high=1e6),
    "overlap_steps": Range(high=1000, low=0),
    "tokens": Range(high=1e18, low=1),
    "batch_tokens": Range(high=1e12, low=1),
    "seq_len": Range(high=1e7),
    "micro_batch": Range(high=1e6),
    "mfu": Range(high=1, low=1e-6),
    "step_time": Range(high=1e7, low=1e-9),
    "step_variation": Range(high=10, low=0),
    "slow_probability": Range(high=1, low=0),
    "slow_factor": Range(high=1e6, low=1),
    "quorum": Range(high=MOST_SITES),
    "mtbf_hours": Range(high=1e9, low=1e-6),
    "repair_hours": Range(high=1e9, low=1e-6),
    "budget": Range(high=1e15),
    "deadline_days": Range(high=1e9),
    "max_coverage_risk": Range(high=1),
    "min_executed": Range(high=1, low=0),
    "max_local_steps": Range(high=MOST_LOCAL_STEPS),
}


def check_number(flag: str, value: float, limits: Range) -> None:
    """Refuse a number that is not finite or not within its limits.

    Raises:
        ConfigError: naming the flag as it was typed.
    """
    if value != value:
        raise ConfigError(flag, value, "must be a number")
    if limits.low == 0 and value < 0:
        raise ConfigError(flag, value, "must not be negative")
    if value <= 0 and limits.low != 0:
        raise ConfigError(flag, value, "must be above 0")
    if limits.low is not None and value < limits.low:
        raise ConfigError(flag, value, f"must be at least {limits.low:g}")
    if value > limits.high:
        raise ConfigError(flag, value, f"must be at most {limits.high:,.15g}")


def check_flags(args: argparse.Namespace) -> None:
    """Check every flag once: numbers by their range, texts not empty."""
    for name, value in vars(args).items():
        flag = flag_of(name)
        if isinstance(value, str) and not value.strip():
            raise ConfigError(flag, "''", "must not be empty")
        if name in RANGES and value is not None:
            check_number(flag, value, RANGES[name])


def flag_of(name: str) -> str:
    """An option's name as the user types it."""
    return f"--{name.replace('_', '-')}"
