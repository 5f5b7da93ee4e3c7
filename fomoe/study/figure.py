"""A study's figure: merged loss over what was computed, a panel per regime (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fomoe.errors import ServiceError, say_line
from fomoe.figures import Drawing

# Of one arm: its name, FLOPs of routed experts against the control, mean loss, its spread.
Point = tuple[str, float, float, float]


def draw(path: Path, title: str, regimes: Mapping[str, Sequence[Point]]) -> bool:
    """Write an SVG.

    Args:
        regimes: the points by regime; one without a name is the whole study.

    Returns:
        Whether it was drawn; without matplotlib one line says how to get it.

    Raises:
        OSError: if it cannot be written.
    """
    width = 5.2 * len(regimes)
    try:
        drawing = Drawing(title, what="a figure", columns=len(regimes), size=(width, 3.6))
    except ServiceError as error:
        say_line(f"no figure, the tables are complete: {error}")
        return False
    for index, (name, points) in enumerate(regimes.items()):
        axes = drawing.axes[index]
        with drawing.style_context():
            for arm, flops, loss, spread in points:
                axes.errorbar([flops], [loss], yerr=[spread], fmt="o", capsize=3)
                place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
                axes.annotate(arm, (flops, loss), **place)
            axes.set_title(": ".join(part for part in (title * (index == 0), name) if part))
        drawing.label(
            "expert FLOPs of the run, against the control",
            "merged validation loss, nats per token",
            axis=index,
        )
    drawing.finish().save(path)
    return True
