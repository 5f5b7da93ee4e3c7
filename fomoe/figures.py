"""How every figure looks: one style, one set of colours, one way to write a file.

matplotlib is an extra (`fomoe[plot]`) and is imported at the first figure (no torch).
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from fomoe.errors import ServiceError

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008); each is visible on white
# and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
DASHES = ("-", "--", ":", "-.")
SUFFIXES = (".svg", ".png", ".pdf")
_ROW_NAME = 24  # characters of a line; longer names would leave no room for the axes
_GAP = 4.0  # points between the labels of two ticks
# In a page these two follow the reader's light or dark scheme.
_TEXT, _GRID = "#222223", "#d8d8d9"
_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "grid.color": _GRID,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlecolor": _TEXT,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "figure.dpi": 96.0,
    "savefig.dpi": 200.0,
    "svg.fonttype": "path",  # the same on every machine, whatever fonts it has
}


def need_matplotlib(what: str) -> ModuleType:
    """The library.

    Raises:
        ServiceError: naming what needs it and the extra to install.
    """
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        missing = (error.name or "matplotlib").split(".")[0]
        raise ServiceError(f"{what} needs {missing}: pip install 'fomoe[plot]'") from None
    return matplotlib


class Drawing:
    """One figure with one or several axes.

    Args:
        title: stands above the axes on the left.
        what: the command that draws, for the message where matplotlib is absent.
        columns: axes beside each other.
        size: width and height in inches of all axes together; the legend's rows are added.
        names: entries of the legend below the axes; `style` gives their colours.
        extra: further entries of the legend, with a style of their own.

    Attributes:
        axes: matplotlib's, from left to right.
    """

    def __init__(
        self,
        title: str,
        *,
        what: str,
        columns: int = 1,
        size: tuple[float, float] = (4.6, 2.9),
        names: Sequence[str] = (),
        extra: Sequence[tuple[str, dict[str, Any]]] = (),
    ) -> None:
        self._library = need_matplotlib(what)
        self.title, self.names, self._extra = title, tuple(names), extra
        entries = [*names, *(name for name, _ in extra)] if len(names) > 1 or extra else []
        width = max((len(name) for name in entries), default=1)
        self._legend_columns = max(1, min(len(entries), int(size[0] * 12 / (width + 6))))
        rows = -(-len(entries) // self._legend_columns)
        with self.style_context():
            figure = self._library.figure.Figure
            self.figure = figure((size[0], size[1] + 0.19 * rows), layout="constrained")
            self.axes = list(self.figure.subplots(1, columns, squeeze=False)[0])
            self.axes[0].set_title(title)

    def style(self, name: str) -> dict[str, Any]:
        """Colour and dashes of a name of the legend."""
        index = self.names.index(name) if name in self.names else 0
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash}

    def line(
        self, name: str, xs: Sequence[float], ys: Sequence[float], *, axis: int = 0, **more: Any
    ) -> None:
        with self.style_context():
            self.axes[axis].plot(xs, ys, **{**self.style(name), **more})

    def band(self, name: str, xs: Any, low: Any, high: Any, *, axis: int = 0) -> None:
        """The range of several runs, below their mean."""
        colour = self.style(name)["color"]
        self.axes[axis].fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)

    def spans(
        self,
        names: Sequence[str],
        spans: Sequence[tuple[float, float]],
        *,
        told: Sequence[str] = (),
        log: bool = False,
    ) -> None:
        """A bar from one value to another for every name, from the top down; `told` stands at its
        end."""
        axes = self.axes[0]
        with self.style_context():
            left = [low for low, _ in spans]
            bars = axes.barh(
                names, [b - a for a, b in spans], left=left, color=COLOURS[0], height=0.6
            )
            if told:
                axes.bar_label(bars, told, padding=3)
            axes.invert_yaxis()
            axes.grid(False, axis="y")
        if log:
            axes.set_xlim(0.93 * min(left), 1.07 * max(high for _, high in spans))
            self.log_axis("x", lambda value: f"{value:g}")

    def log_axis(self, which: str, text: Callable[[float], str], *, axis: int = 0) -> None:
        """A logarithmic axis; `text` writes the values at its ticks."""
        axes, ticker = self.axes[axis], self._library.ticker
        getattr(axes, f"set_{which}scale")("log")
        side = getattr(axes, f"{which}axis")
        low, high = getattr(axes, f"get_{which}lim")()
        if high > 100 * low:
            side.set_major_locator(ticker.LogLocator(numticks=8))
        else:  # powers of ten alone could be one tick or none
            side.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        side.set_major_formatter(ticker.FuncFormatter(lambda value, _: text(value)))
        side.set_minor_formatter(ticker.NullFormatter())

    def name_rows(self, names: Sequence[str]) -> None:
        """Name the rows 0, 1, ... from the top down; a long name takes several lines, for which
        the figure grows."""
        axes = self.axes[0]
        texts = ["\n".join(textwrap.wrap(name, _ROW_NAME)) for name in names]
        with self.style_context():
            axes.set_yticks(range(len(texts)), texts)
        axes.set_ylim(len(texts) - 0.5, -0.5)
        most = max((text.count("\n") for text in texts), default=0)
        self.figure.set_figheight(self.figure.get_figheight() + 0.12 * most * len(texts))

    def share_axis(self, which: str, *, axis: int = 0) -> None:
        """An axis from 0 to 1 in percent."""
        axes = self.axes[axis]
        getattr(axes, f"set_{which}lim")(0, 1.02)
        getattr(axes, f"{which}axis").set_major_formatter(self._library.ticker.PercentFormatter(1))

    def quantity_axis(self, which: str, unit: str = "", *, axis: int = 0) -> None:
        """Ticks such as 20M, or 20 MB with a unit."""
        formatter = self._library.ticker.EngFormatter(unit=unit, sep=" " if unit else "")
        getattr(self.axes[axis], f"{which}axis").set_major_formatter(formatter)

    def label(self, x: str, y: str, *, axis: int = 0) -> None:
        with self.style_context():
            self.axes[axis].set_xlabel(x)
            self.axes[axis].set_ylabel(y)

    def finish(self, **more: Any) -> Drawing:
        """Draw the legend; `more` changes how the names look there."""
        line = self._library.lines.Line2D
        alone = len(self.names) < 2 and not self._extra
        entries = [] if alone else [(name, {**self.style(name), **more}) for name in self.names]
        entries += [(name, {"color": _TEXT, **style}) for name, style in self._extra]
        if entries:
            with self.style_context():
                self.figure.legend(
                    [line([], [], **style) for _, style in entries],
                    [name for name, _ in entries],
                    loc="outside lower left",
                    ncols=self._legend_columns,
                )
        for axes in self.axes:
            self._thin_ticks(axes)
        return self

    def _thin_ticks(self, axes: Any) -> None:
        """Leave out every second tick of the x axis until no label touches the next."""
        side = axes.xaxis
        while True:
            with self.style_context():
                self.figure.draw_without_rendering()
            low, high = sorted(axes.get_xlim())
            ticks = [at for at in side.get_majorticklocs() if low <= at <= high]
            boxes = [tick.label1.get_window_extent() for tick in side.get_major_ticks(len(ticks))]
            ends = sorted((box.x0, box.x1) for box in boxes if box.width)
            gap = _GAP * self.figure.dpi / 72
            if len(ticks) <= 2 or all(left[1] + gap <= right[0] for left, right in pairwise(ends)):
                return
            side.set_major_locator(self._library.ticker.FixedLocator(ticks[::2]))

    def svg(self) -> str:
        """For a page: transparent, with the page's own colours of text and grid."""
        text = self._bytes(".svg", transparent=True).decode()
        text = (
            text[text.index("<svg") :].replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")
        )
        return re.sub(r'<svg (?:.|\n)*?viewBox="([^"]*)"(?:.|\n)*?>', self._head, text, count=1)

    def save(self, path: Path) -> None:
        """Write an SVG, PNG or PDF file, as the suffix says.

        Raises:
            OSError: if it cannot be written.
        """
        path.write_bytes(self._bytes(path.suffix))

    def _head(self, found: re.Match[str]) -> str:
        return (
            f'<svg role="img" aria-label="{self.title}" viewBox="{found[1]}" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        )

    def _bytes(self, suffix: str, **more: Any) -> bytes:
        buffer = io.BytesIO()
        # No date and no random names: equal figures are equal files.
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[suffix]
        with self.style_context():
            self.figure.savefig(buffer, format=suffix[1:], metadata=dates, **more)
        return buffer.getvalue()

    def style_context(self) -> Any:
        """The style, for what matplotlib is called for directly."""
        # Names inside an SVG differ between the figures of one page.
        return self._library.rc_context({**_STYLE, "svg.hashsalt": self.title})
