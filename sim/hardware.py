"""Accelerators and links by name, with their sources, and sizes as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import sqrt

from fomoe.errors import ConfigError
from fomoe.hints import hint


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator.

    Attributes:
        peak_flops: dense bf16 FLOP/s with fp32 accumulation.
        peak_fp32_flops: FLOP/s where products are computed in fp32, without tensor cores.
        memory_bytes: device memory.
        memory_bandwidth: bytes/s.
        host_bytes: host memory per accelerator in the usual server.
        price_per_hour: lowest and highest list price, USD.
        source: of the figures; prices move, so runs should state their own.
    """

    name: str
    peak_flops: float
    peak_fp32_flops: float
    memory_bytes: float
    memory_bandwidth: float
    host_bytes: float
    price_per_hour: tuple[float, float]
    source: str


_DGX = "datasheet, host memory of an 8-GPU DGX server"
_MERCATUS = "prices: mercatus-ai.com/blog/cloud-gpu-pricing, May 2026"

_ACCELERATORS = (
    Accelerator(
        name="A100",
        peak_flops=312e12,
        peak_fp32_flops=19.5e12,
        memory_bytes=80e9,
        memory_bandwidth=2.039e12,
        host_bytes=128e9,
        price_per_hour=(0.80, 3.00),
        source=f"A100 80GB SXM {_DGX}; {_MERCATUS}",
    ),
    Accelerator(
        name="H100",
        peak_flops=989e12,
        peak_fp32_flops=66.9e12,
        memory_bytes=80e9,
        memory_bandwidth=3.35e12,
        host_bytes=256e9,
        price_per_hour=(1.99, 5.00),
        source=f"H100 SXM {_DGX}; {_MERCATUS}",
    ),
    Accelerator(
        name="H800",
        peak_flops=989e12,
        peak_fp32_flops=66.9e12,
        memory_bytes=80e9,
        memory_bandwidth=3.35e12,
        host_bytes=256e9,
        price_per_hour=(2.00, 2.00),
        source="as H100 SXM; price: DeepSeek-V3 (arXiv 2412.19437, table 1)",
    ),
    Accelerator(
        name="H200",
        peak_flops=989e12,
        peak_fp32_flops=66.9e12,
        memory_bytes=141e9,
        memory_bandwidth=4.8e12,
        host_bytes=256e9,
        price_per_hour=(2.50, 7.00),
        source=f"H200 SXM {_DGX}; {_MERCATUS}",
    ),
    Accelerator(
        name="B200",
        peak_flops=2250e12,
        peak_fp32_flops=75e12,
        memory_bytes=180e9,
        memory_bandwidth=7.7e12,
        host_bytes=256e9,
        price_per_hour=(2.65, 14.24),
        source=f"HGX B200 {_DGX}; fp32: 148 SMs x 128 x 2 x 1.98 GHz (others state 80e12); "
        "prices: inworld.ai/resources/nvidia-b200-gpu-cloud, April 2026",
    ),
    Accelerator(
        name="L40S",
        peak_flops=362e12,
        peak_fp32_flops=91.6e12,
        memory_bytes=48e9,
        memory_bandwidth=0.864e12,
        host_bytes=48e9,
        price_per_hour=(0.86, 2.25),
        source="datasheet, host memory assumed equal to the card's; prices: "
        "modal.com/blog/nvidia-l40s-price-article, August 2025",
    ),
)
ACCELERATORS = {item.name: item for item in _ACCELERATORS}


def accelerator_preset(name: str, field: str = "--accelerator") -> Accelerator:
    """The accelerator of that name, any case.

    Raises:
        ConfigError: if there is none; names the nearest.
    """
    found = ACCELERATORS.get(name.upper())
    if found is None:
        rule = f"is not an accelerator preset; {hint(name, ACCELERATORS)}"
        raise ConfigError(field, name, rule)
    return found


def central(low_high: tuple[float, float]) -> float:
    """Geometric mean of a range, as far from both ends in ratio; from 0 on, the arithmetic mean."""
    low, high = low_high
    return sqrt(low * high) if low else high / 2


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_NUMBER = r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)"
_RATE = re.compile(_NUMBER + r"\s*([kmgt]?)((?:bits?|b)?(?:/s|ps)?)", re.IGNORECASE)
# Links people name by their product: nominal rates.
LINKS = {"fast-ethernet": 100e6, "gigabit": 1e9, "10gbe": 10e9, "100gbe": 100e9}
SLOWEST_BPS, FASTEST_BPS = 1.0, 1e18


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
        rule = f"is not a link or a rate such as 1Gbit or 100Mbit; {hint(word, LINKS)}"
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
