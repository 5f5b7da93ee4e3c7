"""How answers are shown: a narrow table, words, JSON, CSV, and what every column means."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from typing import Any

from fomoe_sim.cluster import accelerator_names, accelerator_preset
from fomoe_sim.evaluate import Row
from fomoe_sim.methods import BASELINE, METHODS, PUBLIC
from fomoe_sim.trainer import ConfigError, read_data
from fomoe_sim.units import duration, percent, scaled

WIDTH = 100

EXPLAIN = read_data("explain")
COLUMNS: dict[str, list[str]] = EXPLAIN["columns"]  # name -> unit, meaning


def to_json(rows: list[Row], *, single: bool) -> str:
    """One object for one answer, a list for several."""
    answer = rows[0] if single else rows
    try:
        return json.dumps(answer, indent=2 if len(rows) < 100 else None, allow_nan=False)
    except ValueError:
        rule = "has a figure that is not finite: the options lie too far from any real run"
        raise ConfigError("--json", "", rule) from None


def to_csv(values: dict[str, list[Any]]) -> str:
    """All columns, with a header."""
    names = [name for name in COLUMNS if name in values]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(values[name] for name in names), strict=True))
    return out.getvalue()


# ------------------------------------------------------------------------------------------ tables

NARROW = {
    "method": lambda row: row["method"],
    "K": lambda row: f"{row['num_sites']}",
    "r": lambda row: f"{row['replication_factor']:.3g}",
    "H": lambda row: f"{row['local_steps']}",
    "bits": lambda row: f"{row['bits']:g}",
    "link": lambda row: _link(row),
    "step": lambda row: duration(row["step_time_s"]),
    "util": lambda row: percent(row["utilisation"]),
    "days": lambda row: days(row["days"]),
    "USD": lambda row: scaled(row["cost_usd"]),
    "GB": lambda row: f"{row['memory_bytes_per_accelerator'] / 1e9:.1f}",
    "fits": lambda row: "yes" if row["fits"] else "NO",
    "binds": lambda row: row["binds"],
}
WIDE = NARROW | {
    "layout": lambda row: f"{row['layout']}, {row['recompute']}",
    "payload/round": lambda row: scaled(row["payload_bytes_per_site_per_round"], "B"),
    "sent/round": lambda row: scaled(row["wire_bytes_per_site_per_round"], "B"),
    "round": lambda row: duration(row["round_time_s"]),
    "executed": lambda row: percent(row["executed_fraction"]),
    "equal work": lambda row: days(row["days_at_equal_work"]),
    "equal loss": lambda row: days(row["days_at_equal_loss"]),
    "goodput": lambda row: percent(row["goodput"]),
    "expert lost": lambda row: percent(row["coverage_loss_probability"]),
    "USD low - high": lambda row: f"{scaled(row['cost_usd_low'])} - {scaled(row['cost_usd_high'])}",
    "MWh": lambda row: scaled(row["energy_mwh"]),
    "trains": lambda row: "today" if row["needs"] == "runs today" else "not yet",
}


def days(value: float) -> str:
    """Days with three digits; years and shares of a day as such."""
    return duration(86400 * value)


def _link(row: Row) -> str:
    alone = row["num_sites"] == 1 or row["method"] == BASELINE
    return "-" if alone else scaled(row["bandwidth_bps"], "bit/s")


def to_table(rows: list[Row], *, wide: bool = False, limit: int = 60) -> str:
    """A table for people; at most `limit` rows, and it says how many it leaves out."""
    columns = WIDE if wide else NARROW
    body = [[cell(row) for cell in columns.values()] for row in rows[:limit]]
    heads = list(columns)
    widths = [max(len(r[i]) for r in [heads, *body]) for i in range(len(heads))]

    def line(cells: list[str]) -> str:
        return "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()

    lines = [title(rows[-1]), line(heads), *map(line, body)]
    if len(rows) > limit:
        lines.append(f"... {len(rows) - limit} more rows; use --csv or --json for all")
    return "\n".join(lines)


def title(row: Row) -> str:
    """The model and the run in one line."""
    return (
        f"{row['model']}: {scaled(row['params_total'])} parameters, "
        f"{scaled(row['params_active'])} active; run of {scaled(row['tokens'])} tokens"
    )


def words(rows: list[Row]) -> list[str]:
    """Layout, memory, link, risk and money of each answer, in words of at most 100 columns."""
    lines: list[str] = []
    for row in rows:
        parts = [
            f"{row['memory_verdict']} ({row['layout']}, recompute {row['recompute']})",
            f"step at {percent(row['mfu'])} of peak ({days(row['days_low'])} to "
            f"{days(row['days_high'])} over its range)",
        ]
        if row["num_sites"] > 1:
            waits = duration(row["exposed_s_per_round"])
            parts.append(f"slowest link {row['slowest_link']}, {waits} of a round exposed")
        parts.append(
            f"{scaled(row['failures_per_run'])} failures, goodput {percent(row['goodput'])}"
        )
        if row["rejoin_bytes"]:
            size = scaled(row["rejoin_bytes"], "B")
            parts.append(f"a rejoin fetches {size} in {duration(row['rejoin_time_s'])}")
        if row["coverage_loss_probability"]:
            chance = percent(row["coverage_loss_probability"])
            parts.append(f"an expert loses its last live holder with probability {chance}")
        if row["executed_flops"] < 1:
            parts.append(
                f"executes {percent(row['executed_flops'])} of the FLOPs: "
                f"{days(row['days_at_equal_work'])} at equal work"
            )
        if row["token_overhead"] > 1:
            parts.append(
                f"{days(row['days_at_equal_loss'])} at data-parallel's loss "
                f"(x{row['token_overhead']:.2f} tokens)"
            )
        parts.append(f"USD {scaled(row['cost_usd_low'])} to {scaled(row['cost_usd_high'])}")
        parts.append(f"{scaled(row['energy_mwh'] * 1e6, 'Wh')}, {scaled(row['carbon_t'])} t CO2")
        if row["needs"] != "runs today":
            parts.append(f"fomoe train lacks {row['needs'].replace('; ', ', ')}")
        text = f"{row['method']}: " + "; ".join(parts)
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


# ----------------------------------------------------------------------------------------- explain


def explain() -> str:
    """Every column with its unit and meaning, and the source of every default."""
    parts = {f"memory_parts.{n}.bytes": ["bytes", text] for n, text in EXPLAIN["parts"].items()}
    nested = EXPLAIN["nested"] | parts
    wide = max(map(len, nested))
    lines = []
    for head, columns in (("Columns", COLUMNS), ("In JSON of one answer only", nested)):
        lines.append(f"{head} (unit): meaning")
        lines += [f"  {n:<{wide}}  ({unit or '-'}) {text}" for n, (unit, text) in columns.items()]
    lines += ["", "Defaults and their sources:"]
    lines += [f"  {name}: {text}" for name, text in EXPLAIN["sources"].items()]
    lines += ["", "Methods and their sources:"]
    lines += [f"  {name}: {METHODS[name].source}" for name in PUBLIC]
    lines += ["", "Prices of a contract, as a share of on-demand:"]
    for name, kind in read_data("accelerators")["kinds"].items():
        low, high = kind["share"]
        lines.append(f"  {name}: {low:g}-{high:g}; {kind['source']}")
    lines += [
        "",
        "Accelerators (USD per hour, GB, TFLOP/s bf16 and fp8, GB/s NVLink and NIC, W):",
    ]
    for name in accelerator_names():
        device = accelerator_preset(name)
        low, high = device.price_per_hour
        lines.append(
            f"  {name}: {low:g}-{high:g}, {device.memory_bytes / 1e9:.1f}, "
            f"{device.peak_flops / 1e12:g} and {device.peak_fp8_flops / 1e12:g}, "
            f"{device.nvlink / 1e9:g} and {device.nic / 1e9:g}, "
            f"{device.watts:g}; {device.source}"
        )
    wrapped = (textwrap.wrap(x, WIDTH, subsequent_indent="    ") if x else [""] for x in lines)
    return "\n".join(line for some in wrapped for line in some)
