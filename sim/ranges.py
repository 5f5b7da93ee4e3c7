"""Which numbers the flags take: finite, and within limits beyond which nothing is a real question.

The limits keep every product of the formulas finite, so that no answer is infinite or not a number.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from fomoe.errors import ConfigError

MOST_SITES = 1024
MOST_LOCAL_STEPS = 1_000_000
MOST_USD = 1e6  # of one accelerator-hour or GB


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from 0 or above 0 up to a limit."""

    high: float
    zero: bool = False  # whether 0 itself is allowed


RANGES = {
    "sites": Range(high=MOST_SITES),
    "accelerators": Range(high=1e6),
    "price": Range(high=MOST_USD, zero=True),
    "rtt_ms": Range(high=1e6, zero=True),
    "replication": Range(high=MOST_SITES),
    "local_steps": Range(high=MOST_LOCAL_STEPS),
    "bits": Range(high=32),
    "fragments": Range(high=1e6),
    "overlap_steps": Range(high=1000, zero=True),
    "tokens": Range(high=1e18),
    "batch_tokens": Range(high=1e12),
    "seq_len": Range(high=1e7),
    "micro_batch": Range(high=1e6),
    "mfu": Range(high=1),
    "step_time": Range(high=1e7),
    "step_variation": Range(high=10, zero=True),
    "slow_probability": Range(high=1, zero=True),
    "slow_factor": Range(high=1e6),
    "quorum": Range(high=MOST_SITES),
    "mtbf_hours": Range(high=1e9),
    "repair_hours": Range(high=1e9),
    "budget": Range(high=1e15),
    "deadline_days": Range(high=1e9),
    "max_coverage_risk": Range(high=1),
    "min_executed": Range(high=1, zero=True),
    "max_local_steps": Range(high=MOST_LOCAL_STEPS),
}


def check_number(flag: str, value: float, limits: Range) -> None:
    """Refuse a number that is not finite or not within its limits.

    Raises:
        ConfigError: naming the flag as it was typed.
    """
    if value != value:
        raise ConfigError(flag, value, "must be a number")
    if value < 0 or (value == 0 and not limits.zero):
        rule = "must not be negative" if limits.zero else "must be above 0"
        raise ConfigError(flag, value, rule)
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
