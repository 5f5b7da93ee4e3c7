"""How cost grows, as a figure in the style of the others."""

from __future__ import annotations

from bench.layers import Row
from fomoe.figures import Drawing

_PANELS = (
    ("assignments", "ms", "executed share", "ms, forward + backward"),
    ("residents", "state_mb", "resident experts", "MB of state"),
    ("experts", "ms", "all experts, 8 resident, half executed", "ms, forward + backward"),
)


def growth(rows: list[Row]) -> Drawing:
    """Three panels: time over executed share, state over residents, time over all experts.

    Raises:
        ServiceError: if matplotlib is absent.
    """
    names = ("experts", "router")
    drawing = Drawing("Growth of cost", what="--plot", columns=3, size=(10.5, 2.8), names=names)
    for axis, (series, field, below, beside) in enumerate(_PANELS):
        lines = [("experts", series)] + ([("router", "router")] if series == "experts" else [])
        for name, of in lines:
            points = sorted((row["value"], row[field]) for row in rows if row["series"] == of)
            drawing.line(name, *zip(*points, strict=True), axis=axis, marker="o")
        drawing.label(below, beside, axis=axis)
        drawing.axes[axis].set_ylim(bottom=0)
    return drawing.finish()
