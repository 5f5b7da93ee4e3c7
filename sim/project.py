"""`fomoe project`: what would this run cost, does it fit, and how long does it take?"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from fomoe_sim.clients import answer_clients
from fomoe_sim.evaluate import Columns, Row, answer_one, evaluate
from fomoe_sim.methods import METHODS, method_of, unused
from fomoe_sim.options import (
    AXES,
    GRID,
    OPTIONS,
    Ask,
    add_flags,
    check_ask,
    check_methods,
    read_flags,
)
from fomoe_sim.plot import check_path, draw, draw_tornado
from fomoe_sim.question import Question, baseline, build, check_fragments, has_experts, own_method
from fomoe_sim.show import days, explain, to_csv, to_json, to_table, words
from fomoe_sim.sites import Grid, grid
from fomoe_sim.solve import days_within, least, tornado, utilisation_of
from fomoe_sim.trainer import ConfigError, fine_tunes, hint, say_line
from fomoe_sim.units import check_number, flag_of, read_rate

LIMIT = 1_000_000  # of a sweep


SAID = ("method", "compare", "sweep", "solve", "utilisation", "tornado")
SHOWN = ("wide", "json", "csv", "plot", "explain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the question, of what is asked about it, and of how it is shown."""
    add_flags(parser, [*SAID, *SHOWN])


def run(args: argparse.Namespace) -> int:
    """Answer, print, and draw; 1 if a cluster file's sites can hold none of the answers."""
    if args.explain:
        if args.json or args.csv:
            raise ConfigError("--explain", "", "is text; leave out --json and --csv")
        print(explain())
        return 0
    ask: Ask = read_flags(args)
    check_ask(ask)
    if ask.config is not None and fine_tunes(ask.config):
        answer_clients(args, ask)
        return 0
    _check_output(args, ask)
    methods = methods_asked(args, ask)
    axes = read_axes(args.sweep) if args.sweep else {}
    check_methods(ask, methods, experts=has_experts(ask), axes=tuple(axes))
    if args.tornado:
        return _tornado(args, ask, methods[0])
    refused: list[str] = []
    if args.sweep:
        columns, refused = sweep(ask, methods, axes, first=bool(args.compare))
        rows = columns.rows()
        values = columns.values
    else:
        rows = [answer_one(question) for question in _questions(args, ask, methods)]
        values = {name: [row[name] for row in rows] for name in rows[0]}
    _print(args, rows, values, single=len(rows) == 1)
    if args.plot:
        draw(args.plot, rows)
    for reason in refused:
        say_line(f"left out: {reason}")
    asked = [row for row in rows if row["method"] in methods]
    if args.cluster and not any(row["fits"] for row in asked):
        verdict = asked[0]["memory_verdict"]
        say_line(f"fomoe: --cluster {args.cluster}: {verdict}")
        return 1
    return 0


def _tornado(args: argparse.Namespace, ask: Ask, method: str) -> int:
    """What moves the days of one question most, each assumption alone."""
    found = tornado(build(ask, method))
    print(f"days of {method}, one assumption changed at a time, widest first:")
    wide = max(len(name) for name, *_ in found)
    for name, low, high in found:
        print(f"  {name:<{wide}}  {days(low):>10} to {days(high):<10}")
    if args.plot:
        draw_tornado(args.plot, found)
    return 0


def project(ask: Ask, *, method: str | None = None) -> Row:
    """Answer one question: what a run costs in bytes, memory, time and money.

    Args:
        ask: the model or config, and whatever differs from the defaults.
        method: by default the config's own, else FoMoE.

    Returns:
        Values by column; `fomoe project --explain` says what each means, and its unit.

    Raises:
        ConfigError: naming the option as the command line has it.
    """
    ask = read_flags(argparse.Namespace(**vars(ask)))
    check_ask(ask)
    name = method_of(method, config=ask.config is not None).name if method else own_method(ask)
    check_methods(ask, [name], experts=has_experts(ask))
    return answer_one(build(ask, name))


def methods_asked(args: argparse.Namespace, ask: Ask) -> list[str]:
    """Methods of --compare or --method; else the config's own, else FoMoE."""
    config = ask.config is not None
    if args.compare:
        names = [name.strip() for name in args.compare.split(",")]
        return [method_of(name, config=config, flag="--compare").name for name in names]
    if args.method is not None:
        return [method_of(args.method, config=config).name]
    return [own_method(ask)]


def _questions(args: argparse.Namespace, ask: Ask, methods: list[str]) -> list[Question]:
    """One question per method; a comparison begins with one site."""
    link = args.solve in ("bandwidth", "break_even")
    asked = [build(ask, method, other_link=link) for method in methods]
    if args.solve == "break_even":
        asked = [_break_even(question) for question in asked]
    elif args.solve:
        target = utilisation_of(args.utilisation)
        goal = f"--utilisation {args.utilisation}"
        asked = [least(question, args.solve, target, goal) for question in asked]
    text = not (args.json or args.csv or args.plot) and ask.config is None
    return [baseline(asked[0]), *asked] if args.compare or text else asked


def _break_even(question: Question) -> Question:
    one = evaluate([grid(baseline(question))]).values["days"][0]
    return least(question, "bandwidth", days_within(one), "--solve break_even")


def _check_output(args: argparse.Namespace, ask: Ask) -> None:
    if args.json and args.csv:
        raise ConfigError("--csv", "", "contradicts --json")
    solves = args.solve in ("bandwidth", "local_steps")
    if solves != (args.utilisation is not None):
        lonely = "--solve" if args.utilisation is None else "--utilisation"
        rule = "needs both --solve (bandwidth or local_steps) and --utilisation"
        raise ConfigError(lonely, args.solve or args.utilisation, rule)
    if args.utilisation is not None and not 0 < args.utilisation < 1:
        raise ConfigError("--utilisation", args.utilisation, "must lie between 0 and 1")
    if args.solve in ("bandwidth", "break_even") and ask.bandwidth:
        raise ConfigError("--bandwidth", ask.bandwidth, f"contradicts --solve {args.solve}")
    if args.solve == "local_steps" and ask.local_steps:
        raise ConfigError("--local-steps", ask.local_steps, "contradicts --solve local_steps")
    if args.method and args.compare:
        raise ConfigError("--method", args.method, "contradicts --compare, which lists methods")
    if args.sweep and args.solve:
        raise ConfigError("--sweep", args.sweep, "contradicts --solve")
    if args.tornado and (args.sweep or args.solve or args.compare or args.csv or args.json):
        raise ConfigError("--tornado", "", "asks about one question and prints a table of its own")
    if args.plot:
        check_path(args.plot)


def _print(
    args: argparse.Namespace, rows: list[Row], values: dict[str, list[Any]], *, single: bool
) -> None:
    if args.json:
        print(to_json(rows, single=single and not args.compare and not args.sweep))
    elif args.csv:
        print(to_csv(values), end="")
    else:
        print(to_table(rows, wide=args.wide))
        if not args.sweep:
            print("\n".join(["", *words(rows)]))
        print("units, meanings, and the source of every default: fomoe project --explain")


# ------------------------------------------------------------------------------------------ sweeps


def read_axes(texts: Iterable[str]) -> dict[str, list[float]]:
    """Axes of a sweep by name, from `name=values`: a list `1,2,4`, a doubling range `32..512`, or
    `1..100..1` with a step.

    Raises:
        ConfigError: if a name is no axis, or a value is no number of it.
    """
    axes: dict[str, list[float]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise ConfigError("--sweep", text, "must have the form name=1,2,4 or name=32..512")
        if name not in AXES:
            raise ConfigError("--sweep", name, f"is not an axis; {hint(name, AXES)}")
        if name in axes:
            raise ConfigError("--sweep", name, "stands twice")
        axes[name] = [value for part in values.split(",") for value in _values(name, part)]
    return axes


def _values(name: str, text: str) -> list[float]:
    """One number, or those of a range."""
    ends = text.split("..")
    if len(ends) > 3:
        raise ConfigError("--sweep", text, "must be a number, A..B or A..B..STEP")
    numbers = [_number(name, end) for end in ends]
    if len(numbers) == 1:
        return numbers
    first, last = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else None
    if last < first or first <= 0 or (step is not None and step <= 0):
        raise ConfigError(f"--sweep {name}", text, "must run upwards from above 0")
    values = [first]
    while (value := values[-1] * 2 if step is None else values[-1] + step) <= last * (1 + 1e-12):
        values.append(value)
        if len(values) > LIMIT:
            raise ConfigError(f"--sweep {name}", text, f"has more than {LIMIT} values")
    return values


def _number(name: str, text: str) -> float:
    if name == "bandwidth":
        return read_rate(text, "--sweep bandwidth")
    least_, most = OPTIONS[name][3]
    pattern = r"[0-9]{1,18}(\.[0-9]+)?|\.[0-9]+" if name == "bits" else r"[0-9]{1,18}"
    if not re.fullmatch(pattern, text.strip()):
        kind = "number" if name == "bits" else "whole number"
        raise ConfigError(f"--sweep {name}", text, f"must be a {kind}")
    check_number(f"--sweep {name}", float(text), least_, most)
    return float(text)


def sweep(
    ask: Ask, methods: list[str], axes: dict[str, list[float]], *, first: bool = False
) -> tuple[Columns, list[str]]:
    """Answers of the whole grid, and the reason for every part of it that makes no sense.

    Args:
        first: whether the same accelerators on one site come first.

    Raises:
        ConfigError: if an axis contradicts an option, or no part of the grid makes sense.
    """
    _check_axes(ask, axes)
    experts = has_experts(ask)
    grids: list[Grid] = []
    refused: list[str] = []
    for method in methods:
        # Along an axis that a method ignores its rows would only repeat.
        ignored = unused(METHODS[method], experts=experts)
        used = {name: values for name, values in axes.items() if name not in ignored}
        outer = {name: values for name, values in used.items() if name not in GRID}
        inner = {name: values for name, values in used.items() if name in GRID}
        for combination in product(*outer.values()):
            chosen: dict[str, Any] = dict(zip(outer, map(int, combination), strict=True))
            try:
                if "fragments" in inner and ask.config is None:
                    check_fragments(int(max(inner["fragments"])), build(ask, method).shape)
                question = build(replace(ask, **chosen), method, other_link="bandwidth" in inner)
            except ConfigError as error:
                refused.append(str(error))
                continue
            points = np.array(list(product(*inner.values())), float)
            columns = dict(zip(inner, points.T, strict=True)) if inner else {}
            grids.append(grid(question, **columns))
    if not grids:
        raise ConfigError("--sweep", "", f"leaves nothing: {refused[0]}")
    if first:
        grids.insert(0, grid(baseline(grids[0].question)))
    return evaluate(grids), list(dict.fromkeys(refused))


def _check_axes(ask: Ask, axes: dict[str, list[float]]) -> None:
    """An option that an axis replaces would do nothing."""
    size = 1
    for name, values in axes.items():
        size *= len(values)
        if getattr(ask, name) is not None:
            raise ConfigError(flag_of(name), getattr(ask, name), f"contradicts --sweep {name}")
    if size > LIMIT:
        raise ConfigError("--sweep", size, f"has more than {LIMIT} configurations")
