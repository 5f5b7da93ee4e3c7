"""Tables of runs with adapters (no torch)."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fomoe.adapters.options import AdaptersConfig
from fomoe.adapters.shapes import rank_ranges
from fomoe.amounts import bytes_text, mean_of, spread_text


def ranks_table(adapters: AdaptersConfig) -> Table:
    """Who holds which rank dimensions."""
    table = Table("rank dimensions", "held and averaged by", title="Clients")
    for start, stop, holders in rank_ranges(adapters.ranks):
        table.add_row(f"{start} to {stop - 1}", ", ".join(map(str, holders)))
    return table


def server_rows(summary: dict[str, Any]) -> dict[str, str]:
    """Rows of a summary: the server's loss at every rank, and the clients' own."""
    rows = {
        f"server's validation loss at rank {rank}": f"{loss:.4f}"
        for rank, loss in summary["val_loss_by_rank"].items()
    }
    own = _clients_mean(summary)
    if own is not None:
        rows["clients at their ranks, on their own held-out parts"] = f"{own:.4f}"
    return rows


def methods_table(by_method: dict[str, list[dict[str, Any]]], over: str) -> Table:
    """One row per method; a method that trains at other ranks has no figure at some.

    Args:
        by_method: summaries, one per seed.
        over: words for the title that say how many seeds there are.
    """
    runs = [run for own in by_method.values() for run in own]
    ranks = sorted({int(rank) for run in runs for rank in run["val_loss_by_rank"]})
    table = Table(
        "method",
        *(f"rank {rank}" for rank in ranks),
        "clients, own part",
        "passes/step",
        "payload/round",
        title="Validation loss of the server's adapters; equal tokens per client" + over,
    )
    for method, seeds in by_method.items():
        own = [_clients_mean(run) for run in seeds]
        table.add_row(
            method,
            *(
                _over_seeds([run["val_loss_by_rank"].get(str(rank)) for run in seeds])
                for rank in ranks
            ),
            _over_seeds(own),
            f"{seeds[0]['passes_per_step']:.2f}",
            bytes_text(seeds[0]["payload_bytes_per_site_per_round"]),
        )
    return table


def result_rows(
    by_name: dict[str, list[dict[str, Any]]],
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a report's table: finished runs by name, one per seed.

    Args:
        by_name: summaries; none while a run of the name is not finished.
    """
    runs = [run for own in by_name.values() for run in own]
    ranks = sorted({int(rank) for run in runs for rank in run["val_loss_by_rank"]})
    head = ["run", *(f"loss at rank {rank}" for rank in ranks), "clients, own part"]
    head += ["passes/step", "tokens", "tokens/s", "payload/round", "peak memory"]
    rows = []
    for name, done in by_name.items():
        if not done:
            rows.append([name, "not finished", *[""] * (len(head) - 2)])
            continue
        at = [[run["val_loss_by_rank"].get(str(rank)) for run in done] for rank in ranks]
        rows.append(
            [
                name,
                *map(_over_seeds, at),
                _over_seeds([_clients_mean(run) for run in done]),
                f"{done[0]['passes_per_step']:.2f}",
                f"{done[0]['tokens']:,}",
                spread_text([run["tokens_per_s"] for run in done], ",.0f"),
                bytes_text(done[0]["payload_bytes_per_site_per_round"]),
                bytes_text(max(run["peak_memory_bytes"] for run in done)),
            ]
        )
    return head, rows


def _clients_mean(summary: dict[str, Any]) -> float | None:
    """Mean over the clients with a held-out part of their own; None if none has one."""
    own = [loss for loss in summary["val_loss_by_client"] if loss is not None]
    return mean_of(own) if own else None


def _over_seeds(losses: list[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    return spread_text(known, ".4f") if known else "-"
