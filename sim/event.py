"""The event model: layers computing, one FIFO link sending, and who waits for whom.

A formula knows how many bytes a method sends; only an event model knows how many of them hide
behind compute. What is modelled, for one site of a synchronous group:

- A step of T seconds is a forward pass (T/3) over layers 0..L-1 and a backward pass (2T/3) over
  layers L-1..0.
- A sync of a layer is queued when its gradient is ready, and one link sends one transfer at a time
  in that order at the full bandwidth. The reduction itself costs nothing.
- Without overlap the next forward pass waits, layer by layer, until that layer's sync is complete.
  With an overlap of tau steps, what step s queues must be complete when step s + tau ends, and the
  whole site waits there.
- Utilisation is compute time over total time in the steady state: rounds before the measured one
  let the overlap of one round reach into the next.

The model is that of the bandwidth tables of Streaming DiLoCo (arXiv 2501.18512, table 4) and
Scaling Laws for DiLoCo (arXiv 2503.09799, table 6). `fomoe validate` compares with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fomoe.errors import ConfigError, FomoeError
from fomoe_sim.event_spec import EventSpec, send_at_round_end

Array = NDArray[np.float64]

# Bandwidths of the published tables, bit/s; neighbours differ by a factor of 1.207.
GRID_BPS: Array = np.logspace(-1, 3, 50) * 1e9


class ImpossibleResult(FomoeError, ValueError):
    """A result would need more bits than the link can carry in the time it claims."""


class UnreachableUtilisation(FomoeError, ValueError):
    """No bandwidth that was asked about reaches the utilisation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """One layer's sync on the link; times are arrays over the bandwidths asked about."""

    step: int
    layer: int
    bits: float
    ready_s: Array
    start_s: Array
    end_s: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """One round in the steady state, for every bandwidth asked about.

    Attributes:
        spec: what was simulated.
        bandwidth_bps: bandwidths, bit/s, shape [W].
        round_time_s: time of the round, shape [W].
        transfers: the round's transfers, in the order in which they were sent.
    """

    spec: EventSpec
    bandwidth_bps: Array
    round_time_s: Array
    transfers: tuple[Transfer, ...]

    @property
    def utilisation(self) -> Array:
        """Share of the time spent computing, shape [W]."""
        return self.spec.compute_s / self.round_time_s

    @property
    def exposed_s(self) -> Array:
        """Time of the round in which the site waits for the link, shape [W]."""
        return self.round_time_s - self.spec.compute_s


# -------------------------------------------------------------------------------------- simulation


def simulate(spec: EventSpec, bandwidth_bps: ArrayLike) -> Timeline:
    """Run rounds until the steady state and return the last one.

    Args:
        spec: what one site computes and sends.
        bandwidth_bps: one bandwidth or an array of them, bit/s of the site's uplink.

    Raises:
        ConfigError: if a bandwidth is not above 0.
        ImpossibleResult: never for a correct model; the check guards the model itself.
    """
    bandwidth = check_bandwidth(bandwidth_bps)
    run = _Run(spec, bandwidth)
    overlap_rounds = ceil(((spec.overlap_steps or 0) + 1) / spec.local_steps)
    for _ in range(2 + overlap_rounds):
        start = run.done_s
        run.transfers.clear()
        run.round()
    round_time = run.done_s - start
    sent = sum(transfer.bits for transfer in run.transfers)
    assert abs(sent - spec.round_bits) <= 1e-9 * spec.round_bits, "bits were lost in the queue"
    timeline = Timeline(
        spec=spec,
        bandwidth_bps=bandwidth,
        round_time_s=round_time,
        transfers=tuple(run.transfers),
    )
    check_conservation(
        bits=spec.round_bits,
        bandwidth_bps=bandwidth,
        utilisation=timeline.utilisation,
        local_steps=spec.local_steps,
        step_time_s=spec.step_time_s,
    )
    return timeline


class _Run:
    """State of a running simulation; every time is an array over bandwidths."""

    def __init__(self, spec: EventSpec, bandwidth: Array) -> None:
        num_layers = len(spec.layer_bits)
        shares = spec.compute_shares or (1 / num_layers,) * num_layers
        self.spec, self.bandwidth = spec, bandwidth
        # Compute time of all layers below each layer, as a share of a pass.
        self.below = [0.0, *(float(s) for s in np.cumsum(shares))]
        self.sends = {step: sorted(layers, reverse=True) for step, layers in spec.sends}
        self.step = 0
        self.now_s = np.zeros_like(bandwidth)  # the accelerator
        self.link_s = np.zeros_like(bandwidth)  # the link is free from here on
        self.waits: dict[int, Array] = {}  # layer -> end of its sync (no overlap)
        self.due: dict[int, Array] = {}  # step -> end of what must be complete before it
        self.transfers: list[Transfer] = []

    @property
    def done_s(self) -> Array:
        """When all compute and all transfers so far are over.

        Counted from here, a round holds exactly its own bits: its first transfer starts after the
        previous round's last step and last transfer.
        """
        return np.maximum(self.now_s, self.link_s)

    def round(self) -> None:
        start = self.step
        end = start + self.spec.local_steps
        while self.step < end:
            self.compute(self.next_event(start, end) - self.step)
            if self.step == end:
                return
            if self.step in self.due:
                self.now_s = np.maximum(self.now_s, self.due.pop(self.step))
            self.forward()
            self.backward(self.sends.get(self.step - start, []))
            self.step += 1

    def next_event(self, start: int, end: int) -> int:
        """The first step from here on that waits or sends, or the round's end."""
        if self.waits:
            return self.step
        sends = (start + step for step in self.sends if start + step >= self.step)
        return min([end, *sends, *self.due])

    def compute(self, steps: int) -> None:
        """Steps with nothing to wait for and nothing to send."""
        self.now_s = self.now_s + steps * self.spec.step_time_s
        self.step += steps

    def forward(self) -> None:
        forward_s, at = self.spec.step_time_s / 3, 0.0
        for layer in sorted(self.waits):
            self.now_s = self.now_s + forward_s * (self.below[layer] - at)
            self.now_s = np.maximum(self.now_s, self.waits[layer])
            at = self.below[layer]
        self.now_s = self.now_s + forward_s * (1 - at)
        self.waits.clear()

    def backward(self, layers: list[int]) -> None:
        backward_s, at = 2 * self.spec.step_time_s / 3, 1.0
        if layers and self.spec.sync_fixed_s:
            ready = self.now_s + backward_s * (1 - self.below[layers[0]])
            self.link_s = np.maximum(self.link_s, ready) + self.spec.sync_fixed_s
        for layer in layers:
            self.now_s = self.now_s + backward_s * (at - self.below[layer])
            at = self.below[layer]
            self.send(layer)
        self.now_s = self.now_s + backward_s * at
        if layers and self.spec.overlap_steps is not None:
            self.due[self.step + 1 + self.spec.overlap_steps] = self.link_s

    def send(self, layer: int) -> None:
        bits = self.spec.layer_bits[layer] * self.spec.bits_factor
        start = np.maximum(self.link_s, self.now_s)
        end = start + bits / self.bandwidth
        self.link_s = end
        transfer = Transfer(
            step=self.step, layer=layer, bits=bits, ready_s=self.now_s, start_s=start, end_s=end
        )
        self.transfers.append(transfer)
        if self.spec.overlap_steps is None:
            self.waits[layer] = end


def closed_form_round_time_s(spec: EventSpec, bandwidth_bps: ArrayLike) -> Array:
    """Round time without simulation, where there is no contention between syncs.

    For equal layers that are all sent after the round's last step, without overlap: the queue is
    fed every b = 2T/(3L) and serves one layer in c = bits/W, so the last layer is complete
    max(c, L c - (L - 1) b) after the backward pass. A test holds it equal to `simulate`.

    Raises:
        ConfigError: if the spec is of another kind, or a bandwidth is not above 0.
    """
    bandwidth = check_bandwidth(bandwidth_bps)
    num_layers = len(spec.layer_bits)
    plain = spec.overlap_steps is None and not spec.compute_shares and not spec.sync_fixed_s
    equal = max(spec.layer_bits) == min(spec.layer_bits)
    if not (plain and equal and spec.sends == send_at_round_end(num_layers, spec.local_steps)):
        rule = "has a closed form only for equal layers, all sent at the round's end, no overlap"
        raise ConfigError("spec", "", rule)
    serve = spec.layer_bits[0] * spec.bits_factor / bandwidth
    feed = 2 * spec.step_time_s / (3 * num_layers)
    return spec.compute_s + np.maximum(serve, num_layers * serve - (num_layers - 1) * feed)


# ------------------------------------------------------------------------------------------ checks


def check_bandwidth(bandwidth_bps: ArrayLike) -> Array:
    """Bandwidths as a flat array; zero, negative or infinite ones are the user's mistake."""
    bandwidth = np.atleast_1d(np.asarray(bandwidth_bps, dtype=np.float64))
    wrong = bandwidth[~(np.isfinite(bandwidth) & (bandwidth > 0))]
    if wrong.size:
        raise ConfigError("bandwidth", float(wrong[0]), "must be above 0 bit/s")
    return bandwidth


def check_conservation(
    *,
    bits: float,
    bandwidth_bps: ArrayLike,
    utilisation: ArrayLike,
    local_steps: int,
    step_time_s: float,
) -> None:
    """Refuse a result that claims more bits than its link can carry in its round.

    A utilisation u means a round of H T / u seconds, so `bandwidth >= u x bits / (H T)`.

    Args:
        bits: bits that the site really sends per round, ring and calibration factors included.
        bandwidth_bps, utilisation: of one result or of several (equal shapes).

    Raises:
        ImpossibleResult: naming the bandwidth, the utilisation and the least possible bandwidth.
    """
    bandwidth = check_bandwidth(bandwidth_bps)
    claimed = np.broadcast_to(np.asarray(utilisation, dtype=np.float64), bandwidth.shape)
    floor = claimed * bits / (local_steps * step_time_s)
    for got, least, share in zip(bandwidth, floor, claimed, strict=True):
        if got < least * (1 - 1e-9) or share > 1 + 1e-9:
            raise ImpossibleResult(
                f"utilisation {100 * share:.4g} % at {got / 1e9:.4g} Gbit/s is impossible: "
                f"{bits / 1e9:.4g} Gbit per round of {local_steps} steps of {step_time_s:.4g} s "
                f"need at least {least / 1e9:.4g} Gbit/s"
            )


def required_bandwidth(
    spec: EventSpec, utilisation: float | Iterable[float], *, grid_bps: Array = GRID_BPS
) -> Array:
    """The first bandwidth of a grid that reaches each utilisation, bit/s.

    Args:
        spec: what one site computes and sends.
        utilisation: one share in (0, 1] or several.
        grid_bps: ascending bandwidths; by default the published tables' grid.

    Raises:
        ConfigError: if a utilisation is outside (0, 1].
        UnreachableUtilisation: if the whole grid stays below a utilisation.
    """
    reached = simulate(spec, grid_bps).utilisation
    found = []
    for target in np.atleast_1d(np.asarray(utilisation, dtype=np.float64)):
        if not 0 < target <= 1:
            raise ConfigError("utilisation", float(target), "must lie in (0, 1]")
        bins = np.nonzero(reached >= target - 1e-12)[0]
        if not bins.size:
            raise UnreachableUtilisation(
                f"utilisation {100 * target:.4g} % is not reached: {grid_bps[-1] / 1e9:.4g} Gbit/s "
                f"gives {100 * reached[-1]:.4g} %"
            )
        found.append(grid_bps[bins[0]])
    return np.asarray(found)
