"""A study's figure, drawn by matplotlib where that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from fomoe.errors import say_line
from fomoe.files import write_atomically

# Of one arm: its name, FLOPs of routed experts against the control, mean loss, its spread.
Point = tuple[str, float, float, float]


def draw(path: Path, regimes: Mapping[str, Sequence[Point]]) -> bool:
    """Write an SVG of merged loss over expert FLOPs, a panel per regime.

    Returns:
        Whether it was drawn; without matplotlib one line says how to get it.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        matplotlib = import_module("matplotlib")
        Figure = import_module("matplotlib.figure").Figure  # without pyplot there is no window
    except ImportError:
        say_line("no figure: it needs matplotlib (pip install matplotlib); the tables are whole")
        return False
    # Ids and dates of an SVG would else change with every writing.
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.5 * len(regimes), 4.5), layout="constrained")
        for axes, (name, points) in zip(
            figure.subplots(1, len(regimes), squeeze=False)[0], regimes.items(), strict=True
        ):
            for label, flops, loss, spread in points:
                axes.errorbar([flops], [loss], yerr=[spread], fmt="o", capsize=3)
                axes.annotate(
                    label, (flops, loss), xytext=(5, 4), textcoords="offset points", fontsize=8
                )
            axes.set_title(name)
            axes.set_xlabel("expert FLOPs of the run, against the control")
            axes.set_ylabel("merged validation loss, nats per token")
            axes.grid(alpha=0.3)
        write_atomically(
            path,
            lambda own: figure.savefig(own, format="svg", metadata={"Date": None, "Creator": None}),
        )
    return True
