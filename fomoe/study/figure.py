"""A study's figure: merged loss over what was computed or sent, a panel per regime (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomoe.amounts import bytes_text
from fomoe.errors import ServiceError, say_line
from fomoe.figures import Drawing

_X_NAMES = {
    "flops": "expert FLOPs of the run, against the control",
    "bytes": "model bytes that a site has sent",
}


@dataclass(frozen=True)
class Shown:
    """What the figure shows of an arm in one regime.

    Attributes:
        xs: FLOPs of routed experts against the control (one value), or bytes sent at each round.
        losses: merged losses at these, one list per seed.
    """

    arm: str
    xs: Sequence[float]
    losses: Sequence[Sequence[float]]

    @property
    def mean(self) -> np.ndarray:
        return np.mean(self.losses, axis=0)

    @property
    def spread(self) -> np.ndarray:
        """The sample standard deviation; one seed has none."""
        several = len(self.losses) > 1
        return np.std(self.losses, axis=0, ddof=1) if several else np.zeros(len(self.xs))


def draw(path: Path, title: str, over: str, regimes: Mapping[str, Sequence[Shown]]) -> bool:
    """Write an SVG: the mean over seeds, and the standard deviation around it.

    Args:
        over: `flops` or `bytes`.
        regimes: the arms by regime; one without a name is the whole study.

    Returns:
        Whether it was drawn; without matplotlib one line says how to get it.

    Raises:
        OSError: if it cannot be written.
    """
    arms = list(dict.fromkeys(shown.arm for arms in regimes.values() for shown in arms))
    names = arms if over == "bytes" else ()
    size = (5.2 * len(regimes), 3.6)
    try:
        drawing = Drawing(title, what="a figure", columns=len(regimes), size=size, names=names)
    except ServiceError as error:
        say_line(f"no figure, the tables are complete: {error}")
        return False
    for index, (name, shown) in enumerate(regimes.items()):
        with drawing.style_context():
            drawing.axes[index].set_title(
                ": ".join(part for part in (title * (index == 0), name) if part)
            )
            for arm in shown:
                (_curve if over == "bytes" else _point)(drawing, arm, index)
        drawing.label(_X_NAMES[over], "merged validation loss, nats per token", axis=index)
        if over == "bytes":
            drawing.log_axis("x", bytes_text, axis=index)
    drawing.finish().save(path)
    return True


def _point(drawing: Drawing, shown: Shown, index: int) -> None:
    axes = drawing.axes[index]
    axes.errorbar(shown.xs, shown.mean, yerr=shown.spread, fmt="o", capsize=3)
    place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
    axes.annotate(shown.arm, (shown.xs[0], shown.mean[0]), **place)


def _curve(drawing: Drawing, shown: Shown, index: int) -> None:
    low, high = shown.mean - shown.spread, shown.mean + shown.spread
    drawing.line(shown.arm, shown.xs, shown.mean.tolist(), axis=index, marker=".")
    drawing.band(shown.arm, shown.xs, low, high, axis=index)
