"""Commands of the cost model; `fomoe` registers them beside its own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = {
    "project": "project traffic, memory, time and money of a run, before it is bought",
    "plan": "search settings for given sites and constraints, and say what binds",
    "validate": "published and measured figures beside ours, with bounds that can fail",
    "calibrate": "fit step time, link and fixed cost from real runs",
}


def add_commands(subparsers: Any, chosen: str | None) -> None:
    """Register project, plan, validate and calibrate; each sets `run`, called with the arguments.

    Args:
        subparsers: what `ArgumentParser.add_subparsers()` returned.
        chosen: the command that will run; only its code is imported, so that `fomoe --help` and
            `fomoe train` stay fast.
    """
    for name, text in COMMANDS.items():
        parser = subparsers.add_parser(name, help=text)
        if name == chosen:
            command = import_module(f"fomoe_sim.{name}")
            command.add_arguments(parser)
            parser.set_defaults(run=command.run)
