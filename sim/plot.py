"""A small SVG chart, written by hand so that no plotting library is needed."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10
from pathlib import Path

from fomoe.errors import ConfigError
from fomoe_sim.answer import Row

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 55
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


def write_plot(path: str | Path, rows: list[Row]) -> None:
    """Draw utilisation: over bandwidth or local steps if they vary, else as bars.

    Raises:
        ConfigError: if the file cannot be written.
    """
    if len({row["bandwidth_bps"] for row in rows}) > 1:
        text = lines_svg(series_of(rows, "bandwidth_bps", 1e-9), "link, Gbit/s")
    elif len({row["local_steps"] for row in rows}) > 1:
        text = lines_svg(series_of(rows, "local_steps", 1.0), "local steps per round")
    else:
        names = labels(rows, "")
        bars = zip(names, (row["utilisation"] for row in rows), strict=True)
        text = bars_svg(list(bars))
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


def series_of(rows: list[Row], name: str, scale: float) -> list[Series]:
    """Utilisation over one column, a line per label."""
    found: dict[str, list[tuple[float, float]]] = {}
    for label, row in zip(labels(rows, name), rows, strict=True):
        found.setdefault(label, []).append((scale * row[name], row["utilisation"]))
    return [(key, sorted(points)) for key, points in found.items()]


def lines_svg(series: list[Series], x_name: str) -> str:
    """Lines over a logarithmic x axis; y runs from 0 to 1."""
    xs = [x for _, points in series for x, _ in points]
    low, high = floor(log10(min(xs))), ceil(log10(max(xs)))
    high = max(high, low + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (log10(x) - low) / (high - low)
        return LEFT + share * _inner_width(), TOP + (1 - y) * _inner_height()

    parts = _frame(x_name)
    for power in range(low, high + 1):
        x, bottom = at(10.0**power, 0)
        parts.append(_text(x, bottom + 18, f"{10.0**power:g}", "middle"))
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}" class="grid"/>')
    for i, (name, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        dash = "" if i < len(COLOURS) else ' stroke-dasharray="5 3"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        y = TOP + 12 + 17 * i
        x = WIDTH - RIGHT + 12
        parts.append(f'<rect x="{x}" y="{y - 8}" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(x + 20, y, name, "start"))
    return _document(parts)


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
