"""What a user may say: every option with its unit and range; the command line is made from it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from fomoe_sim.cluster import price_kinds
from fomoe_sim.layout import NAMES
from fomoe_sim.methods import METHODS, unused
from fomoe_sim.time import RECOMPUTE
from fomoe_sim.trainer import ConfigError
from fomoe_sim.units import MOST_LOCAL_STEPS, MOST_SITES, check_number, flag_of, read_up_down


def option(words: str, group: str, **more: Any) -> Any:
    """A field of `Ask`: what --help says, its group, and low, high or choices."""
    return field(
        default=more.pop("default", None), metadata={"help": words, "group": group, **more}
    )


SITES, TRAINING, RISKS, MONEY = "model and sites", "training", "what may go wrong", "money"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a user may say of a question; None: the config's or our default."""

    model: str | None = option("model preset, or a YAML file of a shape", SITES)
    config: str | None = option("a YAML experiment of fomoe train instead", SITES)
    cluster: str | None = option("YAML description of the sites", SITES)
    sites: int | None = option("number of equal sites (default 4)", SITES, low=1, high=MOST_SITES)
    accelerator: str | None = option("of every site (default H100)", SITES)
    accelerators: int | None = option(
        "per site (default 64; 1 below 1e9 or with --config)", SITES, low=1, high=1e6
    )
    bandwidth: str | None = option("of every site: 1Gbit, or UP/DOWN (default 1Gbit)", SITES)
    rtt_ms: float | None = option("round trip between sites (default 40)", SITES, low=0, high=1e6)
    replication: int | None = option(
        "holders per expert, r (default 2)", TRAINING, low=1, high=MOST_SITES
    )
    capacity: str | None = option(
        "experts per layer that each site takes, 24,24,16, instead of --replication", TRAINING
    )
    local_steps: int | None = option(
        "steps per round, H (default 32)", TRAINING, low=1, high=MOST_LOCAL_STEPS
    )
    bits: float | None = option("per element on the wire, 0.11 too", TRAINING, low=1e-3, high=32)
    fragments: int | None = option("parts synced at staggered steps", TRAINING, low=1, high=1e6)
    overlap_steps: int | None = option(
        "steps a sync may take beside compute", TRAINING, low=0, high=100
    )
    tokens: float | None = option(
        "of the run (default 20 per active parameter)", TRAINING, low=1, high=1e18
    )
    batch_tokens: float | None = option(
        "per step over all sites (default 4 Mi)", TRAINING, low=1, high=1e12
    )
    split: str | None = option(
        "a site's share of the batch: by its speed (default), or equal",
        TRAINING,
        choices=("speed", "equal"),
    )
    seq_len: int | None = option("context in tokens", TRAINING, low=1, high=1e7)
    micro_batch: int | None = option(
        "sequences per accelerator at a time", TRAINING, low=1, high=1e6
    )
    parallel: str | None = option(
        "degrees inside a site, others are searched: tp=8,pp=4,ep=8,shard=16,zero=1,cp=2", TRAINING
    )
    states: str | None = option(
        "fp32 (default), or mixed: bf16 weights and fp32 masters",
        TRAINING,
        choices=("fp32", "mixed"),
    )
    adam: str | None = option(
        "bits of Adam's moments (default fp32)", TRAINING, choices=("fp32", "bf16", "8bit")
    )
    recompute: str | None = option(
        "activations computed twice (default: selective, or full where it does not fit)",
        TRAINING,
        choices=RECOMPUTE,
    )
    kernels: str | None = option(
        "between products (default fused; a config's are eager)",
        TRAINING,
        choices=("fused", "eager"),
    )
    outer_on: str | None = option(
        "where anchor and outer state live (default host)",
        TRAINING,
        choices=("host", "accelerator", "disk"),
    )
    mfu: float | None = option(
        "share of peak FLOP/s while computing, instead of predicting it", TRAINING, low=1e-6, high=1
    )
    step_time: float | None = option(
        "seconds of a full step, recomputation included", TRAINING, low=1e-9, high=1e7
    )
    calibration: str | None = option("file written by fomoe calibrate", TRAINING)
    quorum: int | None = option(
        "sites that a round waits for; all by default", RISKS, low=1, high=MOST_SITES
    )
    mtbf_hours: float | None = option("between failures of one site", RISKS, low=1e-6, high=1e9)
    repair_hours: float | None = option("until a failed site is back", RISKS, low=1e-6, high=1e9)
    checkpoint_minutes: float | None = option(
        "between checkpoints (default 15, at least a round)", RISKS, low=1e-3, high=1e6
    )
    price: float | None = option("USD per accelerator-hour", MONEY, low=0, high=1e6)
    price_kind: str | None = option(
        "on_demand (default), reserved or spot", MONEY, choices=tuple(price_kinds())
    )
    token_overhead: float | None = option(
        "factor on tokens for an equal loss, beside the scaling law's for K",
        MONEY,
        low=1,
        high=1000,
    )
    pue: float | None = option("of the data centre (default 1.2)", MONEY, low=1, high=10)
    carbon: float | None = option("kg of CO2 per kWh (default 0.414)", MONEY, low=0, high=10)


GRID = ("local_steps", "bits", "fragments", "overlap_steps", "bandwidth")  # arrays of one grid
AXES = ("replication", "sites", *GRID)


def add_flags(parser: argparse.ArgumentParser, owner: type = Ask, *, skip: tuple = ()) -> None:
    """One flag for every field of an options class."""
    groups: dict[str, Any] = {}
    kinds = {"int | None": int, "float | None": float, "str | None": str}
    for item in fields(owner):
        if item.name in skip:
            continue
        words = item.metadata["group"]
        group = groups.setdefault(words, parser.add_argument_group(words))
        more: dict[str, Any] = {"help": item.metadata["help"], "default": item.default}
        if item.type == "bool":
            more["action"] = "store_true"
        elif "choices" in item.metadata:
            more["choices"] = item.metadata["choices"]
        else:
            more["type"] = kinds[str(item.type)]
        group.add_argument(flag_of(item.name), **more)


def read_flags(args: argparse.Namespace, owner: Any = Ask) -> Any:
    """The options as `owner` has them, each within its range.

    Raises:
        ConfigError: naming the flag as it was typed.
    """
    values = {item.name: getattr(args, item.name) for item in fields(owner)}
    for item in fields(owner):
        value = values[item.name]
        if isinstance(value, str) and not value.strip():
            raise ConfigError(flag_of(item.name), "''", "must not be empty")
        if value is not None and "high" in item.metadata:
            limits = item.metadata["low"], item.metadata["high"]
            check_number(flag_of(item.name), value, *limits)
    return owner(**values)


def check_ask(ask: Ask) -> None:
    """Refuse options that contradict each other, once, before anything is computed."""
    if (ask.model is None) == (ask.config is None):
        given = "both" if ask.model else "neither"
        raise ConfigError("--model", given, "is given; name one of --model and --config")
    if ask.cluster:
        rule = "contradicts --cluster, which states it per site"
        _refuse(ask, ("accelerator", "accelerators", "price"), rule)
    if ask.step_time is not None:
        _refuse(ask, ("mfu",), "contradicts --step-time, which is measured and needs none")
    if ask.price is not None:
        _refuse(ask, ("price_kind",), "contradicts --price, which is what you pay")
    if ask.calibration:
        _refuse(ask, ("rtt_ms",), "contradicts --calibration, whose fixed cost contains it")
        rule = "contradicts --calibration, which has a step time"
        _refuse(ask, ("step_time",), rule)
        if ask.config:
            _refuse(ask, ("mfu", "accelerator", "accelerators"), f"{rule} of the fitted sites")
    if ask.capacity:
        rule = "contradicts --capacity, which places every expert"
        _refuse(ask, ("replication", "config"), rule)
        read_capacity(ask.capacity)
    if ask.bandwidth:
        read_up_down(ask.bandwidth, "--bandwidth")
    read_parallel(ask.parallel)


def _refuse(ask: Ask, names: tuple[str, ...], rule: str) -> None:
    for name in names:
        if getattr(ask, name) is not None:
            raise ConfigError(flag_of(name), getattr(ask, name), rule)


def read_capacity(text: str) -> tuple[int, ...]:
    """`24,24,16` as numbers, one for each site."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) < 10**9 for word in words):
        raise ConfigError("--capacity", text, "must be whole numbers, one for each site")
    return tuple(map(int, words))


def read_parallel(text: str | None) -> tuple[tuple[str, int], ...]:
    """`tp=8,pp=4` as pairs.

    Raises:
        ConfigError: for a name that is no degree or a value that is no whole number above 0.
    """
    pairs: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in NAMES or not equals:
            raise ConfigError("--parallel", part, f"must be one of {', '.join(NAMES)} = a number")
        if not value.isdigit() or not 1 <= int(value) <= 10**6 or name in pairs:
            raise ConfigError(f"--parallel {name}", value, "must be one whole number above 0")
        pairs[name] = int(value)
    if pairs.get("zero", 1) not in (1, 3):
        raise ConfigError("--parallel zero", pairs["zero"], "must be 1 or 3")
    return tuple(sorted(pairs.items()))


def check_methods(
    ask: Ask, methods: list[str], *, experts: bool, axes: tuple[str, ...] = ()
) -> None:
    """Refuse options that none of the methods asked about would use; axes: that a sweep varies."""
    for name in ("replication", "capacity", "fragments", "overlap_steps", "outer_on"):
        if name in axes:
            flag, value = "--sweep", name
        elif getattr(ask, name) is not None:
            flag, value = flag_of(name), getattr(ask, name)
        else:
            continue
        reasons = [unused(METHODS[method], experts=experts).get(name) for method in methods]
        if reasons and all(reasons):
            raise ConfigError(flag, value, f"has no meaning for {reasons[0]}")
