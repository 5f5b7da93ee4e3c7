"""Tables of a study of adapters: the loss at every rank, and every arm at its best grid point.

A study whose runs train adapters has no experts and no merged model; its page has these tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fomoe.amounts import bytes_text
from fomoe.study.plan import Arm, Study

Line = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """An arm at one point of the grid, and its lines by seed."""

    arm: Arm
    lines: dict[int, Line]

    def at(self, rank: str) -> dict[int, float]:
        """The server's loss at a rank by seed; empty where the arm trains at other ranks."""
        found = {seed: line["val_loss_by_rank"] for seed, line in self.lines.items()}
        return {seed: losses[rank] for seed, losses in found.items() if rank in losses}

    def own(self) -> list[float]:
        """Mean over the clients of the loss on their own held-out part, by seed."""
        known = [
            [x for x in line["val_loss_by_client"] if x is not None] for line in self.lines.values()
        ]
        return [fmean(losses) for losses in known if losses]

    def score(self, seeds: Iterable[int]) -> float:
        """Mean over these seeds, and over the ranks that the arm has: what chooses a point."""
        return fmean(fmean(self.lines[seed]["val_loss_by_rank"].values()) for seed in seeds)

    @property
    def passes(self) -> float:
        """Forward and backward passes of a micro-batch, over all rounds and steps of a client."""
        line = next(iter(self.lines.values()))
        config = line["config"]
        return line["passes_per_step"] * config["local_steps"] * config["rounds"]


def ranks_tables(study: Study, tried: Sequence[Tried]) -> list[str]:
    """The Markdown of a study or of one of its regimes: tables and what they mean."""
    done = [one for one in tried if one.lines]
    if not done:
        return ["No run is done yet."]
    losses = [line["val_loss_by_rank"] for one in done for line in one.lines.values()]
    ranks = sorted({rank for own in losses for rank in own}, key=int)
    has_grid = any(one.arm.name != one.arm.family for one in tried)
    best = _best(done) if has_grid else done
    family = next(arm.family for arm in study.arms if arm.name == arm.control)
    control = next((one for one in best if one.arm.family == family), None)
    parts = [_losses(best, ranks, control, whole=False)]
    if control is not None:
        parts.append(_leads(best, ranks, control))
    if has_grid:
        parts += ["All points:", _losses(done, ranks, None, whole=True)]
    parts.append(_legend(has_grid))
    return parts


def _best(done: Sequence[Tried]) -> list[Tried]:
    """Of every family the point of the lowest mean loss, on the seeds that all its points have."""
    families: dict[str, list[Tried]] = {}
    for one in done:
        families.setdefault(one.arm.family, []).append(one)
    found = []
    for points in families.values():
        shared = set.intersection(*(set(one.lines) for one in points))
        found.append(min(points, key=lambda one: one.score(shared or set(one.lines))))
    return found


# ------------------------------------------------------------------------------------------ tables


def _losses(
    rows: Sequence[Tried], ranks: Sequence[str], control: Tried | None, *, whole: bool
) -> str:
    head = ["arm", "seeds", *(f"rank {rank}" for rank in ranks), "own part"]
    if not whole:
        head += ["passes", "payload per round", "note"]
    table = []
    for one in rows:
        name = f"**{one.arm.name}**" if one is control else one.arm.name
        cells = [name, str(len(one.lines))]
        cells += [_mean(list(one.at(rank).values())) for rank in ranks]
        cells.append(_mean(one.own()))
        if not whole:
            line = next(iter(one.lines.values()))
            payload = line["payload_bytes_per_site_per_round"]
            cells += [f"{one.passes:.0f}", bytes_text(payload), one.arm.note.replace("|", "\\|")]
        table.append(cells)
    return _markdown(head, table)


def _leads(rows: Sequence[Tried], ranks: Sequence[str], control: Tried) -> str:
    """The control's loss minus an arm's at every rank, on the seeds that both have."""
    table = []
    for one in rows:
        if one is control:
            continue
        cells = [one.arm.name]
        for rank in ranks:
            theirs, own = control.at(rank), one.at(rank)
            both = [theirs[seed] - own[seed] for seed in own if seed in theirs]
            cells.append(_mean(both, "+"))
        table.append(cells)
    return _markdown([f"lead over {control.arm.name}", *(f"rank {r}" for r in ranks)], table)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _mean(values: list[float], sign: str = "") -> str:
    """Mean and sample standard deviation; one value has no spread."""
    if not values:
        return "-"
    mean = format(fmean(values), f"{sign}.3f")
    return f"{mean} ± {stdev(values):.3f}" if len(values) > 1 else mean


def _legend(has_grid: bool) -> str:
    text = (
        "Losses are nats per token of held-out text, of the server's adapters cut to each rank: "
        "the mean over seeds ± the standard deviation. *Own part*: every client at its rank on its "
        "own held-out text, mean over clients. The lead is paired by seed; positive: the arm is "
        "better. Passes are those of one client over the run, forward and backward, mean over "
        "clients."
    )
    chosen = (
        " An arm stands at its best point of the grid: the lowest mean over the ranks, on the "
        "seeds that all its points have."
    )
    return text + chosen * has_grid
