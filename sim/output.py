"""How answers are shown: a table, JSON, CSV, and what every column means."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from fomoe.errors import ConfigError
from fomoe_sim.answer import Row
from fomoe_sim.hardware import ACCELERATORS
from fomoe_sim.scenario import SOURCES

# name -> (unit, meaning); the order of the CSV and of --explain.
COLUMNS: dict[str, tuple[str, str]] = {
    "model": ("", "preset or config"),
    "method": ("", "how sites exchange what they learn"),
    "num_sites": ("sites", "K"),
    "replication_factor": ("holders", "r, holders per expert: mean over experts"),
    "local_steps": ("steps", "H, inner steps per round"),
    "bits": ("bit", "per element on the wire"),
    "fragments": ("", "parts of the model synced at staggered steps"),
    "overlap_steps": ("steps", "that a sync may take beside compute"),
    "topology": ("", "how a mean travels: ring, star or tree"),
    "recompute": ("", "activations computed twice: none, experts, selective or full"),
    "bandwidth_bps": ("bit/s", "slowest site link, nominal"),
    "params_total": ("elements", "all parameters of the model"),
    "params_active": ("elements", "one token runs through, by the vendor's convention"),
    "params_per_site": ("elements", "stored at a site, mean over sites"),
    "executed_fraction": ("", "of top-k assignments that run; the others are skipped"),
    "payload_bytes_per_site_per_round": ("bytes", "reduced per round of H steps, mean over sites"),
    "wire_bytes_per_site_per_round": ("bytes", "sent per round, mean over sites"),
    "received_bytes_per_site_per_round": ("bytes", "received per round, mean over sites"),
    "ratio_vs_ddp": ("x", "payload of DDP in fp32 over this payload"),
    "ratio_vs_diloco": ("x", "payload of DiLoCo in fp32 over this payload"),
    "memory_bytes_per_site": ("bytes", "all memory of a site, hosts included, mean"),
    "memory_bytes_per_accelerator": ("bytes", "of the tightest accelerator"),
    "host_bytes_per_site": ("bytes", "host memory of the fullest site"),
    "fits": ("", "whether every site has that memory"),
    "memory_verdict": ("", "by how much, because of what"),
    "mfu": ("", "share of peak FLOP/s while a site computes"),
    "step_time_s": ("s", "compute of one step at the slowest site"),
    "sync_time_s": ("s", "one exchange: a round's or a fragment's sync, or a step's"),
    "exposed_s_per_round": ("s", "of a round in which sites wait for the link"),
    "round_time_s": ("s", "H steps and what is exposed"),
    "utilisation": ("", "share of time spent computing, mean over accelerators"),
    "tokens_per_s": ("1/s", "of all sites together"),
    "time_model": ("", "analytic: closed form; event: layers on one link"),
    "slowest_link": ("", "link and direction that take longest"),
    "tokens": ("tokens", "of the whole run"),
    "rounds": ("", "of the whole run"),
    "days": ("days", "of the whole run at the central utilisation of peak"),
    "days_low": ("days", "at the high end of utilisation of peak"),
    "days_high": ("days", "at the low end of utilisation of peak"),
    "cost_usd": ("USD", "central prices: accelerator-hours and half of the egress range"),
    "cost_usd_low": ("USD", "lowest prices, best utilisation of peak, no more than low egress"),
    "cost_usd_high": ("USD", "highest prices, worst utilisation of peak, full egress"),
    "egress_usd_high": ("USD", "of it for bytes sent, at the high price"),
    "idle_usd": ("USD", "of it for accelerators that wait"),
    "usd_per_1e6_tokens": ("USD", "central cost per million tokens"),
}
# In JSON only: lists over sites, and objects.
BY_SITE: dict[str, tuple[str, str]] = {
    "payload_bytes_per_site_per_round_by_site": ("bytes", "reduced per round, each site"),
    "wire_bytes_per_site_per_round_by_site": ("bytes", "sent per round, each site"),
    "received_bytes_per_site_per_round_by_site": ("bytes", "received per round, each site"),
    "params_per_site_by_site": ("elements", "stored, each site"),
    "memory_bytes_per_site_by_site": ("bytes", "all memory, each site"),
    "step_time_s_by_site": ("s", "compute of one step, each site"),
}
PARTS: dict[str, tuple[str, str]] = {
    "parameters": ("bytes", "of all experts and shared parameters that the site stores"),
    "gradients": ("bytes", "of what it trains"),
    "inner optimizer": ("bytes", "two Adam moments of what it trains"),
    "master weights": ("bytes", "fp32 copies of bf16 weights (--states mixed)"),
    "anchor": ("bytes", "parameters after the last outer step"),
    "outer momentum": ("bytes", "state of the outer optimizer"),
    "error feedback": ("bytes", "what low bits left out, below 16 bits"),
    "fragment buffer": ("bytes", "the copy that one fragment's reduction works on"),
    "codec buffers": ("bytes", "a fragment in low bits, sent and received"),
    "activations": ("bytes", "that a micro-batch keeps for the backward pass"),
    "MoE dispatch": ("bytes", "routing, rows copied to experts and their outputs"),
    "logits": ("bytes", "of a micro-batch, their fp32 copy and its gradient"),
    "gathered layers": ("bytes", "the layer in use and the next, whole on every accelerator"),
    "allocator slack": ("bytes", "10 % of what is allocated"),
}
RISK: dict[str, tuple[str, str]] = {
    "site_mtbf_hours": ("h", "between failures of the least reliable site"),
    "repair_hours": ("h", "until a failed site is back, before it fetches"),
    "quorum": ("sites", "that a round waits for"),
    "failures_per_run": ("", "of all sites"),
    "time_share_with_quorum": ("", "of the time in which enough sites are up"),
    "days_with_failures": ("days", "of the run if it only moves with a quorum"),
    "rejoin_bytes": ("bytes", "that a returning site fetches from the others, the largest"),
    "rejoin_time_s": ("s", "that takes, the longest; it counts as downtime"),
    "rejoin_bytes_per_run": ("bytes", "of all failures"),
    "coverage_loss_events": ("", "of the run in which an expert loses its last live holder"),
    "coverage_loss_probability": ("", "of at least one such event"),
    "coverage_pause_hours": ("h", "in which some expert has no live holder"),
    "coverage_cost_usd": ("USD", "of the accelerators that wait for it"),
    "round_time_p50_s": ("s", "median over sampled rounds (--step-variation, --slow-*)"),
    "round_time_p90_s": ("s", "90th percentile"),
    "round_time_p99_s": ("s", "99th percentile"),
}
NESTED = {
    **BY_SITE,
    **{f"memory_parts.{name}.bytes": text for name, text in PARTS.items()},
    "memory_parts.*.where": ("", "accelerator, host or disk; the parts are the tightest site's"),
    **{f"risk.{name}": text for name, text in RISK.items()},
}


def to_json(rows: list[Row], *, single: bool) -> str:
    """One object for one answer, a list for several."""
    answer = rows[0] if single else rows
    try:
        return json.dumps(answer, indent=2 if len(rows) < 100 else None, allow_nan=False)
    except ValueError:
        rule = "has a figure that is not finite: the options lie too far from any real run"
        raise ConfigError("--json", "", rule) from None


def to_csv(rows: list[Row]) -> str:
    """All columns that are single values, with a header."""
    names = [name for name in COLUMNS if name in rows[0]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[row[name] for name in names] for row in rows])
    return out.getvalue()


def explain() -> str:
    """Every column with its unit and meaning, and the source of every default."""
    wide = max(map(len, NESTED))
    lines = []
    for head, columns in (("Columns", COLUMNS), ("In JSON only", NESTED)):
        lines.append(f"{head} (unit): meaning")
        lines += [f"  {n:<{wide}}  ({unit or '-'}) {text}" for n, (unit, text) in columns.items()]
    return "\n".join([*lines, "", *sources_lines(), "", *accelerator_lines()])


def sources_lines(without: frozenset[str] = frozenset()) -> list[str]:
    """Our defaults; `without` names those that the question replaced."""
    shown = {name: text for name, text in SOURCES.items() if name not in without}
    return ["Defaults and their sources:", *(f"  {n}: {text}" for n, text in shown.items())]


def accelerator_lines() -> list[str]:
    """The accelerators by name, with their figures' source."""
    lines = ["Accelerators (USD per hour, GB, bf16 TFLOP/s):"]
    for device in ACCELERATORS.values():
        low, high = device.price_per_hour
        figures = f"{low:g}-{high:g}, {device.memory_bytes / 1e9:g}, {device.peak_flops / 1e12:g}"
        lines.append(f"  {device.name}: {figures}; {device.source}")
    return lines


def scaled(value: float, unit: str = "") -> str:
    """1.23 G style: three digits and a decimal prefix."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _short_row(row: Row) -> list[str]:
    ratio = row["ratio_vs_ddp"]
    return [
        row["method"],
        f"{row['num_sites']}",
        f"{row['replication_factor']:g}",
        f"{row['local_steps']}",
        f"{row['bits']:g}",
        scaled(row["bandwidth_bps"], "bit/s"),
        scaled(row["payload_bytes_per_site_per_round"], "B"),
        scaled(row["wire_bytes_per_site_per_round"], "B"),
        "-" if ratio is None else f"{ratio:.3g}",
        scaled(row["memory_bytes_per_site"], "B"),
        ("fits " if row["fits"] else "NO ") + scaled(row["memory_bytes_per_accelerator"], "B"),
        f"{row['step_time_s']:.3g}",
        f"{row['round_time_s']:.4g}",
        f"{100 * row['utilisation']:.1f}",
        f"{row['days']:.3g}",
        f"{scaled(row['cost_usd_low'])} - {scaled(row['cost_usd_high'])}",
    ]


HEADS = (
    "method",
    "K",
    "r",
    "H",
    "bits",
    "link",
    "payload/round",
    "sent/round",
    "vs DDP",
    "memory/site",
    "per accelerator",
    "step s",
    "round s",
    "util %",
    "days",
    "USD low - high",
)


def to_table(rows: list[Row], *, limit: int = 60) -> str:
    """A table for people; at most `limit` rows, and it says how many it leaves out."""
    body = [_short_row(row) for row in rows[:limit]]
    widths = [max(len(r[i]) for r in [list(HEADS), *body]) for i in range(len(HEADS))]

    def line(cells: Any) -> str:
        return "  ".join(str(c).ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()

    first = rows[0]
    title = (
        f"{first['model']}: {scaled(first['params_total'])} parameters, "
        f"{scaled(first['params_active'])} active; run of {scaled(first['tokens'])} tokens"
    )
    lines = [title, line(HEADS), *map(line, body)]
    if len(rows) > limit:
        lines.append(f"... {len(rows) - limit} more rows; use --csv or --json for all")
    return "\n".join(lines)


def risk_lines(rows: list[Row]) -> list[str]:
    """Memory verdict, slowest link, risk and money of each answer, in words."""
    lines = []
    for row in rows:
        risk = row["risk"]
        lines.append(
            f"{row['method']}: {row['memory_verdict']}; slowest link {row['slowest_link']}, "
            f"{row['exposed_s_per_round']:.4g} s of a round exposed ({row['time_model']}); "
            f"{risk['failures_per_run']:.3g} site failures per run, rejoin "
            f"{scaled(risk['rejoin_bytes'], 'B')} in {risk['rejoin_time_s']:.3g} s"
        )
        if "coverage_loss_probability" in risk:
            lines[-1] += (
                f"; an expert loses all holders with probability "
                f"{risk['coverage_loss_probability']:.2g} (costs {risk['coverage_cost_usd']:.3g} "
                "USD on average)"
            )
        percentiles = [f"p{n} {v:.4g} s" for n, v in _percentiles(risk)]
        if percentiles:
            lines[-1] += "; round time " + ", ".join(percentiles)
    return lines


def _percentiles(risk: dict[str, Any]) -> list[tuple[str, float]]:
    found = [name for name in risk if name.startswith("round_time_p")]
    return [(name.removeprefix("round_time_p").removesuffix("_s"), risk[name]) for name in found]
