"""Tables of runs with adapters (no torch)."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fomoe.adapters.nesting import passes_per_step
from fomoe.adapters.options import AdaptersConfig
from fomoe.adapters.shapes import rank_ranges


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
    own = [loss for loss in summary["val_loss_by_client"] if loss is not None]
    if own:
        mean = sum(own) / len(own)
        rows["clients at their ranks, on their own held-out parts"] = f"{mean:.4f}"
    return rows


def methods_table(summaries: list[dict[str, Any]], bytes_text: Any) -> Table:
    """One row per method; a method that trains at other ranks has no figure at some."""
    ranks = sorted({int(rank) for s in summaries for rank in s["val_loss_by_rank"]})
    table = Table(
        "method",
        *(f"rank {rank}" for rank in ranks),
        "clients, own part",
        "passes/step",
        "payload/round",
        title="Validation loss of the server's adapters; equal tokens per client",
    )
    for summary in summaries:
        own = [loss for loss in summary["val_loss_by_client"] if loss is not None]
        losses = [summary["val_loss_by_rank"].get(str(rank)) for rank in ranks]
        table.add_row(
            summary["method"],
            *("-" if loss is None else f"{loss:.4f}" for loss in losses),
            f"{sum(own) / len(own):.4f}" if own else "-",
            f"{summary['passes_per_step']:.2f}",
            bytes_text(summary["payload_bytes_per_site_per_round"]),
        )
    return table


def mean_passes(adapters: AdaptersConfig) -> float:
    """Forward and backward passes of a micro-batch, mean over the clients."""
    clients = range(len(adapters.ranks))
    return sum(passes_per_step(adapters, client) for client in clients) / len(clients)
