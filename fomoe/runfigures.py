"""The figures of a report, one function each: groups of runs in, a drawing out (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fomoe.amounts import bytes_text
from fomoe.copies import num_sets
from fomoe.figures import Drawing
from fomoe.planning import memory_by_kind, plan_run, planned_summary
from fomoe.records import Group, Record, RunRecords, site_speed

Values = Callable[[RunRecords], list[float | None]]
_WHAT = "fomoe report"
# A run that was evaluated once is a point of each: full for merged, hollow for local.
_SOLID = {"linestyle": "-", "marker": "o"}
_DASHED = {"linestyle": "--", "marker": "o", "markerfacecolor": "none"}


def figures(groups: list[Group]) -> Iterator[tuple[str, str, Drawing]]:
    """File name, explanation and drawing of every figure that the records allow."""
    yield "loss-tokens", _LOSS, losses(groups, "tokens", RunRecords.tokens, "tokens, all sites")
    senders = [group for group in groups if group.first.sent()[-1]]
    if senders:
        below = "model bytes that a site has sent"
        yield "loss-bytes", _LOSS, losses(senders, "bytes sent", RunRecords.sent, below)
    for name, title, unit, value, text in _CURVES:
        drawn = over_tokens(groups, title, unit, value)
        if drawn is not None:
            yield name, text, drawn
    for index, group in enumerate(groups):
        if group.first.config.model.moe_layers:
            text = _LOAD + (_OWN_SET if num_sets(group.first.config) > 1 else "")
            yield f"load-{index}", text, load(group)
    yield "traffic", _TRAFFIC, traffic(groups)
    yield "memory", _MEMORY, memory(groups)


_LOSS = (
    "Validation loss on the held-out part. Merged: all experts together. Local: each site's own "
    "model, mean over sites."
)
_LOAD = "Share of the router's choices that an expert gets, times the number of experts: 1 is even."
_OWN_SET = " Of every site's own set of copies, mean over sites."
_TRAFFIC = "Payload per site and round, by class, beside DiLoCo and DDP for the same model."
_MEMORY = "Bytes of state that a site holds, mean over sites; activations are not in it."


def _layers(name: str) -> Callable[[Record], float | None]:
    """A value of the router, mean over MoE layers."""

    def mean(record: Record) -> float | None:
        values = [layer[name] for layer in record["layers"]]
        return sum(values) / len(values) if values else None

    return mean


_CURVES: tuple[tuple[str, str, str, Callable[[Record], float | None], str], ...] = (
    (
        "speed",
        "Speed",
        "tokens/s of one site",
        lambda r: site_speed(r["tokens"], r["train_s"], r["sync_s"]),
        "Tokens of a site over the time of its local steps and its sync.",
    ),
    (
        "skipped",
        "Skipped",
        "share of assignments",
        lambda r: r["skipped_fraction"],
        "Assignments whose original choice is not resident.",
    ),
    (
        "executed",
        "Executed",
        "share of assignments",
        lambda r: r["executed_fraction"],
        "Assignments that ran, over those of full top-k.",
    ),
    (
        "agreement",
        "Top-k agreement",
        "share of choices",
        lambda r: r["probe_agreement"],
        "Share of each probe token's choices that were among its choices one evaluation before.",
    ),
    (
        "max-vio",
        "Imbalance (MaxVio)",
        "largest load / mean - 1",
        _layers("max_vio"),
        "Largest load of an expert over the mean, minus one; mean over MoE layers and sites.",
    ),
    (
        "entropy",
        "Router entropy",
        "nats",
        _layers("entropy"),
        "Mean over MoE layers and sites.",
    ),
    (
        "dead",
        "Dead experts",
        "share of experts",
        _layers("dead_expert_fraction"),
        "Experts that no token chose in a round; mean over MoE layers and sites.",
    ),
)


# ------------------------------------------------------------------------------------------ curves


def losses(
    groups: list[Group], over: str, x_of: Callable[[RunRecords], list[float]], x_name: str
) -> Drawing:
    """Merged and local loss; each group has a colour."""
    drawing = Drawing(
        f"Loss over {over}",
        what=_WHAT,
        names=[group.name for group in groups],
        extra=[("merged", _SOLID), ("local", _DASHED)],
    )
    for group in groups:
        curve(drawing, group, x_of, _local_losses, _DASHED)
        curve(drawing, group, x_of, RunRecords.merged_losses, _SOLID)
    ends = [x_of(group.first)[-1] for group in groups]
    smallest = min((end for end in ends if end), default=0)
    if smallest and max(ends) > 5 * smallest:
        drawing.log_axis("x", bytes_text)
    else:
        drawing.axes[0].set_xlim(left=0)
    drawing.quantity_axis("x")
    drawing.label(x_name, "nats per token")
    return drawing.finish()


def _local_losses(run: RunRecords) -> list[float | None]:
    return run.mean(lambda record: record["val_loss_local"])


def over_tokens(
    groups: list[Group],
    title: str,
    unit: str,
    value: Callable[[Record], float | None],
    member: str = "site",
) -> Drawing | None:
    """A value of the sites' records over tokens; None where no run has any."""

    def values(run: RunRecords) -> list[float | None]:
        return run.mean(value)

    if all(x is None for group in groups for run in group.runs for x in values(run)):
        return None
    drawing = Drawing(title, what=_WHAT, names=[group.name for group in groups])
    for index, group in enumerate(groups):
        style = {"marker": ".", "linewidth": width_below(len(groups) - 1 - index)}
        curve(drawing, group, RunRecords.tokens, values, style)
    drawing.axes[0].set_xlim(left=0)
    drawing.axes[0].set_ylim(0, 1.08 * drawing.axes[0].get_ylim()[1])
    drawing.quantity_axis("x")
    drawing.label(f"tokens, all {member}s", unit)
    return drawing.finish()


def width_below(lines: int) -> float:
    """Points. A line below others that are equal to it is wider than they are, and so is seen."""
    return 1.6 + 1.3 * min(lines, 4)


def curve(
    drawing: Drawing,
    group: Group,
    x_of: Callable[[RunRecords], list[float]],
    values: Values,
    style: dict[str, Any],
) -> None:
    """The mean over a group's runs, with their range; rounds that all of them have done."""
    done = min(len(run.rounds) for run in group.runs)
    xs = np.mean([x_of(run)[:done] for run in group.runs], axis=0)
    ys = np.array([values(run)[:done] for run in group.runs], float)
    there = ~np.isnan(ys).any(axis=0)
    xs, ys = xs[there], ys[:, there]
    if not len(xs):
        return
    if len(xs) == 1:  # no line leads to it
        style = {**style, "marker": "o", "markersize": 6.0}
    drawing.line(group.name, xs, ys.mean(axis=0), **style)
    if len(ys) > 1:
        drawing.band(group.name, xs, ys.min(axis=0), ys.max(axis=0))


# ------------------------------------------------------------------------------------- other kinds


def load(group: Group) -> Drawing:
    """Experts of all layers from top to bottom, rounds from left to right; of one run."""
    run = group.first
    name = group.name + (f", seed {run.config.seed}" if len(group.runs) > 1 else "")
    layers = run.config.model.moe_layers
    # A site's own set of copies has only some of the experts.
    experts = len(run.rounds[0][0]["layers"][0]["load"])
    columns = []
    for records in run.rounds:
        by_site = [[layer["load"] for layer in record["layers"]] for record in records]
        columns.append(np.mean(by_site, axis=0).reshape(-1) * experts)
    values = np.array(columns).T
    height = min(max(2.6, 0.09 * len(values)), 6.0)
    drawing = Drawing(f"Load: {name}", what=_WHAT, size=(4.6, height))
    axes = drawing.axes[0]
    with drawing.style_context():
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(0.5, len(columns) + 0.5, len(values), 0),
        )
        axes.grid(False)
        step = -(-len(layers) // 12)
        shown = list(enumerate(layers))[::step]
        axes.set_yticks(
            [(index + 0.5) * experts for index, _ in shown], [str(layer) for _, layer in shown]
        )
        axes.hlines(
            [index * experts for index in range(1, len(layers))], *axes.get_xlim(), "k", lw=0.5
        )
        axes.locator_params(axis="x", integer=True, nbins=8)
        drawing.figure.colorbar(image, ax=axes, extend="max", label="load, 1 is even")
    drawing.label("round", f"MoE layer, {experts} experts each")
    return drawing


def traffic(groups: list[Group]) -> Drawing:
    """A point per class of bytes; rows are runs, DiLoCo and DDP."""
    classes = ("shared", "expert", "control", "evaluation", "all model bytes")
    rows: dict[str, dict[str, float]] = {}
    for group in groups:
        run = group.first
        records = [record["payload_bytes_by_class"] for rounds in run.rounds for record in rounds]
        row = {k: sum(r.get(k, 0) for r in records) / len(records) for k in classes[:-1]}
        row["all model bytes"] = row["shared"] + row["expert"]
        rows[group.name] = row
    for name, payload in _elsewhere(groups).items():
        rows[name] = {"all model bytes": payload}
    size = (4.6, 1.2 + 0.28 * len(rows))
    used = [name for name in classes if any(row.get(name) for row in rows.values())]
    drawing = Drawing("Traffic by class", what=_WHAT, size=size, names=used)
    axes = drawing.axes[0]
    for index, row in enumerate(rows.values()):
        for name in used:
            if row.get(name):
                total = name == classes[-1]
                style: dict[str, Any] = {"marker": "|" if total else "o"}
                style["markersize"] = 13 if total else 5
                drawing.line(name, [row[name]], [index], linestyle="none", **style)
    with drawing.style_context():
        axes.margins(x=0.08)
    drawing.name_rows(list(rows))
    drawing.log_axis("x", bytes_text)
    drawing.quantity_axis("x", "B")  # 10 MB where bytes_text has 10.0 MB
    drawing.label("payload per site and round", "")
    return drawing.finish(linestyle="none", marker="s")


def _elsewhere(groups: list[Group]) -> dict[str, float]:
    """Payload per site and round of DiLoCo and DDP, once for every model among the runs."""
    found: dict[tuple[int, int, int], tuple[str, float, float]] = {}
    for group in groups:
        summary = _planned(group)
        payload = summary["payload_bytes_per_site_per_round"]
        if payload:
            ratios = summary["ratio_vs_diloco"], summary["ratio_vs_ddp"]
            key = (summary["params_total"], summary["num_sites"], summary["local_steps"])
            found.setdefault(key, (group.name, *(payload * ratio for ratio in ratios)))
    rows: dict[str, float] = {}
    for name, diloco, ddp in found.values():
        of = f", model of {name}" if len(found) > 1 else ""
        rows |= {f"DiLoCo{of}": diloco, f"DDP{of}": ddp}
    return rows


def _planned(group: Group) -> Record:
    return planned_summary(plan_run(group.first.config))


def memory(groups: list[Group], member: str = "site") -> Drawing:
    """Bars of the kinds of state, one above another."""
    by_group = {}
    for group in groups:
        by_site = memory_by_kind(plan_run(group.first.config))
        by_group[group.name] = {k: sum(m[k] for m in by_site) / len(by_site) for k in by_site[0]}
    every = next(iter(by_group.values()))
    kinds = [kind for kind in every if any(held[kind] for held in by_group.values())]
    names = [kind.replace("_", " ") for kind in kinds]
    size = (4.6, 1.1 + 0.3 * len(by_group))
    drawing = Drawing("Memory of state", what=_WHAT, size=size, names=names)
    axes = drawing.axes[0]
    with drawing.style_context():
        left = np.zeros(len(by_group))
        for kind, name in zip(kinds, names, strict=True):
            widths = np.array([g[kind] for g in by_group.values()])
            colour = drawing.style(name)["color"]
            axes.barh(range(len(by_group)), widths, left=left, color=colour, height=0.6)
            left += widths
        axes.grid(False, axis="y")
    drawing.name_rows(list(by_group))
    drawing.quantity_axis("x", "B")
    drawing.label(f"bytes per {member}", "")
    return drawing.finish(linestyle="none", marker="s")
