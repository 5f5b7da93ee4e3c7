"""What the cost model takes from the trainer: errors, configs, placements, counted bytes.

No other file here imports from `fomoe`, so that what the two share can be read in one place.
Nothing of it needs torch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from fomoe.codecs import CODECS, FP32, Codec
from fomoe.config import ADAPTER_METHODS, Config
from fomoe.config import METHODS as CONFIG_METHODS
from fomoe.copies import site_config
from fomoe.errors import ConfigError, say_line
from fomoe.figures import SUFFIXES, Drawing, need_matplotlib
from fomoe.hints import hint
from fomoe.jsonlines import read_lines
from fomoe.kinds import by_capacity, capacity_slots
from fomoe.load import build_config, load_config
from fomoe.memory import SiteMemory
from fomoe.options import option_names
from fomoe.placement import Placement, build_placement
from fomoe.planning import plan_run
from fomoe.rules import check_ranks
from fomoe.segments import holder_bytes
from fomoe.yamlfile import read_yaml

__all__ = [
    "ADAPTER_METHODS",
    "CODECS",
    "CONFIG_METHODS",
    "FP32",
    "SUFFIXES",
    "Codec",
    "Config",
    "ConfigError",
    "Drawing",
    "Placement",
    "SiteMemory",
    "build_config",
    "build_placement",
    "can_train",
    "capacity_slots",
    "check_ranks",
    "codec_of",
    "fine_tunes",
    "hint",
    "holder_bytes",
    "load",
    "load_clients",
    "need_matplotlib",
    "plan_run",
    "read_data",
    "read_lines",
    "read_yaml",
    "say_line",
    "slots_placement",
    "stamp",
]

DATA = Path(__file__).parent / "data"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@lru_cache(maxsize=8)
def read_data(name: str) -> dict[str, Any]:
    """One of our own tables, `sim/data/<name>.yaml`."""
    text = (DATA / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=_LOADER)


def stamp(path: str) -> int:
    """When a file last changed, so that a cache never answers from an old one."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0  # the loader says what is wrong with it


def load(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """A config as `fomoe train` would run it, or refuse it.

    With copies of experts it is that of a site's model, which is what the sites store, compute and
    exchange until the copies part.

    Raises:
        ConfigError: also for a run with adapters, whose cost is not that of pre-training.
    """
    config = _load_at(path, overrides, stamp(path))
    if config.adapters.base is not None:
        rule = "is fine-tuned with adapters: fomoe project --config says what its clients send"
        raise ConfigError("adapters.base", config.adapters.base, rule)
    return config


def fine_tunes(path: str) -> bool:
    """Whether a config trains adapters on a frozen base."""
    return _load_at(path, (), stamp(path)).adapters.base is not None


def load_clients(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """The config of a run with adapters.

    Raises:
        ConfigError: if it cannot be used.
    """
    return _load_at(path, overrides, stamp(path))


@lru_cache(maxsize=512)
def _load_at(path: str, overrides: tuple[str, ...], _: int) -> Config:
    return site_config(load_config(path, overrides))


def slots_placement(
    num_sites: int, moe_layers: tuple[int, ...], num_experts: int, slots: tuple[int, ...]
) -> Placement:
    """Placement by how many experts of each layer a site takes."""
    table = by_capacity(len(moe_layers), num_experts, slots)
    return Placement(num_sites=num_sites, moe_layers=moe_layers, holders=table, trainers=table)


# What a plan may need of the trainer, and the option that has it where there is one.
_ABILITIES = {
    "bits": ("sync at these bits", ""),
    "fragments": ("fragments", "sync.fragments"),
    "overlap": ("overlap", "sync.overlap_steps"),
    "unequal_batches": ("a batch by each site's speed", "inner.batch_size_by_site"),
    "accelerators": ("several accelerators per site", "inner.parallel"),
    "unequal_accelerators": ("different numbers of accelerators per site", "inner.parallel"),
    "averaged_gradients": ("gradients averaged between sites of several accelerators", ""),
    "uneven_rows": ("experts whose rows a site's accelerators share unequally", ""),
    "adam": ("Adam states of 16 or 8 bits", ""),
    "mixed": ("bf16 weights with fp32 masters", ""),
    "fp8": ("products in fp8", ""),
}


@lru_cache(maxsize=1)
def _options() -> frozenset[str]:
    return frozenset(option_names(Config))


def can_train(*needs: str) -> list[str]:
    """Of the abilities named, those that `fomoe train` lacks, in words."""
    return [_ABILITIES[need][0] for need in needs if _ABILITIES[need][1] not in _options()]


def codec_of(bits: float) -> str | None:
    """The value of `sync.codec` that sends so many bits per element, with its scales or without."""
    return next((n for n, codec in CODECS.items() if bits in (codec.bits, codec.mean_bits)), None)
