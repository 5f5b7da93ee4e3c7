"""Figures of projections, in the style of every other figure."""

from __future__ import annotations

from pathlib import Path

from fomoe_sim.evaluate import Row
from fomoe_sim.methods import BASELINE
from fomoe_sim.show import days
from fomoe_sim.trainer import SUFFIXES, ConfigError, Drawing, need_matplotlib

Series = tuple[str, list[tuple[float, float]]]
_WHAT = "--plot"
_SIZE = (6.4, 3.8)

# What a sweep may vary, and how a label names it.
VARIED = {
    "num_sites": "K",
    "replication_factor": "r",
    "local_steps": "H",
    "bits": "bits",
    "fragments": "fragments",
    "overlap_steps": "overlap",
}


def check_path(path: str) -> None:
    """Refuse a figure that could not be written, before anything is computed for it.

    Raises:
        ConfigError: if no figure has such a suffix.
        FomoeError: if matplotlib is absent.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError("--plot", path, "must end in .svg, .png or .pdf")
    need_matplotlib(_WHAT)


def draw(path: str | Path, rows: list[Row]) -> None:
    """Days over bandwidth (where a line meets that of one site is its break-even), utilisation over
    local steps, or utilisation as bars; whichever of them varies.

    Raises:
        ConfigError: if the file cannot be written.
        FomoeError: if matplotlib is absent.
    """
    asked = [row for row in rows if row["method"] != BASELINE]
    if len({row["bandwidth_bps"] for row in asked}) > 1:
        level = [row["days"] for row in rows if row["method"] == BASELINE]
        drawing = days_lines(series_of(asked, "bandwidth_bps", "days", 1e-9), level)
    elif len({row["local_steps"] for row in asked}) > 1:
        drawing = utilisation_lines(series_of(asked, "local_steps", "utilisation", 1.0))
    else:
        drawing = utilisation_bars(labels(rows, ""), [row["utilisation"] for row in rows])
    _write(path, drawing)


def draw_tornado(path: str | Path, found: list[tuple[str, float, float]]) -> None:
    """A bar from the fewest to the most days for each assumption, on a logarithmic axis.

    Raises:
        ConfigError: if the file cannot be written.
        FomoeError: if matplotlib is absent.
    """
    drawing = Drawing(
        "Days, one assumption changed", what=_WHAT, size=(6.4, 0.9 + 0.3 * len(found))
    )
    names = [name for name, *_ in found]
    spans = [(least, most) for _, least, most in found]
    drawing.spans(names, spans, log=True)
    drawing.label("days of the run, failures included", "")
    _write(path, drawing.finish())


def _write(path: str | Path, drawing: Drawing) -> None:
    try:
        drawing.save(Path(path))
    except OSError as error:
        raise ConfigError("--plot", path, f"cannot be written: {error.strerror}") from None


def labels(rows: list[Row], x_name: str) -> list[str]:
    """Each row's method, and whatever else differs between the method's rows but the x axis."""
    values: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        for name in VARIED:
            values.setdefault((row["method"], name), set()).add(row[name])
    found = []
    for row in rows:
        differ = [n for n in VARIED if n != x_name and len(values[row["method"], n]) > 1]
        found.append(" ".join([row["method"], *(f"{VARIED[n]}={row[n]:g}" for n in differ)]))
    return found


def series_of(rows: list[Row], name: str, what: str, scale: float) -> list[Series]:
    """One column over another, a line per label."""
    found: dict[str, list[tuple[float, float]]] = {}
    for label, row in zip(labels(rows, name), rows, strict=True):
        found.setdefault(label, []).append((scale * row[name], row[what]))
    return [(key, sorted(points)) for key, points in found.items()]


def days_lines(series: list[Series], level: list[float]) -> Drawing:
    """Days over a link, both logarithmic; `level` is what one site takes, if it was asked."""
    if level:
        ends = [x for _, points in series for x, _ in points]
        line = [(min(ends), level[0]), (max(ends), level[0])]
        series = [*series, (f"{BASELINE} (break-even)", line)]
    drawing = _lines("Days of the run, failures included", series)
    drawing.log_axis("y", days)
    drawing.label("link, Gbit/s", "")
    return drawing.finish()


def utilisation_lines(series: list[Series]) -> Drawing:
    """Shares over a logarithmic x axis; y runs from 0 to 1."""
    drawing = _lines("Utilisation: share of time spent computing", series)
    drawing.share_axis("y")
    drawing.label("local steps per round", "")
    return drawing.finish()


def utilisation_bars(names: list[str], values: list[float]) -> Drawing:
    """One bar per answer, from 0 to 1."""
    title = "Utilisation: share of time spent computing"
    drawing = Drawing(title, what=_WHAT, size=(6.4, 0.9 + 0.3 * len(names)))
    drawing.spans(names, [(0.0, value) for value in values], told=[f"{x:.0%}" for x in values])
    drawing.share_axis("x")
    return drawing.finish()


def _lines(title: str, series: list[Series]) -> Drawing:
    drawing = Drawing(title, what=_WHAT, size=_SIZE, names=[name for name, _ in series])
    for index, (name, points) in enumerate(series):
        # A line that later ones cover is wider than they are, and so is seen.
        over = sum(_covers(points, later) for _, later in series[index + 1 :])
        xs, ys = zip(*points, strict=True)
        drawing.line(name, xs, ys, marker=".", linewidth=1.8 + 1.6 * min(over, 3))
    drawing.log_axis("x", lambda value: f"{value:g}")
    return drawing


def _covers(points: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    """Whether two lines cannot be told apart."""
    pairs = zip(points, other, strict=False)
    return len(points) == len(other) and all(abs(a - b) <= 0.02 * a for (_, a), (_, b) in pairs)
