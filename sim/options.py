"""What a user may say: `sim/data/options.yaml` makes the command line, and it is read back here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from fomoe_sim.methods import METHODS, unused
from fomoe_sim.trainer import ConfigError, read_data
from fomoe_sim.units import check_number, flag_of, read_up_down

# name -> (group, kind, words, least and most or choices)
OPTIONS: dict[str, tuple[str, str, str, list[Any]]] = {
    name: (group, kind, words, limits)
    for group, rows in read_data("options").items()
    for name, (kind, words, *limits) in rows.items()
}
MOST_SITES: int = OPTIONS["sites"][3][1]
MOST_LOCAL_STEPS: int = OPTIONS["local_steps"][3][1]
DEGREES = ("tp", "pp", "cp", "ep", "shard", "zero", "overlap")  # that --parallel may name
ALL = "all"  # --parallel shard=all: the states are sharded over all accelerators of each site
GRID = ("local_steps", "bits", "fragments", "overlap_steps", "bandwidth")  # arrays of one grid
AXES = ("replication", "sites", *GRID)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a user may say of a question, see `OPTIONS`; None: the config's or our default."""

    model: str | None = None
    config: str | None = None
    cluster: str | None = None
    sites: int | None = None
    accelerator: str | None = None
    accelerators: int | None = None
    bandwidth: str | None = None
    rtt_ms: float | None = None
    replication: int | None = None
    capacity: str | None = None
    local_steps: int | None = None
    bits: float | None = None
    fragments: int | None = None
    overlap_steps: int | None = None
    tokens: float | None = None
    batch_tokens: float | None = None
    split: str | None = None
    seq_len: int | None = None
    micro_batch: int | None = None
    parallel: str | None = None
    states: str = "fp32"
    precision: str | None = None
    adam: str = "fp32"
    recompute: str | None = None
    kernels: str | None = None
    outer_on: str | None = None
    mfu: float | None = None
    step_time: float | None = None
    calibration: str | None = None
    mtbf_hours: float | None = None
    repair_hours: float | None = None
    checkpoint_minutes: float | None = None
    price: float | None = None
    price_kind: str | None = None
    token_overhead: float = 1.0
    pue: float = 1.2
    carbon: float = 0.414


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] = (), owner: Any = Ask) -> None:
    """A flag for every field of an options class, with its default, and for the names beside."""
    groups: dict[str, Any] = {}
    defaults = {item.name: item.default for item in fields(owner)}
    for name in [*defaults, *names]:
        title, kind, words, limits = OPTIONS[name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        more: dict[str, Any] = {"type": {"int": int, "float": float}.get(kind, str)}
        if kind == "flag":
            more = {"action": "store_true"}
        elif kind == "list":
            more = {"nargs": "+"}
        elif len(limits) == 1:
            more = {"choices": limits[0]}
        groups[title].add_argument(flag_of(name), help=words, default=defaults.get(name), **more)


def read_flags(args: argparse.Namespace, owner: Any = Ask) -> Any:
    """The options as `owner` has them, each within its range.

    Raises:
        ConfigError: naming the flag as it was typed.
    """
    values = {item.name: getattr(args, item.name) for item in fields(owner)}
    for name, value in values.items():
        if isinstance(value, str) and not value.strip():
            raise ConfigError(flag_of(name), "''", "must not be empty")
        if value is not None and len(OPTIONS[name][3]) == 2:
            check_number(flag_of(name), value, *OPTIONS[name][3])
    return owner(**values)


CONTRADICTIONS = {  # what is given: what it leaves nothing to say about, and why
    "cluster": ("accelerator accelerators price", "--cluster, which states it per site"),
    "step_time": ("mfu", "--step-time, which is measured and needs none"),
    "price": ("price_kind", "--price, which is what you pay"),
    "capacity": ("replication config", "--capacity, which places every expert"),
}


def check_ask(ask: Ask) -> None:
    """Refuse options that contradict each other, once, before anything is computed."""
    if (ask.model is None) == (ask.config is None):
        given = "both" if ask.model else "neither"
        raise ConfigError("--model", given, "is given; name one of --model and --config")
    for given, (names, rule) in CONTRADICTIONS.items():
        if getattr(ask, given) is not None:
            _refuse(ask, names.split(), rule)
    if ask.calibration:
        _refuse(ask, ["rtt_ms"], "--calibration, whose fixed cost contains it")
        # A preset takes the link alone from a calibration.
        fitted = ["step_time", *(("mfu", "accelerator", "accelerators") if ask.config else ())]
        _refuse(ask, fitted, "--calibration, which has a step time of the fitted sites")
    if ask.config and ask.precision:
        raise ConfigError("--precision", ask.precision, "contradicts --config, which has its own")
    if ask.capacity:
        read_capacity(ask.capacity)
    if ask.bandwidth:
        read_up_down(ask.bandwidth, "--bandwidth")
    read_parallel(ask.parallel)


def _refuse(ask: Ask, names: list[str], rule: str) -> None:
    for name in names:
        if getattr(ask, name) is not None:
            raise ConfigError(flag_of(name), getattr(ask, name), f"contradicts {rule}")


def read_capacity(text: str) -> tuple[int, ...]:
    """`24,24,16` as numbers, one for each site."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) < 10**9 for word in words):
        raise ConfigError("--capacity", text, "must be whole numbers, one for each site")
    return tuple(map(int, words))


def read_parallel(text: str | None) -> tuple[tuple[str, int], ...]:
    """`tp=8,pp=4` as pairs; `shard=all`, over all accelerators of each site, is 0.

    Raises:
        ConfigError: for a name that is no degree or a value that is no whole number above 0.
    """
    pairs: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in DEGREES or not equals:
            raise ConfigError("--parallel", part, f"must be one of {', '.join(DEGREES)} = a number")
        if (name, value) == ("shard", ALL) and name not in pairs:
            pairs[name] = 0
            continue
        if not value.isdigit() or not 1 <= int(value) <= 10**6 or name in pairs:
            raise ConfigError(f"--parallel {name}", value, "must be one whole number above 0")
        pairs[name] = int(value)
    if pairs.get("zero", 1) not in (1, 3):
        raise ConfigError("--parallel zero", pairs["zero"], "must be 1 or 3")
    return tuple(sorted(pairs.items()))


def parallel_text(pairs: Iterable[tuple[str, int]]) -> str:
    """What `read_parallel` reads."""
    return ",".join(f"{name}={value if value or name != 'shard' else ALL}" for name, value in pairs)


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
