"""Rounds whose sites do not finish together: step-time spread, slow sites, quorum, shared uplinks.

A synchronous round lasts as long as its slowest site. With a quorum it lasts as long as the
slowest of the fastest `quorum` sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fomoe.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Distribution of step times.

    Attributes:
        mean_s: mean step time per site.
        variation: coefficient of variation of one step (gamma distributed; 0: constant). Steps are
            independent, so over H steps it shrinks by the root of H.
        slow_probability, slow_factor: in a round, a site is slower by the factor with this
            probability: what does not average out over the steps (a throttled or shared machine).
    """

    mean_s: tuple[float, ...]
    variation: float = 0.0
    slow_probability: float = 0.0
    slow_factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.mean_s or min(self.mean_s) <= 0:
            raise ConfigError("mean_s", self.mean_s, "must be one time above 0 per site")
        if self.variation < 0:
            raise ConfigError("variation", self.variation, "must be at least 0")
        if not 0 <= self.slow_probability <= 1:
            raise ConfigError("slow_probability", self.slow_probability, "must lie in [0, 1]")
        if self.slow_factor < 1:
            raise ConfigError("slow_factor", self.slow_factor, "must be at least 1")


def sample_compute_s(
    times: StepTimes, *, local_steps: int, num_rounds: int = 10_000, seed: int = 0
) -> Array:
    """Compute time of every site in every sampled round, seconds, shape [rounds, sites]."""
    random = np.random.default_rng(seed)
    shape = (num_rounds, len(times.mean_s))
    total = np.broadcast_to(local_steps * np.asarray(times.mean_s), shape)
    if times.variation > 0:
        # The sum of H gamma variables of one scale is gamma with H times the shape parameter.
        steps = local_steps / times.variation**2
        total = total * random.gamma(steps, 1 / steps, size=shape)
    slow = random.random(shape) < times.slow_probability
    return np.where(slow, total * times.slow_factor, total)


def round_time_percentiles(
    times: StepTimes,
    *,
    local_steps: int,
    sync_s: float,
    percentiles: Sequence[float] = (50, 90, 99),
    quorum: int | None = None,
    num_rounds: int = 10_000,
    seed: int = 0,
) -> Array:
    """Percentiles of the round time, seconds; equal seeds give equal figures.

    Args:
        times: step times of the sites.
        local_steps: steps per round, H.
        sync_s: time of the sync after the sites that are waited for are ready.
        percentiles: in percent.
        quorum: sites that are waited for; None: all.

    Raises:
        ConfigError: if the quorum is not between 1 and the number of sites.
    """
    num_sites = len(times.mean_s)
    waited = num_sites if quorum is None else quorum
    if not 1 <= waited <= num_sites:
        raise ConfigError("quorum", waited, f"must lie between 1 and the {num_sites} sites")
    compute = sample_compute_s(times, local_steps=local_steps, num_rounds=num_rounds, seed=seed)
    ready = np.sort(compute, axis=1)[:, waited - 1]
    return np.percentile(ready + sync_s, percentiles)


def shared_uplink_s(ready_s: ArrayLike, send_s: ArrayLike) -> Array:
    """End of each stream when several streams share one uplink, first come first served.

    Args:
        ready_s: when each stream wants to send, shape [streams].
        send_s: how long each takes alone on the uplink, shape [streams].

    Returns:
        When each stream is complete, shape [streams]; ties go to the earlier index.
    """
    ready = np.asarray(ready_s, dtype=np.float64)
    send = np.broadcast_to(np.asarray(send_s, dtype=np.float64), ready.shape)
    done = np.empty_like(ready)
    free = -np.inf
    for stream in np.argsort(ready, kind="stable"):
        free = max(free, ready[stream]) + send[stream]
        done[stream] = free
    return done
