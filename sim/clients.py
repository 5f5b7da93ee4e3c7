"""What fine-tuning with adapters sends: rows and bytes of every client, from the trainer's plan.

Of a frozen base nothing crosses, so there is no layout, memory or step of accelerators to project.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fomoe_sim.options import OPTIONS, Ask
from fomoe_sim.trainer import ADAPTER_METHODS, ConfigError, hint, load_clients, plan_run
from fomoe_sim.units import duration, flag_of, read_up_down, scaled

DEFAULT_BANDWIDTH = "1Gbit"
_USED = ("config", "bandwidth", "method", "compare", "json", "csv")
Row = dict[str, Any]


def clients_of(
    path: str, *, methods: Sequence[str] = (), bandwidth: str = DEFAULT_BANDWIDTH
) -> list[Row]:
    """What every client of a run holds and sends.

    Args:
        path: a config with `adapters.base`.
        methods: of adapters, to compare; empty: the config's own.
        bandwidth: of a client's link, or up/down.

    Returns:
        Rows by method and client: `lora_rank`; `params`, elements of its adapters; payload and wire
        bytes, per round and of the whole run; and `link_s_per_round`, seconds for the wire bytes of
        a round, up and down at once. The bytes are those that the run counts: of its own rows.

    Raises:
        ConfigError: naming the option and the rule.
    """
    up, down = read_up_down(bandwidth, "--bandwidth")
    rows = []
    chosen: list[tuple[str, ...]] = [(f"method={method}",) for method in methods]
    for overrides in chosen or [()]:
        config = load_clients(path, overrides)
        plan = plan_run(config)
        for client, rank in enumerate(config.adapters.ranks):
            payload, wire = plan.payload_per_round(client), plan.wire_per_round(client)
            rows.append(
                {
                    "method": config.method,
                    "client": client,
                    "lora_rank": rank,
                    "params": plan.segment_plan.numel_at(client),
                    "payload_bytes_per_round": payload,
                    "wire_bytes_per_round": wire,
                    "payload_bytes": payload * config.rounds,
                    "wire_bytes": wire * config.rounds,
                    "link_s_per_round": 8 * wire / min(up, down),
                }
            )
    return rows


def answer_clients(args: argparse.Namespace, ask: Ask) -> None:
    """Print it, for the command line.

    Raises:
        ConfigError: for an option that would do nothing here, or a method without adapters.
    """
    _refuse_unused(args)
    assert ask.config is not None
    names = args.compare or args.method
    methods = [name.strip() for name in names.split(",")] if names else []
    for name in methods:
        if name not in ADAPTER_METHODS:
            flag = "--compare" if args.compare else "--method"
            rule = f"does not train adapters; {hint(name, ADAPTER_METHODS)}"
            raise ConfigError(flag, name, rule)
    rows = clients_of(ask.config, methods=methods, bandwidth=ask.bandwidth or DEFAULT_BANDWIDTH)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.csv:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        print(out.getvalue(), end="")
    else:
        print(_table(rows))
        print("payload and wire count a client's own rows, as the run does; what a server adds for")
        print("its method (the stack of flora) is not among them (docs/prelort.md)")


def _refuse_unused(args: argparse.Namespace) -> None:
    plain = {item.name: item.default for item in fields(Ask)}
    for name, value in vars(args).items():
        said = value is not False and value != plain.get(name)
        if name in OPTIONS and name not in _USED and said:
            rule = "has no meaning for a config with adapters, whose base crosses no link"
            raise ConfigError(flag_of(name), value, rule)


_COLUMNS = {
    "method": lambda row: row["method"],
    "client": lambda row: str(row["client"]),
    "rank": lambda row: str(row["lora_rank"]),
    "parameters": lambda row: f"{row['params']:,}",
    "payload/round": lambda row: scaled(row["payload_bytes_per_round"], "B"),
    "wire/round": lambda row: scaled(row["wire_bytes_per_round"], "B"),
    "payload in all": lambda row: scaled(row["payload_bytes"], "B"),
    "link/round": lambda row: duration(row["link_s_per_round"]),
}


def _table(rows: Sequence[Row]) -> str:
    lines = [list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
