"""Numbers as people read them in tables (no torch)."""

from __future__ import annotations

from statistics import stdev


def bytes_text(count: float) -> str:
    """Bytes in units of 1000, as for network links."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def times_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def spread_text(values: list[float], form: str) -> str:
    """The value, or mean and standard deviation of several."""
    text = format(mean_of(values), form)
    return text if len(values) == 1 else f"{text} ± {format(stdev(values), form)}"
