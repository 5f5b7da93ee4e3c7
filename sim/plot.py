"""A small SVG chart, written by hand so that no plotting library is needed."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from fomoe_sim.evaluate import Row
from fomoe_sim.methods import BASELINE
from fomoe_sim.show import days
from fomoe_sim.trainer import ConfigError

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 210, 40, 55
# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
Series = tuple[str, list[tuple[float, float]]]


# What a sweep may vary, and how a label names it.
VARIED = {
    "num_sites": "K",
    "replication_factor": "r",
    "local_steps": "H",
    "bits": "bits",
    "fragments": "fragments",
    "overlap_steps": "overlap",
}


def draw(path: str | Path, rows: list[Row]) -> None:
    """Days over bandwidth (where a line meets that of one site is its break-even), utilisation over
    local steps, or utilisation as bars; whichever of them varies.

    Raises:
        ConfigError: if the file cannot be written.
    """
    asked = [row for row in rows if row["method"] != BASELINE]
    if len({row["bandwidth_bps"] for row in asked}) > 1:
        level = [row["days"] for row in rows if row["method"] == BASELINE]
        series = series_of(asked, "bandwidth_bps", "days", 1e-9)
        text = days_svg(series, "link, Gbit/s", level[0] if level else None)
    elif len({row["local_steps"] for row in asked}) > 1:
        text = lines_svg(
            series_of(asked, "local_steps", "utilisation", 1.0), "local steps per round"
        )
    else:
        names = labels(rows, "")
        bars = zip(names, (row["utilisation"] for row in rows), strict=True)
        text = bars_svg(list(bars))
    _write(path, text)


def _write(path: str | Path, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--plot", str(path), f"cannot be written: {error.strerror}") from None


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


def lines_svg(series: list[Series], x_name: str) -> str:
    """Shares over a logarithmic x axis; y runs from 0 to 1."""
    low, high = _powers([x for _, points in series for x, _ in points])
    parts = [*_frame(x_name), *_x_ticks(low, high)]
    return _document([*parts, *_lines(series, low, high, lambda y: y)])


def days_svg(series: list[Series], x_name: str, level: float | None) -> str:
    """Days over a link, both logarithmic; `level` is what one site takes."""
    low, high = _powers([x for _, points in series for x, _ in points])
    values = [y for _, points in series for _, y in points] + ([level] if level else [])
    bottom, top = _powers(values)

    def share(y: float) -> float:
        return (log10(y) - bottom) / (top - bottom)

    parts = [
        _text(LEFT, TOP - 16, "days of the run, failures included", "start"),
        *_x_ticks(low, high),
    ]
    parts.append(_text(LEFT + _inner_width() / 2, HEIGHT - 12, x_name, "middle"))
    for power in range(bottom, top + 1):
        y = TOP + (1 - share(10.0**power)) * _inner_height()
        parts.append(_text(LEFT - 8, y + 4, days(10.0**power).replace(" days", " d"), "end"))
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>'
        )
    if level:
        ends = [(10.0**low, level), (10.0**high, level)]
        series = [(f"{BASELINE} (break-even)", ends), *series]
    return _document([*parts, *_lines(series, low, high, share)])


def tornado_svg(path: str | Path, found: list[tuple[str, float, float]]) -> None:
    """A bar from the fewest to the most days for each assumption, on a logarithmic axis."""
    low, high = _powers([value for _, *ends in found for value in ends])
    parts = [*_x_ticks(low, high), _text(LEFT, TOP - 16, "days, one assumption changed", "start")]
    step = _inner_height() / len(found)
    for i, (name, least, most) in enumerate(found):
        x1, x2 = (_x(value, low, high) for value in (least, most))
        y = TOP + (i + 0.2) * step
        parts.append(
            f'<rect x="{x1:.1f}" y="{y:.1f}" width="{max(1.0, x2 - x1):.1f}" '
            f'height="{0.6 * step:.1f}" fill="{COLOURS[0]}"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 8, y + 0.4 * step, name, "start"))
    _write(path, _document(parts))


def _powers(values: list[float]) -> tuple[int, int]:
    """Powers of ten around the values, at least one apart."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return low, max(high, low + 1)


def _x(value: float, low: int, high: int) -> float:
    return LEFT + (log10(value) - low) / (high - low) * _inner_width()


def _x_ticks(low: int, high: int) -> list[str]:
    parts, bottom = [], TOP + _inner_height()
    for power in range(low, high + 1):
        x = _x(10.0**power, low, high)
        parts.append(_text(x, bottom + 18, f"{10.0**power:g}", "middle"))
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}" class="grid"/>')
    return parts


def _lines(series: list[Series], low: int, high: int, share: Callable[[float], float]) -> list[str]:
    """Lines and their legend; `share` of the height of a value."""
    parts = []
    for i, (name, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        dash = "" if i < len(COLOURS) else ' stroke-dasharray="5 3"'
        at = [(_x(x, low, high), TOP + (1 - share(y)) * _inner_height()) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        y, x = TOP + 12 + 17 * i, WIDTH - RIGHT + 12
        parts.append(f'<rect x="{x}" y="{y - 8}" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(x + 20, y, name, "start"))
    return parts


def bars_svg(bars: list[tuple[str, float]]) -> str:
    """One bar per answer; y runs from 0 to 1."""
    parts = _frame("")
    step = _inner_width() / len(bars)
    for i, (name, value) in enumerate(bars):
        height = value * _inner_height()
        x, y = LEFT + (i + 0.15) * step, TOP + _inner_height() - height
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.7 * step:.1f}" height="{height:.1f}" '
            f'fill="{COLOURS[i % len(COLOURS)]}"/>'
        )
        parts.append(_text(x + 0.35 * step, TOP + _inner_height() + 18, name, "middle"))
        parts.append(_text(x + 0.35 * step, y - 5, f"{100 * value:.0f}%", "middle"))
    return _document(parts)


def _inner_width() -> int:
    return WIDTH - LEFT - RIGHT


def _inner_height() -> int:
    return HEIGHT - TOP - BOTTOM


def _frame(x_name: str) -> list[str]:
    parts = [_text(LEFT, TOP - 16, "utilisation: share of time spent computing", "start")]
    for tick in range(0, 101, 20):
        y = TOP + (1 - tick / 100) * _inner_height()
        parts.append(_text(LEFT - 8, y + 4, f"{tick}%", "end"))
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>'
        )
    parts.append(_text(LEFT + _inner_width() / 2, HEIGHT - 12, x_name, "middle"))
    return parts


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _document(parts: list[str]) -> str:
    style = "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd;stroke-width:1}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"
