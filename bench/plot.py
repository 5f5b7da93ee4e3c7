"""A small SVG of how cost grows; no plotting library."""

from __future__ import annotations

from bench.layers import Row

_WIDTH, _HEIGHT, _GAP, _TOP = 300, 200, 70, 40
_PANELS = (
    ("assignments", "ms", "executed share", "ms, forward + backward"),
    ("residents", "state_mb", "resident experts", "MB of state"),
    ("experts", "ms", "all experts, 8 resident, half executed", "ms, forward + backward"),
)


def growth_svg(rows: list[Row]) -> str:
    """Three panels: time over executed share, state over residents, time over all experts."""
    total = len(_PANELS) * (_WIDTH + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {_HEIGHT + 110}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{total}" height="{_HEIGHT + 110}" fill="white"/>',
    ]
    for index, (series, field, below, beside) in enumerate(_PANELS):
        left = _GAP + index * (_WIDTH + _GAP)
        lines = [(series, field, "#1f77b4")]
        if series == "experts":
            lines.append(("router", "ms", "#d62728"))
        parts += _panel(rows, lines, left, below, beside)
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    rows: list[Row], lines: list[tuple[str, str, str]], left: int, below: str, beside: str
) -> list[str]:
    chosen = [r for r in rows for series, _, _ in lines if r["series"] == series]
    field = lines[0][1]
    right = max(row["value"] for row in chosen)
    high = max(row[field] for row in chosen) * 1.1
    bottom = _TOP + _HEIGHT
    parts = [
        f'<path d="M{left} {_TOP}V{bottom}H{left + _WIDTH}" fill="none" stroke="#444"/>',
        f'<text x="{left}" y="{_TOP - 10}">{beside}</text>',
        f'<text x="{left + _WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">{below}</text>',
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{left - 6}" y="{_TOP + 10}" text-anchor="end">{high:.0f}</text>',
    ]
    for position, (series, name, colour) in enumerate(lines):
        points = sorted((r["value"], r[name]) for r in chosen if r["series"] == series)
        at = [
            (left + _WIDTH * value / right, bottom - _HEIGHT * cost / high)
            for value, cost in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        if not position:
            parts += [
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
                for (x, _), (value, _) in zip(at, points, strict=True)
            ]
        if len(lines) > 1:
            name_y = _TOP + 14 + 14 * position
            name = "router" if series == "router" else "experts"
            parts.append(
                f'<text x="{left + _WIDTH}" y="{name_y}" text-anchor="end" '
                f'fill="{colour}">{name}</text>'
            )
    return parts
