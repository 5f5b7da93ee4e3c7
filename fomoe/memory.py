"""Bytes of the state that a site keeps between steps, from the plan alone (no torch).

Activations and buffers are not included: they depend on the backend, and the simulator estimates
them. A test compares these figures with the bytes of the built objects.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fomoe.config import Config
from fomoe.copies import encoded_buckets
from fomoe.segments import Bucket, Plan, takes_outer_step, trains

FLOAT32 = 4

# What outer optimizers other than SGD keep per segment: vectors of its size (Adam-like: two), and
# scalars (a step count, and for some classes a few more).
_OUTER_VECTORS = {"Adagrad": 1, "RMSprop": 1, "ASGD": 1}
_OUTER_SCALARS = {"NAdam": 2, "ASGD": 3}
_VECTOR_OPTIONS = ("amsgrad", "centered", "momentum")  # each adds a vector where it is set


@dataclass(frozen=True, kw_only=True)
class SiteMemory:
    """State of one site, in bytes; all of it is fp32."""

    parameters: int
    gradients: int
    inner_optimizer: int
    anchor: int
    outer_optimizer: int
    residuals: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def sum_memory(parts: list[SiteMemory]) -> SiteMemory:
    """State of several ranks of a site together."""
    rows = [asdict(part) for part in parts]
    return SiteMemory(**{name: sum(row[name] for row in rows) for name in rows[0]})


def site_memory(
    config: Config,
    plan: Plan,
    site: int,
    families: tuple[Bucket, ...] = (),
    *,
    in_memory: Plan | None = None,
) -> SiteMemory:
    """State bytes of one site (or of one rank of it): only of the segments that it holds.

    Gradients and inner optimizer state exist for what the site trains, anchor and outer state for
    what the outer optimizer steps, residuals for what a codec encodes.

    Args:
        families: the plan's buckets of experts' copies (`fomoe.copies`).
        in_memory: what parameters, gradients and inner state exist for; None: for the plan's own
            segments.
    """
    own = [b for b in (in_memory or plan).buckets if site in b.holders]
    numel = sum(bucket.numel for bucket in own)
    trained = sum(bucket.numel for bucket in own if trains(bucket, site))
    tensors = len({s.parameter for b in own if trains(b, site) for s in b.segments})
    held = [bucket for bucket in plan.buckets if site in bucket.holders]
    stepped = [bucket for bucket in held if takes_outer_step(config, bucket)]
    return SiteMemory(
        parameters=FLOAT32 * numel,
        gradients=FLOAT32 * trained,
        inner_optimizer=_inner_bytes(config, trained, tensors),
        anchor=FLOAT32 * sum(bucket.numel for bucket in stepped),
        outer_optimizer=_outer_bytes(config, stepped),
        residuals=FLOAT32
        * sum(
            bucket.numel
            for bucket in encoded_buckets(config, plan.buckets, families)
            if site in bucket.holders
        ),
    )


def _inner_bytes(config: Config, numel: int, num_tensors: int) -> int:
    if config.inner.optimizer == "adamw":
        return FLOAT32 * (2 * numel + num_tensors)  # two moments, and a step count per tensor
    return FLOAT32 * numel if config.inner.momentum else 0


def _outer_bytes(config: Config, stepped: list[Bucket]) -> int:
    name, arguments = config.outer.optimizer, config.outer.arguments
    vectors = 0 if name == "SGD" else _OUTER_VECTORS.get(name, 2)
    vectors += sum(bool(arguments.get(option)) for option in _VECTOR_OPTIONS)
    scalars = 0 if name == "SGD" else _OUTER_SCALARS.get(name, 1)
    return FLOAT32 * sum(
        vectors * bucket.numel + scalars * len(bucket.segments) for bucket in stepped
    )
