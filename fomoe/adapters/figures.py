"""The figures of a report of runs with adapters: groups of runs in, a drawing out (no torch)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fomoe.figures import Drawing
from fomoe.planning import plan_run
from fomoe.records import Group, RunRecords, site_speed
from fomoe.runfigures import Values, curve, memory, over_tokens, width_below

_WHAT = "fomoe report"
_LOSS = "Validation loss of the server's adapters, cut to a rank, on all clients' held-out part."
_ENERGY = (
    "Share of every rank dimension in the sum of |b|² |a|² over the server's layers, at the last "
    "evaluation: nesting and rotation put it into the first dimensions."
)
_TRAFFIC = "Payload of every client and round: its own rows."


def rank_figures(groups: list[Group]) -> Iterator[tuple[str, str, Drawing]]:
    """File name, explanation and drawing of every figure that the records allow."""
    if any(run.evaluations for group in groups for run in group.runs):
        yield from _losses(groups)
        yield "energy", _ENERGY, energy(groups)
    speed = over_tokens(
        groups,
        "Speed",
        "tokens/s of one client",
        lambda record: site_speed(record["tokens"], record["train_s"], record["sync_s"]),
        "client",
    )
    if speed is not None:
        yield "speed", "Tokens of a client over the time of its local steps and its sync.", speed
    yield "traffic", _TRAFFIC, traffic(groups)
    yield (
        "memory",
        "Bytes of state that a client holds, mean over clients; without the base.",
        memory(groups, "client"),
    )


def ranks_of(group: Group) -> list[int]:
    """The ranks at which a group's runs were evaluated."""
    records = [record for run in group.runs for record in run.evaluations.values()]
    return sorted({int(rank) for record in records for rank in record["val_loss_by_rank"]})


def loss_at(rank: int) -> Values:
    """The server's loss at a rank, per round of a run."""

    def values(run: RunRecords) -> list[float | None]:
        found = [run.evaluations.get(index) for index in range(len(run.rounds))]
        return [x["val_loss_by_rank"].get(str(rank)) if x else None for x in found]

    return values


def _losses(groups: list[Group]) -> Iterator[tuple[str, str, Drawing]]:
    """Of one group a figure with all ranks; of several a figure for every rank; and over bytes."""
    if len(groups) == 1:
        (group,) = groups
        ranks = ranks_of(group)
        drawing = Drawing(
            "Loss at every rank", what=_WHAT, names=[f"rank {rank}" for rank in ranks]
        )
        for rank in ranks:
            named = Group(f"rank {rank}", group.runs)
            curve(drawing, named, RunRecords.tokens, loss_at(rank), {"marker": "."})
        yield "loss-ranks", _LOSS, _finished(drawing, "tokens, all clients")
    else:
        for rank in sorted({rank for group in groups for rank in ranks_of(group)}):
            own = [group for group in groups if rank in ranks_of(group)]
            drawing = Drawing(f"Loss at rank {rank}", what=_WHAT, names=[g.name for g in groups])
            for group in own:
                curve(drawing, group, RunRecords.tokens, loss_at(rank), {"marker": "."})
            yield f"loss-rank-{rank}", _LOSS, _finished(drawing, "tokens, all clients")
    senders = [group for group in groups if group.first.sent()[-1] and ranks_of(group)]
    if senders:
        drawing = Drawing("Loss over bytes sent", what=_WHAT, names=[g.name for g in senders])
        for group in senders:
            most = max(ranks_of(group))
            curve(drawing, group, RunRecords.sent, loss_at(most), {"marker": "."})
        below = "bytes that a client has sent, mean over clients"
        yield "loss-bytes", f"{_LOSS} Here at each run's largest rank.", _finished(drawing, below)


def _finished(drawing: Drawing, below: str) -> Drawing:
    drawing.axes[0].set_xlim(left=0)
    drawing.quantity_axis("x")
    drawing.label(below, "nats per token")
    return drawing.finish()


def energy(groups: list[Group]) -> Drawing:
    """A line per group over the rank dimensions, mean over its runs."""
    evaluated = [group for group in groups if all(run.evaluations for run in group.runs)]
    drawing = Drawing("Energy", what=_WHAT, names=[group.name for group in evaluated])
    for group in evaluated:
        last = [run.evaluations[max(run.evaluations)]["energy"] for run in group.runs]
        shares = np.mean(last, axis=0)
        drawing.line(group.name, list(range(1, len(shares) + 1)), shares.tolist(), marker=".")
    drawing.axes[0].locator_params(axis="x", integer=True)
    drawing.axes[0].set_ylim(bottom=0)
    drawing.label("rank dimension", "share of the energy")
    return drawing.finish()


def traffic(groups: list[Group]) -> Drawing:
    """Points over the clients; planned, which a run's counters are checked against."""
    drawing = Drawing("Traffic", what=_WHAT, names=[group.name for group in groups])
    for index, group in enumerate(groups):
        plan = plan_run(group.first.config)
        clients = range(group.first.config.num_sites)
        payload = [plan.payload_per_round(client) for client in clients]
        width = width_below(len(groups) - 1 - index)
        drawing.line(group.name, list(clients), payload, marker="o", markersize=4, linewidth=width)
    drawing.axes[0].locator_params(axis="x", integer=True)
    drawing.axes[0].set_ylim(bottom=0)
    drawing.quantity_axis("y", "B")
    drawing.label("client", "payload per round")
    return drawing.finish()
