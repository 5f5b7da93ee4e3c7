"""Commands of the cost model; `fomoe` registers them beside its own.

Only the command that runs imports its code, so that `fomoe --help` stays fast: a subparser fills
itself in when its first argument is parsed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fomoe.errors import FomoeError

COMMANDS = {
    "project": "project traffic, memory, time and money of a run, before it is bought",
    "plan": "search settings for given sites and constraints, and say what binds",
    "validate": "recompute the published tables and compare cell by cell",
    "calibrate": "fit step time, link and fixed cost from real runs",
}


class _One:
    """Stands for argparse's subparsers while a command's own module registers itself."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        self.parser.description = options.get("description") or options.get("help")
        return self.parser


def _lazy(usual: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """A parser class like `usual` whose flags come from a module when it first parses."""

    class LazyParser(usual):  # type: ignore[misc, valid-type]
        module: str | None = None

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            if self.module is not None:
                module, self.module = self.module, None
                import_module(module).add_command(_One(self))
            return super().parse_known_args(args, namespace)

    return LazyParser


def add_commands(subparsers: Any) -> None:
    """Register project, plan, validate and calibrate; each sets `run`, called with the arguments.

    Args:
        subparsers: what `ArgumentParser.add_subparsers()` returned.
    """
    usual = subparsers._parser_class
    subparsers._parser_class = _lazy(usual)
    try:
        for name, text in COMMANDS.items():
            parser = subparsers.add_parser(name, help=text, description=text)
            parser.module = f"fomoe_sim.{name}"
    finally:
        subparsers._parser_class = usual


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fomoe_sim`: exit code 0, 1 for a refused question, 2 for a wrong flag."""
    parser = argparse.ArgumentParser(prog="fomoe_sim", description=__doc__.splitlines()[0])
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except FomoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
