"""Small published anchors, recomputed by their formulas: measured links, activations, money."""

from __future__ import annotations

import numpy as np

from fomoe_sim import published
from fomoe_sim.event_spec import equal_layers
from fomoe_sim.reproduce import Cell, Table


def blocking_utilisation(*, compute_s: float, sync_s: float) -> float:
    """Utilisation when nothing overlaps: compute over compute and sync."""
    return compute_s / (compute_s + sync_s)


def measured_table(*, calibrated: bool, max_error: float) -> Table:
    """Shaped TCP links: ring volume over bandwidth, or with the calibrated link."""
    links = published.MEASURED_LINKS
    factor, fixed_s = (links.wire_factor, links.sync_fixed_s) if calibrated else (1.0, 0.0)
    ring_bits = sum(equal_layers(links.params, 1, bits=links.bits, num_sites=links.num_sites))
    cells = []
    for local_steps, row in published.MEASURED_PERCENT.items():
        for bandwidth, percent in zip(links.bandwidth_bps, row, strict=True):
            ours = 100 * blocking_utilisation(
                compute_s=local_steps * links.step_time_s,
                sync_s=factor * ring_bits / bandwidth + fixed_s,
            )
            cells.append(error_cell(f"H={local_steps}", f"{bandwidth / 1e6:.0f}M", ours, percent))
    mean = float(np.mean([abs(cell.error or 0) for cell in cells]))
    link = f"{factor} ring volumes + {fixed_s} s" if calibrated else "ring volume / bandwidth"
    return Table(
        name="measured-tcp-calibrated" if calibrated else "measured-tcp",
        source=f"{links.source}; {link}",
        unit="% utilisation",
        cells=tuple(cells),
        tolerance=f"mean error at most {max_error} points",
        summary=f"mean error {mean:.2f} points",
        passed=mean <= max_error,
    )


def intellect_table() -> Table:
    """INTELLECT-1: utilisation from its inner phase and its sync time."""
    cells = [
        error_cell(
            "INTELLECT-1",
            f"sync {sync_s} s",
            100 * blocking_utilisation(compute_s=published.INTELLECT_INNER_S, sync_s=sync_s),
            percent,
        )
        for sync_s, percent in published.INTELLECT_PERCENT.items()
    ]
    return digit_table("intellect-1", published.INTELLECT_SOURCE, "% utilisation", cells, 1)


def activation_gib(model: published.ActivationModel, *, selective: bool) -> float:
    """Activations of the first pipeline stage, GiB (arXiv 2205.05198, tables 2 and section 4).

    `selective`: sequence parallelism and selective recomputation; else tensor parallelism alone.
    """
    sbh = model.sequence * model.batch * model.hidden
    t, p, m = model.tensor_parallel, model.pipeline_parallel, model.interleave
    attention = 5 * model.heads * model.sequence / (model.hidden * t)
    per_layer = 34 * sbh / t if selective else sbh * (10 + 24 / t + attention)
    return per_layer * model.num_layers * (1 + (p - 1) / (p * m)) / 2**30


def activation_table() -> Table:
    """Activation memory of the 22B and 175B models."""
    cells = []
    for model in published.ACTIVATION_MODELS:
        for selective, theirs in ((False, model.baseline_gib), (True, model.selective_gib)):
            ours = activation_gib(model, selective=selective)
            column = "sequence + selective" if selective else "tensor parallel"
            cells.append(
                Cell(
                    row=model.name,
                    column=column,
                    ours=ours,
                    published=theirs,
                    error=ours / theirs - 1,
                )
            )
    worst = max(abs(cell.error or 0) for cell in cells)
    return Table(
        name="activations",
        source=published.ACTIVATION_SOURCE,
        unit="GiB",
        cells=tuple(cells),
        tolerance="each within 0.1 %",
        summary=f"largest error {100 * worst:.3f} %",
        passed=worst <= 1e-3,
    )


def deepseek_tables() -> list[Table]:
    """DeepSeek-V3: money of the run, and days per 10^12 tokens."""
    money = published.DEEPSEEK_GPU_HOURS * published.DEEPSEEK_PRICE_PER_HOUR / 1e6
    hours = published.DEEPSEEK_HOURS_PER_TRILLION_TOKENS / published.DEEPSEEK_GPUS
    cost = error_cell("DeepSeek-V3", "cost", money, published.DEEPSEEK_MILLION_DOLLARS)
    days = error_cell(
        "DeepSeek-V3", "days", hours / 24, published.DEEPSEEK_DAYS_PER_TRILLION_TOKENS
    )
    source = published.DEEPSEEK_SOURCE
    return [
        digit_table("deepseek-v3-money", source, "million dollars", [cost], 3),
        digit_table("deepseek-v3-days", source, "days per 10^12 tokens", [days], 2),
    ]


def error_cell(row: str, column: str, ours: float, theirs: float) -> Cell:
    return Cell(row=row, column=column, ours=ours, published=theirs, error=ours - theirs)


def digit_table(name: str, source: str, unit: str, cells: list[Cell], digits: int) -> Table:
    equal = sum(round(cell.ours, digits) == cell.published for cell in cells)
    return Table(
        name=name,
        source=source,
        unit=unit,
        cells=tuple(cells),
        tolerance="equal to the printed digit",
        summary=f"{equal} of {len(cells)} equal",
        passed=equal == len(cells),
    )
