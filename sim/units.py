"""Numbers and records as people write and read them: rates, mappings, figures with units."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from math import sqrt
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fomoe_sim.trainer import ConfigError, hint

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_NUMBER = r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)"
_RATE = re.compile(_NUMBER + r"\s*([kmgt]?)((?:bits?|b)?(?:/s|ps)?)", re.IGNORECASE)
# Links people name by their product: nominal rates.
LINKS = {"fast-ethernet": 100e6, "gigabit": 1e9, "10gbe": 10e9, "100gbe": 100e9}
SLOWEST_BPS, FASTEST_BPS = 1.0, 1e18
MOST_USD = 1e6  # of one accelerator-hour or GB


def read_rate(text: object, field: str) -> float:
    """Bits per second from `1Gbit`, `100Mb/s`, `2.5Gbps`, a link's name, or a plain number.

    Raises:
        ConfigError: if the text is no rate, is in bytes, or is not above 0.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        rate: float = text
    else:
        word = str(text).strip()
        rate = LINKS.get(word.lower()) or _read_words(word, field)
    if not SLOWEST_BPS <= rate <= FASTEST_BPS:
        rule = f"must be a bandwidth above 0: from {SLOWEST_BPS:g} to {FASTEST_BPS:g} bit/s"
        raise ConfigError(field, str(text), rule)
    return float(rate)


def _read_words(word: str, field: str) -> float:
    match = _RATE.fullmatch(word)
    if "byte" in word.lower() or (match and match[3] in ("B", "B/s", "Bps")):
        raise ConfigError(field, word, "is in bytes (capital B); give bits: 8Gbit for 1 GB/s")
    if match is None:
        known = hint(word, LINKS)
        rule = f"is not a link or a rate such as 1Gbit or 100Mbit; {known}"
        raise ConfigError(field, word, rule)
    return float(match[1]) * _UNITS[match[2].lower()]


def read_up_down(text: object, field: str) -> tuple[float, float]:
    """Up and down rates of `UP/DOWN` (each a rate) or of one rate for both."""
    word = str(text)
    parts = re.split(r"/(?!s\b)", word) if isinstance(text, str) else [text]
    if len(parts) > 2:
        raise ConfigError(field, word, "must be one rate, or UP/DOWN such as 100Mbit/1Gbit")
    rates = [read_rate(part, field) for part in parts]
    return rates[0], rates[-1]


def read_prices(value: Any, field: str) -> tuple[float, float]:
    """Low and high USD from one price or a list of two."""
    low, high = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high))
    if not numbers or not 0 <= low <= high <= MOST_USD:
        rule = f"must be a price, or two: 0 <= low <= high <= {MOST_USD:g}"
        raise ConfigError(field, value, rule)
    return float(low), float(high)


def central(low_high: tuple[float, float]) -> float:
    """Geometric mean of a range, as far from both ends in ratio; from 0 on, the arithmetic mean."""
    low, high = low_high
    return sqrt(low * high) if low else high / 2


# ----------------------------------------------------------------------------------------- checks


def flag_of(name: str) -> str:
    """An option's name as the user types it."""
    return f"--{name.replace('_', '-')}"


def check_number(flag: str, value: float, low: float, high: float) -> None:
    """Refuse a number that is not finite or not within its limits.

    Raises:
        ConfigError: naming the flag as it was typed.
    """
    if value != value:
        raise ConfigError(flag, value, "must be a number")
    if low == 0 and value < 0:
        raise ConfigError(flag, value, "must not be negative")
    if value <= 0 and low > 0:
        raise ConfigError(flag, value, "must be above 0")
    if value < low:
        raise ConfigError(flag, value, f"must be at least {low:g}")
    if value > high:
        raise ConfigError(flag, value, f"must be at most {high:,.15g}")


def within(low: float, high: float, default: Any = MISSING) -> Any:
    """A number of a record that a file states, with its limits."""
    return field(default=default, metadata={"limits": (low, high)})


def check_keys(
    tree: Any, known: Iterable[str], needed: Iterable[str], where: str, *, more: Iterable[str] = ()
) -> None:
    """Refuse what is no mapping, an unknown key (the nearest is named) and a missing one.

    Args:
        more: keys that stand elsewhere in the file, to name the one that is meant.
    """
    if not isinstance(tree, dict):
        raise ConfigError(where, tree, "must be a mapping of options")
    for key in tree:
        if key not in known:
            raise ConfigError(
                f"{where} {key}".strip(), "", f"is not an option; {hint(key, [*known, *more])}"
            )
    for key in needed:
        if key not in tree:
            raise ConfigError(f"{where} {key}".strip(), "", "is needed")


def read_record(kind: type, tree: Any, where: str) -> Any:
    """A dataclass from a file's mapping: int, float, bool, str and tuple fields, each checked.

    Raises:
        ConfigError: for a key that is unknown, missing, of the wrong kind or out of its limits.
    """
    items = {item.name: item for item in fields(kind)}
    needed = [n for n, item in items.items() if item.default is MISSING]
    check_keys(tree, items, needed, where)
    declared, values = get_type_hints(kind), {}
    for key, value in tree.items():
        values[key] = _value(declared[key], value, f"{where} {key}")
        if "limits" in items[key].metadata and value is not None:
            check_number(f"{where} {key}", value, *items[key].metadata["limits"])
    return kind(**values)


def _value(declared: Any, value: Any, where: str) -> Any:
    """A field's value, of its declared type."""
    origin, args = get_origin(declared), get_args(declared)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is UnionType:
        return None if value is None else _value(args[0], value, where)
    if declared == tuple[float, float]:
        return read_prices(value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(where, value, "must be a list")
        return tuple(_value(args[0], item, where) for item in value)
    wanted = {
        int: (number and isinstance(value, int) and 0 <= value < 10**10, "a whole number from 0"),
        float: (number, "a number"),
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "text"),
    }
    right, words = wanted.get(declared, (True, ""))
    if origin is Literal:
        right, words = value in args, f"one of {', '.join(args)}"
    if not right:
        raise ConfigError(where, value, f"must be {words}")
    return value


# ----------------------------------------------------------------------------------------- figures

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(value: float, unit: str = "") -> str:
    """`1.23 GB` style: three digits and a decimal prefix; a small figure is no power of ten."""
    for limit, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * limit:
            return f"{_three(value / limit)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def _three(value: float) -> str:
    """Three digits without an exponent; below a hundredth, that it is less."""
    if value and abs(value) < 0.01:
        return "<0.01"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours, days or years, whichever a person would say."""
    for limit, size, word in (
        (1e-3, 1e-6, "us"),
        (1.0, 1e-3, "ms"),
        (120.0, 1.0, "s"),
        (7200.0, 60.0, "min"),
        (48 * 3600.0, 3600.0, "h"),
        (2 * 365 * 86400.0, 86400.0, "days"),
    ):
        if seconds < limit:
            return f"{_three(seconds / size)} {word}"
    return f"{_three(seconds / (365 * 86400.0))} years"


def percent(share: float) -> str:
    """A share in percent, with as many digits as it needs near 0."""
    value = 100 * share
    return f"{value:.1f}%" if value >= 0.095 or not value else f"{_three(value)}%"
