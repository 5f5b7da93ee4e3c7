"""Sweeps: a grid of options, answered in analytic mode with arrays where arrays suffice."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from fomoe.errors import ConfigError
from fomoe.hints import hint
from fomoe_sim.answer import Row, answers
from fomoe_sim.flags import ignored_flags
from fomoe_sim.hardware import read_rate
from fomoe_sim.question import Point, build_scenario, has_experts
from fomoe_sim.ranges import RANGES, check_number, flag_of

AXES = (
    "replication",
    "local_steps",
    "bandwidth",
    "sites",
    "bits",
    "fragments",
    "overlap_steps",
)
LIMIT = 1_000_000


def read_axis(text: str) -> tuple[str, list[float]]:
    """One `name=values`: a list `1,2,4`, a doubling range `32..512`, or `1..100..1` with a step.

    Raises:
        ConfigError: if the name is no axis or a value is no number.
    """
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not values:
        raise ConfigError("--sweep", text, "must have the form name=1,2,4 or name=32..512")
    if name not in AXES:
        raise ConfigError("--sweep", name, f"is not an axis; {hint(name, AXES)}")
    found: list[float] = []
    for part in values.split(","):
        ends = part.split("..")
        if len(ends) > 3:
            raise ConfigError("--sweep", part, "must be a number, A..B or A..B..STEP")
        found += _range(name, part, [_number(name, end) for end in ends])
    return name, found


def _range(name: str, text: str, ends: list[float]) -> list[float]:
    if len(ends) == 1:
        return ends
    start, stop = ends[0], ends[1]
    step = ends[2] if len(ends) == 3 else None
    if stop < start or start <= 0 or (step is not None and step <= 0):
        raise ConfigError(f"--sweep {name}", text, "must run upwards from above 0")
    values, value = [], start
    while value <= stop * (1 + 1e-12):
        values.append(value)
        value = value * 2 if step is None else value + step
        if len(values) > LIMIT:
            raise ConfigError(f"--sweep {name}", text, f"has more than {LIMIT} values")
    return values


def _number(name: str, text: str) -> float:
    if name == "bandwidth":
        return read_rate(text, "--sweep bandwidth")
    if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise ConfigError(f"--sweep {name}", text, "must be a whole number")
    check_number(f"--sweep {name}", int(text), RANGES[name])
    return int(text)


def read_axes(texts: Iterable[str]) -> dict[str, list[float]]:
    """All axes of a sweep by name."""
    axes: dict[str, list[float]] = {}
    for text in texts:
        name, values = read_axis(text)
        if name in axes:
            raise ConfigError("--sweep", name, "stands twice")
        axes[name] = values
    return axes


def sweep(
    args: argparse.Namespace,
    methods: list[str],
    points: dict[str, Point],
    axes: dict[str, list[float]],
) -> tuple[list[Row], list[str]]:
    """Rows of the whole grid, and the reason for every part of it that makes no sense.

    Raises:
        ConfigError: if an axis contradicts a flag, or no part of the grid makes sense.
    """
    _check_axes(args, axes)
    outer = {n: v for n, v in axes.items() if n not in ("local_steps", "bandwidth")}
    steps, rates = axes.get("local_steps"), axes.get("bandwidth")
    experts = has_experts(args)
    rows: list[Row] = []
    refused: list[str] = []
    for method in methods:
        # Along an axis that a method ignores its rows would only repeat.
        ignored = ignored_flags(method, experts=experts)
        used = {name: values for name, values in outer.items() if name not in ignored}
        point = replace(points[method], other_link=rates is not None)
        for combination in product(*used.values()):
            chosen: dict[str, Any] = {n: int(v) for n, v in zip(used, combination, strict=True)}
            try:
                scenario = build_scenario(args, replace(point, **chosen))
            except ConfigError as error:
                refused.append(str(error))
                continue
            inner = list(product(steps or [scenario.local_steps], rates or [0.0]))
            bandwidth = [rate for _, rate in inner] if rates else None
            rows += answers(scenario, [step for step, _ in inner], bandwidth)
    if not rows:
        raise ConfigError("--sweep", "", f"leaves nothing: {refused[0]}")
    return rows, list(dict.fromkeys(refused))


def _check_axes(args: argparse.Namespace, axes: dict[str, list[float]]) -> None:
    """A flag that an axis replaces would do nothing."""
    size = 1
    for name, values in axes.items():
        size *= len(values)
        if getattr(args, name) is not None:
            raise ConfigError(flag_of(name), getattr(args, name), f"contradicts --sweep {name}")
    if size > LIMIT:
        raise ConfigError("--sweep", size, f"has more than {LIMIT} configurations")
