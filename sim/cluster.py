"""Accelerators, sites and their links: what a run would be placed on.

A cluster is a YAML file, or the flags of the command line for equal sites. Unknown keys, negative
prices and zero bandwidths are refused in one line.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_sim.options import MOST_SITES
from fomoe_sim.trainer import ConfigError, hint, read_data, read_yaml, stamp
from fomoe_sim.units import check_keys, read_rate, read_record, read_up_down, within

# Defaults, each with its source; `fomoe project --explain` prints them.
EFFICIENCY = 1 / 1.15  # shaped TCP links measured at 1.15 x ring bytes (diloco-measured, 4 sites)
SYNC_FIXED_S = 0.07  # the same measurement's fixed cost per sync
RTT_MS = 40.0  # light in 4,000 km of fibre and back at 200,000 km/s
EGRESS_PER_GB = (0.0, 0.09)  # neoclouds charge nothing; AWS's first Internet tier (2026)
NO_LIMIT = 10**9  # experts per layer of a site without a stated capacity


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator, with the keys of `sim/data/accelerators.yaml` and of a cluster file.

    Attributes:
        peak_flops, peak_fp32_flops, peak_fp8_flops: dense FLOP/s in bf16, fp32 and fp8; 0: no fp8.
        memory_bytes, memory_bandwidth: of the device, bytes and bytes/s.
        nvlink, nic: bytes/s in one direction, to the others of its node and to other nodes.
        node: accelerators that share NVLink.
        host_bytes: of a server, per accelerator.
        watts: the board's limit.
        price_per_hour: USD, low and high.
        products, experts, scores: share of peak of matrix products, of routed experts' and of
            attention's scores.
        tile_rows: rows that a group of an expert's rows wastes.
    """

    name: str
    peak_flops: float = within(1e6, 1e20)
    peak_fp32_flops: float = within(1e6, 1e20)
    peak_fp8_flops: float = within(0, 1e20, 0.0)
    memory_bytes: float = within(1e6, 1e15)
    memory_bandwidth: float = within(1e6, 1e17)
    nvlink: float = within(1e6, 1e17)
    nic: float = within(1e5, 1e17)
    node: int = within(1, 1024)
    host_bytes: float = within(1e6, 1e16)
    watts: float = within(0, 1e6)
    price_per_hour: tuple[float, float]
    products: float = within(0.01, 1, 0.60)
    experts: float = within(0.01, 1, 0.60)
    scores: float = within(0.01, 1, 0.35)
    tile_rows: float = within(0, 1e6, 64.0)
    source: str


ACCELERATOR = tuple(item.name for item in fields(Accelerator))


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
    tree = read_data("accelerators")["accelerators"][name]
    preset: Accelerator = read_record(Accelerator, {"name": name, **tree}, name)
    return preset


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
        host_memory_gb: of the whole site; None: the usual server's.
        capacity: experts per layer that it may hold; None: no limit.
        uplink: name of a link that it shares with other sites, or None.
    """

    name: str
    accelerator: Accelerator
    count: int = within(1, 10**6)
    up_bps: float
    down_bps: float
    price_per_hour: tuple[float, float]
    egress_per_gb: tuple[float, float]
    host_memory_gb: float | None = within(1e-3, 1e9, None)
    capacity: int | None = within(1, NO_LIMIT, None)
    uplink: str | None = None

    @property
    def host_bytes(self) -> float:
        """Host memory of the whole site."""
        own = self.host_memory_gb
        return self.count * self.accelerator.host_bytes if own is None else 1e9 * own


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Sites and what their links have in common.

    Attributes:
        rtt_ms: round-trip time between sites.
        jitter_ms, loss: how far a packet's delay varies, and the share of packets that is lost. A
            projection does not use them (`efficiency` holds what they cost); an emulation does.
        efficiency: share of a link's nominal rate that a sync reaches.
        sync_fixed_s: time of every sync beside its bytes.
        uplinks: rate of each shared uplink, bit/s, both ways.
    """

    name: str
    sites: tuple[Site, ...]
    rtt_ms: float = within(0, 1e6, RTT_MS)
    jitter_ms: float = within(0, 1e6, 0.0)
    loss: float = within(0, 0.5, 0.0)
    efficiency: float = within(1e-6, 1, EFFICIENCY)
    sync_fixed_s: float = within(0, 1e6, SYNC_FIXED_S)
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

    def at_share(self, low: float, high: float) -> Cluster:
        """The same cluster at a share of every site's prices."""
        prices = [(low * s.price_per_hour[0], high * s.price_per_hour[1]) for s in self.sites]
        sites = (
            replace(site, price_per_hour=price)
            for site, price in zip(self.sites, prices, strict=True)
        )
        return replace(self, sites=tuple(sites))

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
    price: float | None = None,
) -> Cluster:
    """Equal sites, from the command line's flags."""
    device = accelerator_preset(accelerator)
    site = Site(
        name="site",
        accelerator=device,
        count=count,
        up_bps=up_bps,
        down_bps=down_bps,
        price_per_hour=device.price_per_hour if price is None else (price, price),
        egress_per_gb=EGRESS_PER_GB,
    )
    sites = tuple(replace(site, name=f"site-{i}") for i in range(num_sites))
    return Cluster(name=f"{num_sites} x {count} {device.name}", sites=sites)


# ------------------------------------------------------------------------------------------- YAML

# Keys of a file, and of one entry of its `sites`: a link is stated both ways, or up and down.
COMMON = ("rtt_ms", "jitter_ms", "loss", "efficiency", "sync_fixed_s")
FILE = ("name", *COMMON, "shared_uplinks", "accelerators", "sites")
STATED = ("name", "accelerator", "count", "price_per_hour", "egress_per_gb", "host_memory_gb")
ENTRY = (*STATED, "link", "up", "down", "capacity", "uplink")


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
    check_keys(tree, FILE, ("sites",), "", more=ENTRY)
    entries = tree.get("sites")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST_SITES:
        raise ConfigError("sites", entries, f"must be a list of 1 to {MOST_SITES} sites")
    uplinks, own = (_mapping(tree, key) for key in ("shared_uplinks", "accelerators"))
    uplinks = {name: read_rate(rate, f"shared_uplinks.{name}") for name, rate in uplinks.items()}
    for name, entry in own.items():
        where = f"accelerators.{name}"
        check_keys(entry, ACCELERATOR, (), where)
        own[name] = read_record(Accelerator, {"name": name, **entry}, where)
    sites = tuple(_site(entry, i, uplinks, own) for i, entry in enumerate(entries))
    names = [site.name for site in sites]
    if len(set(names)) != len(names):
        raise ConfigError("sites", names, "must have different names")
    common = {key: tree[key] for key in COMMON if key in tree}
    found: Cluster = read_record(
        Cluster, {"name": tree.get("name") or Path(path).stem, "sites": sites, **common}, ""
    )
    return replace(found, uplinks=tuple(uplinks.items()))


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    found = tree.get(key) or {}
    if not isinstance(found, dict):
        raise ConfigError(key, found, "must be a mapping by name")
    return dict(found)


def _site(tree: Any, index: int, uplinks: dict[str, float], own: dict[str, Accelerator]) -> Site:
    where = f"sites.{tree.get('name', index) if isinstance(tree, dict) else index}"
    check_keys(tree, ENTRY, ("name", "accelerator", "count"), where, more=FILE)
    device = accelerator_preset(str(tree["accelerator"]), f"{where} accelerator", own=own)
    given = {key: value for key, value in tree.items() if value is not None}
    link, both = given.get("link"), "link for both directions, or up and down"
    for name in ("up", "down"):
        if link is not None and name in given:
            rule = f"contradicts link {link}: give {both}"
            raise ConfigError(f"{where} {name}", given[name], rule)
        if link is None and name not in given:
            raise ConfigError(f"{where} {name}", "", f"is missing: give {both}")
    if link is not None:
        up, down = read_up_down(link, f"{where} link")
    else:
        up, down = (read_rate(given[name], f"{where} {name}") for name in ("up", "down"))
    uplink = given.get("uplink")
    if uplink is not None and str(uplink) not in uplinks:
        known = hint(str(uplink), uplinks) if uplinks else "none are given"
        raise ConfigError(f"{where} uplink", uplink, f"is not in shared_uplinks: {known}")
    usual = {"price_per_hour": device.price_per_hour, "egress_per_gb": EGRESS_PER_GB}
    stated = {key: value for key, value in given.items() if key not in ("link", "up", "down")}
    found = {"accelerator": device, "up_bps": up, "down_bps": down}
    site: Site = read_record(Site, usual | stated | found, where)
    return site
