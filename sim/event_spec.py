"""What the event model is told: layers with their bits, and when each of them is synced.

The sizes may come from a nominal parameter count (`equal_layers`) or from a real model's holders
and buckets (`layer_wire_bits`), so published tables and partially replicated experts run through
one model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isfinite

from fomoe.errors import ConfigError
from fomoe.segments import Plan, wire_elements
from fomoe.shapes import ParameterSpec

Sends = tuple[tuple[int, tuple[int, ...]], ...]  # (step of the round, layers synced after it)


@dataclass(frozen=True, kw_only=True)
class EventSpec:
    """What one site computes and sends in a round.

    Attributes:
        layer_bits: per layer, bits that the site sends to sync it once (ring factor included).
        step_time_s: compute time of one local step.
        local_steps: steps per round, H.
        sends: which layers are synced after which step of the round.
        overlap_steps: steps that a sync may take beside compute (tau); None: nothing overlaps and
            the next forward pass waits per layer.
        bits_factor: calibration of `layer_bits` against measured or published figures.
        sync_fixed_s: link time that every step with a sync costs beside its bits.
        compute_shares: per layer, its share of a step's compute; empty: equal shares.

    Raises:
        ConfigError: if a size, time or layer index makes no sense.
    """

    layer_bits: tuple[float, ...]
    step_time_s: float
    local_steps: int
    sends: Sends
    overlap_steps: int | None = None
    bits_factor: float = 1.0
    sync_fixed_s: float = 0.0
    compute_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("step_time_s", "local_steps", "bits_factor"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ConfigError(name, value, "must be above 0")
        if not self.layer_bits or not all(isfinite(b) and b >= 0 for b in self.layer_bits):
            raise ConfigError("layer_bits", self.layer_bits, "must be one size >= 0 per layer")
        if not (isfinite(self.sync_fixed_s) and self.sync_fixed_s >= 0):
            raise ConfigError("sync_fixed_s", self.sync_fixed_s, "must be at least 0")
        if self.overlap_steps is not None and self.overlap_steps < 0:
            raise ConfigError("overlap_steps", self.overlap_steps, "must be at least 0")
        self._check_shares()
        self._check_sends()

    def _check_shares(self) -> None:
        shares = self.compute_shares
        if shares and len(shares) != len(self.layer_bits):
            rule = f"must have one share for each of the {len(self.layer_bits)} layers"
            raise ConfigError("compute_shares", shares, rule)
        if shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
            raise ConfigError("compute_shares", shares, "must be at least 0 and sum to 1")

    def _check_sends(self) -> None:
        steps = [step for step, _ in self.sends]
        if len(set(steps)) != len(steps):
            raise ConfigError("sends", steps, "must name every step once")
        for step, layers in self.sends:
            if not 0 <= step < self.local_steps:
                rule = f"must lie in the round's {self.local_steps} local steps"
                raise ConfigError("sends step", step, rule)
            known = set(range(len(self.layer_bits)))
            if len(set(layers)) != len(layers) or not set(layers) <= known:
                rule = f"must be different layers of the {len(known)}"
                raise ConfigError("sends layers", layers, rule)

    @cached_property
    def round_bits(self) -> float:
        """Bits that the site really sends per round, calibration included."""
        layers = [layer for _, group in self.sends for layer in group]
        return self.bits_factor * sum(self.layer_bits[layer] for layer in layers)

    @property
    def compute_s(self) -> float:
        """Compute time of one round."""
        return self.step_time_s * self.local_steps


# --------------------------------------------------------------------------------------- schedules


def send_at_round_end(num_layers: int, local_steps: int) -> Sends:
    """All layers after the last step: DiLoCo, and data-parallel at local_steps = 1."""
    return ((local_steps - 1, tuple(range(num_layers))),)


def send_fragments(num_layers: int, local_steps: int, layers_per_fragment: int = 3) -> Sends:
    """Streaming DiLoCo's fragments by their size: P = ceil(L / layers_per_fragment)."""
    return strided_fragments(num_layers, local_steps, ceil(num_layers / layers_per_fragment))


def strided_fragments(num_layers: int, local_steps: int, num_fragments: int) -> Sends:
    """P fragments of strided layers, each synced once per round, evenly staggered.

    Fragment p has the layers p, p + P, p + 2P, ... and is sent after step floor(p H / P); fragments
    that fall on one step are sent together.
    """
    table: dict[int, list[int]] = {}
    for fragment in range(num_fragments):
        step = fragment * local_steps // num_fragments
        table.setdefault(step, []).extend(range(fragment, num_layers, num_fragments))
    return tuple((step, tuple(sorted(layers))) for step, layers in sorted(table.items()))


# -------------------------------------------------------------------------------------------- sizes


def equal_layers(
    params: float, num_layers: int, *, bits: float, num_sites: int
) -> tuple[float, ...]:
    """Bits per layer of a full replica cut into equal layers, ring factor 2 (1 - 1/M) included."""
    ring = 2 * (1 - 1 / num_sites)
    return (params * bits * ring / num_layers,) * num_layers


def layer_wire_bits(
    specs: Iterable[ParameterSpec], plan: Plan, site: int, *, bits: float = 32
) -> tuple[float, ...]:
    """Bits per layer that a site sends in one sync of a real model, from its holders.

    Every bucket costs what `fomoe.segments.sync_traffic` counts for it, spread over its segments by
    size. Parameters before the layers (embedding) count to the first layer, those after them (final
    norm, head) to the last. Parameters with one holder cost nothing.

    Args:
        specs: every parameter, in the model's order.
        plan: the segments of the same parameters.
        site: the site that sends.
        bits: per element on the wire.
    """
    specs = list(specs)
    num_layers = 1 + max((spec.layer for spec in specs if spec.layer is not None), default=0)
    layer_of: dict[str, int] = {}
    outside = 0
    for spec in specs:
        if spec.layer is not None:
            outside = num_layers - 1
        layer_of[spec.name] = outside if spec.layer is None else spec.layer
    sizes = [0.0] * num_layers
    for bucket in plan.buckets:
        num_holders = len(bucket.holders)
        if site not in bucket.holders or num_holders == 1:
            continue
        sent = wire_elements(bucket.numel, num_holders, bucket.holders.index(site))
        for segment in bucket.segments:
            sizes[layer_of[segment.parameter]] += bits * sent * segment.numel / bucket.numel
    return tuple(sizes)
