"""What a person sees: progress while training, and tables before and after it (no torch)."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fomoe.adapters.report import methods_table, ranks_table, server_rows
from fomoe.amounts import bytes_text, duration_text, mean_of, spread_text, times_text
from fomoe.config import Config
from fomoe.copies import num_sets
from fomoe.errors import say_line
from fomoe.formats import FORMATS, why_not
from fomoe.fragments import streams
from fomoe.planning import RunPlan, fragment_rows, memory_by_kind, planned_summary
from fomoe.records import site_speed
from fomoe.segments import full_payload, holder_bytes

_NARROWEST, _USUAL, _WIDE = 40, 80, 160  # columns
_ANSWERS = {"accuracy": "accuracy", "rouge_l": "ROUGE-L"}  # columns of an evaluation on pairs
_PLAIN_EVERY_S = 15.0  # longest silence where there is no terminal


class Progress:
    """A live bar on a terminal, plain lines elsewhere, nothing if `show` is false."""

    def __init__(self, config: Config, *, num_local_sites: int, show: bool) -> None:
        self.config, self.show = config, show
        self.console = console(stderr=True, quiet=not show)
        self.live = show and self.console.is_terminal and not self.console.is_dumb_terminal
        self.started = self._last_line = time.monotonic()
        self._steps_done = 0
        self._sums: dict[int, list[float]] = {}  # per site: tokens, train_s, sync_s
        # A process knows the figures of its own sites only.
        self._whose = "  site 0" if num_local_sites < config.num_sites else ""
        # Choices made for this machine, printed once, on the first round's line: a start that fails
        # prints its error and nothing else.
        self.notes: list[str] = []
        self._steps_total = config.rounds * config.local_steps * num_local_sites
        self._steps_to_do = self._steps_total
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=self.console, disable=not self.live, transient=True)
        self._task = self._bar.add_task("starting", total=self._steps_total)

    def __enter__(self) -> Progress:
        self._bar.start()
        self.started = self._last_line = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print one line at the site where it happens, even if nothing else is shown there."""
        if self.show:
            self.say(text)
        else:
            say_line(text)

    def resumed(self, round_idx: int) -> None:
        self.say(f"resuming after round {round_idx}")
        done = self._steps_total * round_idx // self.config.rounds
        self._steps_to_do = self._steps_total - done
        self._bar.update(self._task, completed=done)

    def step_callback(self, site: int, round_idx: int) -> Callable[[Any], None]:
        """What a site calls after each step; it reads the step's values only to print them."""
        config = self.config

        def on_step(values: Any) -> None:
            self._steps_done += 1
            if self._steps_done % config.run.log_every or not self.show:
                return
            now = time.monotonic()
            silent = now - self._last_line > _PLAIN_EVERY_S
            if not self.live and not silent:
                return
            row = values.tolist()
            text = (
                f"round {round_idx + 1}/{config.rounds} site {site} loss {row[0]:.3f} "
                f"skipped {row[4]:.2f} {self._speed()}"
            )
            if self.live:
                done = self._steps_total - self._steps_to_do + self._steps_done
                self._bar.update(self._task, completed=done, description=text)
            else:
                self.say(text)
                self._last_line = now

        return on_step

    def round_done(self, round_idx: int, records: list[dict[str, Any]]) -> None:
        """One line per round."""
        steps = [r for r in records if r["kind"] == "step"]
        rounds = [r for r in records if r["kind"] == "round"]
        merged = [r["val_loss_merged"] for r in records if r["kind"] == "merged"]
        for record in rounds:
            sums = self._sums.setdefault(record["site"], [0.0, 0.0, 0.0])
            for index, name in enumerate(("tokens", "train_s", "sync_s")):
                sums[index] += record[name]
        local = [r["val_loss_local"] for r in rounds if r["val_loss_local"] is not None]
        self.say(
            f"round {round_idx + 1}/{self.config.rounds}{self._whose}"
            f"  train loss {mean_of([r['loss'] for r in steps]):.3f}"
            + (f"  local val {mean_of(local):.3f}" if local else "")
            + (f"  merged val {merged[0]:.3f}" if merged else "")
            + f"  skipped {mean_of([r['skipped_fraction'] for r in rounds]):.3f}"
            f"  executed {mean_of([r['executed_fraction'] for r in rounds]):.3f}"
            f"  sync {rounds[0]['sync_s']:.2f} s, {bytes_text(rounds[0]['payload_bytes'])}"
            f"  {self._speed()}" + "".join(f"  {note}" for note in self.notes)
        )
        self.notes.clear()
        self._last_line = time.monotonic()

    def _speed(self) -> str:
        """Speed of a site in the rounds that are done, as in the summary, and time left."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        done = min(self._steps_done / max(self._steps_to_do, 1), 1.0)
        left = elapsed / done * (1 - done) if done else 0.0
        speed = mean_of([site_speed(*sums) for sums in self._sums.values()])
        known = f"{speed:,.0f} tokens/s per site, " if self._sums else ""
        return f"{known}{duration_text(left)} left"


# ----------------------------------------------------------------------------------------- tables


def print_dry_run(run: RunPlan) -> None:
    """The resolved config, who holds what, parameters, memory and bytes."""
    out = console(wide=True)
    out.print(run.config.to_yaml(), markup=False)
    fine_tunes = run.config.adapters.base is not None
    out.print(ranks_table(run.config.adapters) if fine_tunes else _holders_table(run))
    out.print(_sites_table(run))
    summary = planned_summary(run)
    if fine_tunes:
        out.print(f"adapters at the largest rank {summary['params_total']:,} parameters")
    else:
        out.print(
            f"whole model {summary['params_total']:,} parameters; "
            f"{summary['replication_factor']:g} of {summary['num_sites']} sites hold an expert "
            f"on average"
        )
    if run.ranks:
        kept = bytes_text(summary["memory_bytes_per_rank"])
        alike = len(set(run.num_ranks)) == 1
        counts = run.num_ranks[0] if alike else ", ".join(map(str, run.num_ranks))
        how = f"{counts} ranks per site ({run.config.inner.parallel})"
        out.print(f"{how}; a rank keeps {kept} of state")
    out.print(_traffic_table(run))
    if streams(run.config):
        out.print(_fragments_table(run))


def _traffic_table(run: RunPlan) -> Table:
    """Bytes per site and round of this run, and of DiLoCo and DDP for the same model."""
    config, numel = run.config, run.segment_plan.numel
    sites = range(config.num_sites)
    own = (
        sum(run.payload_per_round(site) for site in sites) / len(sites),
        sum(run.wire_per_round(site) for site in sites) / len(sites),
    )
    whole = (
        full_payload(numel, config.num_sites),
        sum(holder_bytes(numel, config.num_sites, site)[1] for site in sites) / len(sites),
    )
    rows = {
        f"this run ({config.method})": own,
        **_phase_rows(run),
        "DiLoCo": whole,
        "DDP": tuple(config.local_steps * count for count in whole),
    }
    columns = ("", "payload", "wire", "payload ratio", "wire ratio")
    table = Table(*columns, title="Bytes per site and round, against the same model elsewhere")
    for name, counts in rows.items():
        ratios = (times_text(n / o if o else None) for n, o in zip(counts, own, strict=True))
        table.add_row(name, *(bytes_text(count) for count in counts), *ratios)
    return table


def _fragments_table(run: RunPlan) -> Table:
    """What is synced at which step of a round, and how much of a site's link that takes."""
    rows = fragment_rows(run)
    title = "Syncs of a round: bytes per site; the run's last sync has all fragments"
    table = Table("fragment", "layers", "after steps", "payload", "wire", title=title)
    for fragment, row in enumerate(rows):
        table.add_row(
            str(fragment),
            ranges_text(tuple(row["layers"])),
            "-".join(map(str, dict.fromkeys((row["begins_after_step"], row["ends_after_step"])))),
            bytes_text(row["payload_bytes_per_site"]),
            bytes_text(row["wire_bytes_per_site"]),
        )
    wire = [row["wire_bytes_per_site"] for row in rows]
    largest = f"{bytes_text(max(wire))} at once, {bytes_text(sum(wire) / run.config.local_steps)}"
    table.caption = f"wire: at most {largest} per local step on average"
    return table


def _phase_rows(run: RunPlan) -> dict[str, tuple[float, float]]:
    """Payload and wire of each phase of a run with copies, means over sites."""
    return {
        f"  {phase.rounds} rounds, copies coupled by {phase.coupling:g}": (
            sum(traffic.payload for traffic in phase.traffic) / len(phase.traffic),
            sum(traffic.wire for traffic in phase.traffic) / len(phase.traffic),
        )
        for phase in (run.phases if run.families else ())
    }


def _holders_table(run: RunPlan) -> Table:
    table = Table("MoE layer", *(f"site {s}" for s in range(run.config.num_sites)))
    table.title = "Resident experts"
    residents = [run.placement.residents(site) for site in range(run.config.num_sites)]
    for layer in run.placement.moe_layers:
        table.add_row(str(layer), *(ranges_text(held[layer]) for held in residents))
    return table


def _sites_table(run: RunPlan) -> Table:
    """One column per site; memory is state, without activations."""
    sites = range(run.config.num_sites)
    kinds = memory_by_kind(run)
    summary = planned_summary(run)
    rows: dict[str, list[str]] = {}
    if run.config.inner.batch_size_by_site:
        rows["tokens per step"] = [f"{count:,}" for count in run.config.tokens_per_step]
    for name in ("shared", "expert"):
        counts = summary[f"params_{name}_per_site_by_site"]
        rows[f"{name} parameters"] = [f"{count:,}" for count in counts]
    rows["all parameters"] = [f"{n:,}" for n in summary["params_per_site_by_site"]]
    for kind in kinds[0]:
        rows[f"memory: {kind.replace('_', ' ')}"] = [bytes_text(m[kind]) for m in kinds]
    rows["memory: all state"] = [bytes_text(run.memory[site].total) for site in sites]
    rows["payload per round"] = [bytes_text(run.payload_per_round(site)) for site in sites]
    rows["wire per round"] = [bytes_text(run.wire_per_round(site)) for site in sites]
    table = Table("", *(f"site {site}" for site in sites), title="What a site holds and sends")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def print_summary(summary: dict[str, Any], config: Config) -> None:
    """The table that ends a run, and the paths of its files."""
    out = console()
    table = Table("", "value", title=f"{summary['method']}: {summary['num_sites']} sites")
    local = [loss for loss in summary["val_loss_local"] if loss is not None]
    rows = {
        "merged validation loss (nats per token)": f"{summary['val_loss_merged']:.4f}",
        "unigram entropy of the same text": f"{summary['unigram_entropy']:.4f}",
        "local validation loss, mean over sites": f"{mean_of(local):.4f}" if local else "-",
        "holders per expert": f"{summary['replication_factor']:g} of {summary['num_sites']}",
        "assignments skipped / executed": f"{summary['skipped_fraction']:.3f} / "
        f"{summary['executed_fraction']:.3f}",
        "parameters per site / whole model": f"{summary['params_per_site']:,.0f} / "
        f"{summary['params_total']:,}",
        "payload per site and round": bytes_text(summary["payload_bytes_per_site_per_round"]),
        "less than DiLoCo / DDP": f"{times_text(summary['ratio_vs_diloco'])} / "
        f"{times_text(summary['ratio_vs_ddp'])}",
        "tokens, all sites": f"{summary['tokens']:,}",
        "tokens/s per site": f"{summary['tokens_per_s']:,.0f}",
        "peak memory of a process": bytes_text(summary["peak_memory_bytes"]),
    }
    if config.adapters.base is not None:
        for name in ("merged validation loss (nats per token)", "holders per expert"):
            del rows[name]
        del rows["assignments skipped / executed"]
        rows = server_rows(summary) | rows
    if summary["peak_accelerator_memory_bytes"]:
        rows["peak memory of its accelerator"] = bytes_text(
            summary["peak_accelerator_memory_bytes"]
        )
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    folder = summary["run_dir"]
    out.print(f"records   {folder}/metrics.jsonl   (fields: docs/metrics.md)", markup=False)
    out.print(f"summary   {folder}/summary.json", markup=False)
    for number, line in enumerate(next_commands(config, folder)):
        out.print(f"{'next' if number == 0 else '':8}  {line}", markup=False)


def next_commands(config: Config, run_dir: str) -> list[str]:
    """Commands on a run that is done, as a shell takes them; only those that its model allows."""
    run, name = shlex.quote(run_dir), shlex.quote(Path(run_dir).resolve().name)
    if config.adapters.base is not None:
        first = [f"fomoe export {run} --adapter --out models/{name}"]
    elif num_sets(config) > 1 or all(why_not(config, form) for form in FORMATS):
        first = [f"fomoe merge {run}"]
    else:
        first = [
            f"fomoe generate {run} --prompt 'The '",
            f"fomoe export {run} --out models/{name}",
        ]
    return [*first, f"fomoe report {run} --out report.html"]


def print_comparison(summaries: list[dict[str, Any]]) -> None:
    """One row per method: means over its seeds, with the standard deviation of several."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        by_method.setdefault(summary["method"], []).append(summary)
    seeds = max(len(runs) for runs in by_method.values())
    over = f", mean and deviation of {seeds} seeds" if seeds > 1 else ""
    if "val_loss_by_rank" in summaries[0]:
        console(wide=True).print(methods_table(by_method, over))
        return
    columns = [
        "method",
        "merged val",
        "local val",
        "executed",
        "skipped",
        "expert FLOPs",
        "tokens/s",
        "payload/round",
        "vs DDP",
        "vs DiLoCo",
        "memory/site",
    ]
    equal = len({tokens for summary in summaries for tokens in summary["tokens_by_site"]}) == 1
    title = f"Equal tokens per site, same text{over}" if equal else f"Same text{over}"
    table = Table(*columns, title=title)
    for method, runs in by_method.items():
        first = runs[0]
        local = [[loss for loss in run["val_loss_local"] if loss is not None] for run in runs]
        table.add_row(
            method,
            spread_text([run["val_loss_merged"] for run in runs], ".4f"),
            spread_text([mean_of(losses) for losses in local], ".4f") if all(local) else "-",
            spread_text([run["executed_fraction"] for run in runs], ".3f"),
            spread_text([run["skipped_fraction"] for run in runs], ".3f"),
            f"{mean_of([run['expert_flops_fraction'] for run in runs]):.2f}",
            f"{mean_of([run['tokens_per_s'] for run in runs]):,.0f}",
            bytes_text(first["payload_bytes_per_site_per_round"]),
            times_text(first["ratio_vs_ddp"]),
            times_text(first["ratio_vs_diloco"]),
            bytes_text(first["memory_bytes_per_site"]),
        )
    console(wide=True).print(table)


def print_evaluation(result: dict[str, Any]) -> None:
    """The losses of a saved round: of the merged model, then of every site's own."""
    title = f"round {result['round']} on {result['text']}, {result['tokens']:,} tokens"
    ranks = result.get("ranks", {})
    more = [name for name in _ANSWERS if any(name in own for own in ranks.values())]
    heads = ("", "loss (nats/token)", "perplexity", "bits per byte")
    table = Table(*heads, *(_ANSWERS[name] for name in more), title=title)
    if "ranks" in result:
        named = {f"server at rank {rank}": own for rank, own in result["ranks"].items()}
        clients = enumerate(result["clients"])
        named |= {f"client {client}, own part": own for client, own in clients if own}
    else:
        named = {"merged": result["merged"]}
        named |= {f"site {site}": own for site, own in enumerate(result["sites"])}
    for name, own in named.items():
        bits = own.get("bits_per_byte")
        table.add_row(
            name,
            f"{own['loss']:.4f}",
            f"{own['perplexity']:.3f}",
            "-" if bits is None else f"{bits:.4f}",
            *("-" if own[name] is None else f"{own[name]:.3f}" for name in more),
        )
    console().print(table)


def console(*, wide: bool = False, **options: Any) -> Console:
    """A console as wide as its terminal, or of the usual width if that is too narrow.

    Args:
        wide: without a terminal, wide enough that no cell of a large table is cut.
    """
    made = Console(soft_wrap=True, highlight=False, **options)
    least = _WIDE if wide and not sys.stdout.isatty() else _NARROWEST
    if made.width < least:
        made.width = max(least, _USUAL)
    return made


def ranges_text(numbers: tuple[int, ...]) -> str:
    """0,1,2,5 as 0-2,5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts) or "none"
