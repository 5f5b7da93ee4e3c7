"""The links between the sites, measured before the first round, one pair of sites after the other.

Two sites send to each other at once, as in a sync. The message grows until it takes long enough to
tell the link's rate from its delay. What is sent here is in none of the run's byte counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fomoe.codecs import CODECS
from fomoe.copies import exchanged
from fomoe.planning import RunPlan
from fomoe.segments import Bucket, buckets_traffic
from fomoe.sync.exchange import gather
from fomoe.sync.transport import ByteCounts, Message, Transport

_WHAT = "measuring the links"
_PINGS = 4
_FIRST, _GROWTH, _MOST = 2**14, 4, 2**24  # bytes of a message
_ENOUGH_S = 0.08  # beyond the round trip: a message that took so long may be the last
_ENOUGH_RTTS = 4  # and so many more round trips
_STEADY = 1.25  # and its rate is no more than so much above the one before: TCP has found it
_BUDGET_S = 0.5  # of all messages of a pair; a larger one follows only before
_MOST_SITES = 8  # every pair takes about a second
_MOVES = 5  # a sync's exchanges: weights, parts, means, and the length and text of its checks


@dataclass(frozen=True, kw_only=True)
class Link:
    """Two sites and what joins them.

    Attributes:
        sites: the pair, ascending.
        rtt_s: round trip, seconds.
        rates: bytes/s from the first to the second, and back, while both send.
    """

    sites: tuple[int, int]
    rtt_s: float
    rates: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Links:
    """All links of a run.

    Attributes:
        pairs: of sites, in order.
        probe_bytes: what each site has sent to measure them.
    """

    pairs: tuple[Link, ...]
    probe_bytes: tuple[int, ...]

    def rate(self, source: int, target: int) -> float:
        """Bytes/s from one site to another."""
        pair = min(source, target), max(source, target)
        link = next(link for link in self.pairs if link.sites == pair)
        return link.rates[source > target]


def probes(probe: bool | None, transport: Transport) -> bool:
    """Whether the links are measured; null says so where the sites are few.

    Args:
        probe: `sync.probe`.
    """
    wanted = len(transport.members) <= _MOST_SITES if probe is None else probe
    return wanted and transport.remote and transport.inside.rank == 0


def measure_links(transport: Transport) -> Links:
    """Measure the link of every pair of sites; all members call it, with one rank each.

    Raises:
        SyncError: if an exchange failed.
    """
    (site,) = transport.sites
    pairs = list(combinations(transport.members, 2))
    own: dict[tuple[int, int], tuple[float, float]] = {}
    with _counted_apart(transport) as counts:
        for pair in pairs:
            if site in pair:
                own[pair] = _measure(transport, pair)
            # The others wait for it: two pairs at once could share a link.
            ready = torch.zeros(1, dtype=torch.uint8)
            others = [member for member in transport.members if member not in pair]
            transport.move(_WHAT, [_message(pair[0], other, ready) for other in others])
        rows = [(*pair, *found, counts.wire["probe"]) for pair, found in own.items()]
        found = gather(transport, lambda _: json.dumps(rows).encode())
    by_site = dict(zip(transport.members, map(json.loads, found), strict=True))
    seen = {(site, row[0], row[1]): row for site, rows in by_site.items() for row in rows}
    return Links(
        pairs=tuple(
            Link(
                sites=(a, b),
                rtt_s=min(seen[a, a, b][2], seen[b, a, b][2]),
                rates=(seen[b, a, b][3], seen[a, a, b][3]),  # each has timed what it received
            )
            for a, b in pairs
        ),
        probe_bytes=tuple(rows[0][4] for rows in by_site.values()),
    )


@contextmanager
def _counted_apart(transport: Transport) -> Iterator[ByteCounts]:
    """Counts of this process's site that start at 0 and are dropped at the end."""
    kept, own = dict(transport.counts), ByteCounts()
    transport.counts.update(dict.fromkeys(kept, own))
    try:
        yield own
    finally:
        transport.counts.update(kept)


def _measure(transport: Transport, pair: tuple[int, int]) -> tuple[float, float]:
    """Round trip in seconds, and bytes/s of what this site receives."""
    random = torch.Generator().manual_seed(0)  # of its own: the run's numbers stay the same
    rtt_s = min(_exchange(transport, pair, torch.zeros(1))[0] for _ in range(_PINGS))
    size, spent, before = _FIRST, 0.0, 0.0
    while True:
        # Random bytes, which a tunnel that compresses cannot make fewer.
        data = torch.randint(256, (size,), dtype=torch.uint8, generator=random)
        _exchange(transport, pair, torch.zeros(1))  # both are ready
        seconds, _ = _exchange(transport, pair, data)
        took = max(seconds - rtt_s, 0.1 * seconds)
        spent, rate = spent + took, size / took
        long_enough = took >= max(_ENOUGH_S, _ENOUGH_RTTS * rtt_s)
        enough = spent >= _BUDGET_S or (long_enough and rate <= _STEADY * before)
        _, theirs = _exchange(transport, pair, torch.tensor([enough]))
        if size == _MOST or enough or theirs:
            return rtt_s, max(rate, before)
        size, before = size * _GROWTH, rate


def _exchange(transport: Transport, pair: tuple[int, int], own: Tensor) -> tuple[float, Tensor]:
    """Send a tensor to the other site of the pair, and receive one; seconds, and the other's.

    Where both begin at once, it takes a round trip beside the transfer: a site sends when it has
    heard that the other is ready to receive.
    """
    started = time.perf_counter()
    moved = transport.move(_WHAT, [_message(a, b, own) for a, b in (pair, pair[::-1])])
    seconds = time.perf_counter() - started
    (site,) = transport.sites
    theirs = moved[0] if site == pair[1] else moved[1]
    assert theirs is not None
    return seconds, theirs


def _message(source: int, target: int, tensor: Tensor) -> Message:
    return Message(source, target, tensor, tuple(tensor.shape), tensor.dtype, "probe")


# ----------------------------------------------------------------------------- what follows of it


def sync_estimate(plan: RunPlan, links: Links) -> tuple[int, float]:
    """Bytes that the busiest site sends in one sync, and the seconds that a sync takes.

    With fragments it is the largest one's. A site's own line is as fast as its fastest link; the
    time of its peers, of the codec and of waiting for sites that begin later is not in it.
    """
    buckets = exchanged(plan.site_plan.buckets, plan.families, plan.phases[0].coupling)
    found = []
    for fragment in range(len(plan.fragments)):
        own = [b for b in buckets if b.fragment == fragment]
        flows = _flows(plan, own)
        sent = [sum(flows[a, b] for a, b in flows if a == site) for site in _sites(plan)]
        found.append((round(max(sent)), _transfer_s(flows, links, _sites(plan))))
    size, seconds = max(found)
    return size, seconds + _MOVES * max(link.rtt_s for link in links.pairs)


def _sites(plan: RunPlan) -> range:
    return range(plan.config.num_sites)


def _flows(plan: RunPlan, buckets: list[Bucket]) -> dict[tuple[int, int], float]:
    """Bytes from site to site in a sync of these buckets; each holder sends all others as much."""
    codec = CODECS[plan.config.sync.codec]
    flows = {(a, b): 0.0 for a in _sites(plan) for b in _sites(plan) if a != b}
    for bucket in buckets:
        for a in bucket.holders:
            wire = buckets_traffic([bucket], a, codec=codec).wire
            for b in bucket.holders:
                if a != b:
                    flows[a, b] += wire / (len(bucket.holders) - 1)
    return flows


def _transfer_s(flows: dict[tuple[int, int], float], links: Links, sites: range) -> float:
    """The longest of all links' and all sites' own transfers, seconds."""
    slowest = max(size / links.rate(a, b) for (a, b), size in flows.items())
    for site in sites:
        for end in (0, 1):  # what it sends, what it receives
            own = {pair: size for pair, size in flows.items() if pair[end] == site}
            slowest = max(slowest, sum(own.values()) / max(links.rate(*pair) for pair in own))
    return slowest


def links_line(plan: RunPlan, links: Links) -> str:
    """One line: the links, and what a sync costs on them."""
    size, seconds = sync_estimate(plan, links)
    shown = sorted(links.pairs, key=lambda link: min(link.rates))
    if len(shown) > 6:
        text = f"{len(shown)} pairs, slowest {_show(shown[0])}, fastest {_show(shown[-1])}"
    else:
        text = "site " + "; ".join(_show(link).removeprefix("site ") for link in links.pairs)
    return f"links: {text}; a sync of {size / 1e6:.3g} MB takes about {seconds:.2g} s"


def _show(link: Link) -> str:
    there, back = (f"{rate * 8 / 1e6:.3g}" for rate in link.rates)
    alike = min(link.rates) > 0.8 * max(link.rates)
    rate = f"{min(link.rates) * 8 / 1e6:.3g}" if alike else f"{there} and {back}"
    return f"site {link.sites[0]}-{link.sites[1]} {rate} Mbit/s, {link.rtt_s * 1e3:.2g} ms"


def links_record(plan: RunPlan, links: Links) -> dict[str, object]:
    """What `summary.json` has of the links."""
    size, seconds = sync_estimate(plan, links)
    return {
        "pairs": [
            {"sites": link.sites, "rtt_s": link.rtt_s, "bytes_per_s": link.rates}
            for link in links.pairs
        ],
        "sync_wire_bytes": size,
        "sync_s": seconds,
        "probe_bytes_by_site": links.probe_bytes,
    }
