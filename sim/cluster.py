"""Accelerators, sites and their links: what a run would be placed on.

A cluster is a YAML file, or the flags of the command line for equal sites. Unknown keys, negative
prices and zero bandwidths are refused in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from fomoe_sim.trainer import (
    ConfigError,
    NonNegativeFloat,
    Options,
    hint,
    read_data,
    read_yaml,
    stamp,
)
from fomoe_sim.units import MOST_SITES, MOST_USD, read_rate, read_up_down

# Defaults, each with its source; `fomoe project --explain` prints them.
EFFICIENCY = 1 / 1.15  # shaped TCP links measured at 1.15 x ring bytes (diloco-measured, 4 sites)
SYNC_FIXED_S = 0.07  # the same measurement's fixed cost per sync
RTT_S = 0.04  # light in 4,000 km of fibre and back at 200,000 km/s
EGRESS_PER_GB = (0.0, 0.09)  # neoclouds charge nothing; AWS's first Internet tier (2026)
NO_LIMIT = 10**9  # experts per layer of a site without a stated capacity


class AcceleratorFile(Options):
    """One accelerator, as a data file or `accelerators:` of a cluster file states it.

    peak_flops: dense bf16 FLOP/s; peak_fp32_flops: where products run in fp32. memory_bytes and
    memory_bandwidth (bytes/s) are the device's. nvlink and nic: bytes/s in one direction, to the
    others of its node and to other nodes. node: accelerators that share NVLink. host_bytes: of a
    server, per accelerator. watts: the board's limit. price_per_hour: USD, low and high. products,
    experts, scores: share of peak of matrix products, of routed experts' and of attention's scores;
    tile_rows: rows that a group of an expert's rows wastes (`fomoe project --explain`).
    """

    peak_flops: Annotated[float, Field(ge=1e6, le=1e20)]
    peak_fp32_flops: Annotated[float, Field(ge=1e6, le=1e20)]
    memory_bytes: Annotated[float, Field(ge=1e6, le=1e15)]
    memory_bandwidth: Annotated[float, Field(ge=1e6, le=1e17)]
    nvlink: Annotated[float, Field(ge=1e6, le=1e17)]
    nic: Annotated[float, Field(ge=1e5, le=1e17)]
    node: Annotated[int, Field(ge=1, le=1024)]
    host_bytes: Annotated[float, Field(ge=1e6, le=1e16)]
    watts: Annotated[float, Field(ge=0, le=1e6)]
    price_per_hour: Annotated[tuple[float, float], Field(strict=False)]
    products: Annotated[float, Field(gt=0.01, le=1)] = 0.60
    experts: Annotated[float, Field(gt=0.01, le=1)] = 0.60
    scores: Annotated[float, Field(gt=0.01, le=1)] = 0.35
    tile_rows: Annotated[float, Field(ge=0, le=1e6)] = 64.0
    source: str


class Accelerator(AcceleratorFile):
    """The same with its name."""

    name: str


def accelerator_names() -> list[str]:
    """Names of our own table."""
    return list(read_data("accelerators")["accelerators"])


def accelerator_preset(
    name: str, field: str = "--accelerator", *, own: dict[str, Accelerator] | None = None
) -> Accelerator:
    """The accelerator of that name, any case; `own` are a cluster file's.

    Raises:
        ConfigError: if there is none; lists the nearest.
    """
    if own and name in own:
        return own[name]
    if name.upper() not in accelerator_names():
        known = hint(name, [*(own or {}), *accelerator_names()])
        raise ConfigError(field, name, f"is not an accelerator preset; {known}")
    return _preset(name.upper())


@lru_cache(maxsize=32)
def _preset(name: str) -> Accelerator:
    return _accelerator(name, AcceleratorFile(**read_data("accelerators")["accelerators"][name]))


def _accelerator(name: str, file: AcceleratorFile) -> Accelerator:
    _range(file.price_per_hour, f"accelerators.{name}.price_per_hour")
    return Accelerator(name=name, **file.model_dump())


def price_kinds() -> dict[str, tuple[float, float]]:
    """Share of the on-demand price of each kind of contract, low and high."""
    kinds = read_data("accelerators")["kinds"]
    return {name: (kind["share"][0], kind["share"][1]) for name, kind in kinds.items()}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site.

    Attributes:
        count: accelerators.
        up_bps, down_bps: link to the other sites, bit/s.
        price_per_hour: low and high USD per accelerator-hour, of the contract asked about.
        egress_per_gb: low and high USD per 1e9 bytes sent.
        host_bytes: host memory of the whole site.
        capacity: experts per layer that it may hold; None: no limit.
        uplink: name of a link that it shares with other sites, or None.
    """

    name: str
    accelerator: Accelerator
    count: int
    up_bps: float
    down_bps: float
    price_per_hour: tuple[float, float]
    egress_per_gb: tuple[float, float]
    host_bytes: float
    capacity: int | None = None
    uplink: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Sites and what their links have in common.

    Attributes:
        rtt_s: round-trip time between sites.
        efficiency: share of a link's nominal rate that a sync reaches.
        sync_fixed_s: time of every sync beside its bytes.
        uplinks: rate of each shared uplink, bit/s, both ways.
    """

    name: str
    sites: tuple[Site, ...]
    rtt_s: float = RTT_S
    efficiency: float = EFFICIENCY
    sync_fixed_s: float = SYNC_FIXED_S
    uplinks: tuple[tuple[str, float], ...] = ()

    @property
    def num_sites(self) -> int:
        return len(self.sites)

    @property
    def capacities(self) -> tuple[int, ...] | None:
        """Experts per layer of each site, if any site states a limit."""
        if all(site.capacity is None for site in self.sites):
            return None
        return tuple(NO_LIMIT if s.capacity is None else s.capacity for s in self.sites)

    @cached_property
    def own_bps(self) -> NDArray[np.float64]:
        """Rates of the sites' own links, [2, K]: up and down."""
        return np.array([[s.up_bps for s in self.sites], [s.down_bps for s in self.sites]])

    @cached_property
    def counts(self) -> NDArray[np.float64]:
        """Accelerators of each site, [K]."""
        return np.array([site.count for site in self.sites], np.float64)

    @property
    def equal(self) -> bool:
        """Whether all sites have equally many of one accelerator."""
        return len({(site.accelerator, site.count) for site in self.sites}) == 1

    @property
    def bandwidth_bps(self) -> float:
        """The slowest own link, bit/s: what `bandwidth` means in a row."""
        return float(self.own_bps.min())

    @cached_property
    def uplink_members(self) -> tuple[list[int], ...]:
        """The sites behind each shared uplink."""
        return tuple(
            [i for i, site in enumerate(self.sites) if site.uplink == name]
            for name, _ in self.uplinks
        )

    def at_share(self, share: tuple[float, float]) -> Cluster:
        """The same cluster at a share of every site's prices, low and high."""
        sites = tuple(
            replace(
                s, price_per_hour=(s.price_per_hour[0] * share[0], s.price_per_hour[1] * share[1])
            )
            for s in self.sites
        )
        return replace(self, sites=sites)

    def with_bandwidth(self, up_bps: float, down_bps: float) -> Cluster:
        """The same cluster with every site's own link replaced."""
        sites = tuple(replace(site, up_bps=up_bps, down_bps=down_bps) for site in self.sites)
        return replace(self, sites=sites)


@lru_cache(maxsize=1024)
def uniform_cluster(
    num_sites: int,
    *,
    accelerator: str,
    count: int,
    up_bps: float,
    down_bps: float,
    price: tuple[float, float] | None = None,
) -> Cluster:
    """Equal sites, from the command line's flags."""
    device = accelerator_preset(accelerator)
    sites = tuple(
        Site(
            name=f"site-{i}",
            accelerator=device,
            count=count,
            up_bps=up_bps,
            down_bps=down_bps,
            price_per_hour=price or device.price_per_hour,
            egress_per_gb=EGRESS_PER_GB,
            host_bytes=count * device.host_bytes,
        )
        for i in range(num_sites)
    )
    return Cluster(name=f"{num_sites} x {count} {device.name}", sites=sites)


# ------------------------------------------------------------------------------------------- YAML

RangeOrNumber = NonNegativeFloat | Annotated[tuple[float, float], Field(strict=False)]
Milliseconds = Annotated[float, Field(ge=0, le=1e6)]


class SiteFile(Options):
    """One entry of `sites`."""

    name: str
    accelerator: str
    count: Annotated[int, Field(ge=1, le=10**6)]
    link: str | float | None = None  # both ways, or UP/DOWN
    up: str | float | None = None
    down: str | float | None = None
    price_per_hour: RangeOrNumber | None = None  # USD per accelerator; null: list prices
    egress_per_gb: RangeOrNumber | None = None  # USD; null: none to AWS's first tier
    host_memory_gb: Annotated[float, Field(gt=0, le=1e9)] | None = (
        None  # of the site; null: the usual server's
    )
    capacity: Annotated[int, Field(ge=1, le=NO_LIMIT)] | None = None  # experts per layer
    uplink: str | None = None


class ClusterFile(Options):
    """A cluster description."""

    name: str | None = None
    accelerators: dict[str, AcceleratorFile] = Field(default_factory=dict)
    rtt_ms: Milliseconds = 1000 * RTT_S
    efficiency: Annotated[float, Field(ge=1e-6, le=1)] = EFFICIENCY
    sync_fixed_s: Annotated[float, Field(ge=0, le=1e6)] = SYNC_FIXED_S
    shared_uplinks: dict[str, str | float] = Field(default_factory=dict)
    sites: Annotated[tuple[SiteFile, ...], Field(strict=False, min_length=1, max_length=MOST_SITES)]


def load_cluster(path: str) -> Cluster:
    """A cluster description, read once per version of its file."""
    return _load_cluster(path, stamp(path))


@lru_cache(maxsize=16)
def _load_cluster(path: str, _: int) -> Cluster:
    return read_cluster(path)


def read_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster description.

    Raises:
        ConfigError: one line with the field, the value and the rule.
    """
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise ConfigError("--cluster", error.value, error.rule) from None
    try:
        file = ClusterFile.model_validate(tree)
    except ValidationError as error:
        raise _problem(error) from None
    uplinks = {n: read_rate(r, f"shared_uplinks.{n}") for n, r in file.shared_uplinks.items()}
    names = [site.name for site in file.sites]
    if len(set(names)) != len(names):
        raise ConfigError("sites", names, "must have different names")
    own = {name: _accelerator(name, entry) for name, entry in file.accelerators.items()}
    return Cluster(
        name=file.name or Path(path).stem,
        sites=tuple(_site(entry, f"sites.{entry.name}", uplinks, own) for entry in file.sites),
        rtt_s=file.rtt_ms / 1000,
        efficiency=file.efficiency,
        sync_fixed_s=file.sync_fixed_s,
        uplinks=tuple(uplinks.items()),
    )


def _site(
    entry: SiteFile, field: str, uplinks: dict[str, float], own: dict[str, Accelerator]
) -> Site:
    device = accelerator_preset(entry.accelerator, f"{field}.accelerator", own=own)
    _check_link(entry, field)
    if entry.link is not None:
        up, down = read_up_down(entry.link, f"{field}.link")
    else:
        up, down = read_rate(entry.up, f"{field}.up"), read_rate(entry.down, f"{field}.down")
    if entry.uplink is not None and entry.uplink not in uplinks:
        known = hint(entry.uplink, uplinks) if uplinks else "none are given"
        raise ConfigError(f"{field}.uplink", entry.uplink, f"is not in shared_uplinks: {known}")
    host = 1e9 * entry.host_memory_gb if entry.host_memory_gb else entry.count * device.host_bytes
    prices = _range(entry.price_per_hour, f"{field}.price_per_hour") or device.price_per_hour
    return Site(
        name=entry.name,
        accelerator=device,
        count=entry.count,
        up_bps=up,
        down_bps=down,
        price_per_hour=prices,
        egress_per_gb=_range(entry.egress_per_gb, f"{field}.egress_per_gb") or EGRESS_PER_GB,
        host_bytes=host,
        capacity=entry.capacity,
        uplink=entry.uplink,
    )


def _check_link(entry: SiteFile, field: str) -> None:
    both = "link for both directions, or up and down"
    for name in ("up", "down"):
        value = getattr(entry, name)
        if entry.link is not None and value is not None:
            raise ConfigError(
                f"{field}.{name}", value, f"contradicts link {entry.link}: give {both}"
            )
        if entry.link is None and value is None:
            raise ConfigError(f"{field}.{name}", "", f"is missing: give {both}")


def _range(value: Any, field: str) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = value if isinstance(value, tuple) else (value, value)
    if not 0 <= low <= high <= MOST_USD:
        rule = f"must be two prices, 0 <= low <= high <= {MOST_USD:g}"
        raise ConfigError(field, [low, high], rule)
    return low, high


def _problem(error: ValidationError) -> ConfigError:
    """The first problem as one line; an unknown key names the nearest valid one."""
    problems = error.errors()
    # A misspelt option also leaves its right name missing; the misspelling is the cause.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = [str(part) for part in problem["loc"] if not str(part).startswith(("tuple", "constr"))]
    field = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = [*SiteFile.model_fields, *ClusterFile.model_fields, *AcceleratorFile.model_fields]
        near = hint(place[-1], known)
        return ConfigError(field, "", f"is not an option of a cluster; {near}")
    if problem["type"] == "missing":
        return ConfigError(field, "", "is needed")
    if problem["type"] == "too_short":
        return ConfigError(field, "[]", "must have at least one entry")
    rule = problem["msg"].replace("Input should be", "must be").replace("'", "")
    return ConfigError(field, problem["input"], rule)
