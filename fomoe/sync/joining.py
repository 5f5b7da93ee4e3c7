"""Opening a transport: connect to the store at site 0's address, then join the other sites.

Every wait ends at the deadline (`sync.timeout_s`) or at a signal. A mistake of this site alone is
reported before the first wait.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fomoe.errors import ConfigError, SyncError
from fomoe.launch import Launch
from fomoe.ranks import ONE_RANK
from fomoe.sync import waiting
from fomoe.sync.gloo import GlooTransport, open_interface
from fomoe.sync.inside import SiteRanks
from fomoe.sync.lanes import Lanes
from fomoe.sync.membership import Membership
from fomoe.sync.transport import InMemoryTransport, Transport
from fomoe.sync.waiting import in_thread, one_line, say

_CONNECT_S = 5.0  # longest wait for one attempt to connect
_RETRY_S = 0.2
_LINGER_S = 1.0  # time for the others to read why this site ends
_ANSWER_S = 10.0  # longest wait for a store's first answer, once connected

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface

# An address as getaddrinfo and connect use it: family and socket address.
Address = tuple[int, Any]


def open_transport(
    launch: Launch,
    num_sites: int,
    *,
    lanes: Callable[[Sequence[int]], Sequence[tuple[int, ...]]],
    timeout_s: float,
    join_s: float | None = None,
    interface: str | None = None,
    parallel: str = "none",
    device: torch.device | None = None,
) -> Transport:
    """A transport for this process: all sites in memory, or this site over gloo.

    Args:
        lanes: from the number of ranks of every site, the rank that each lane has at every site.
        join_s: longest wait for all sites to join; None: `timeout_s`.
        parallel: `inner.parallel`, for a site of several ranks.
        device: where its model will be; None: the CPU.

    Raises:
        ConfigError: if the launch does not fit this machine.
        SyncError: if the sites do not all join in time.
    """
    if not launch.distributed:
        return InMemoryTransport(range(num_sites))
    assert launch.num_sites == num_sites
    open_interface(interface)
    join_s = timeout_s if join_s is None else join_s
    end = time.monotonic() + join_s
    addresses = resolve(launch.address, launch.port, join_s)
    hosts_store = launch.first and not launch.agent_store
    if hosts_store:
        store, own = host_store(launch, addresses, interface)
    else:
        store, own = reach_store(launch, addresses, join_s)
    prefix, inside = f"attempt-{launch.attempt}", ONE_RANK
    if launch.ranks > 1:
        inside = SiteRanks(
            dist.PrefixStore(f"{prefix}/inside-{launch.site}", store),
            launch.rank,
            launch.ranks,
            parallel=parallel,
            device=device or torch.device("cpu"),
            join_s=end - time.monotonic(),
            # A sibling may wait that long for another site before it comes.
            timeout_s=2 * timeout_s,
        )
    if num_sites == 1:
        return InMemoryTransport(range(1), inside)
    opened: list[GlooTransport] = []

    def open_lane(number: int) -> None:
        lane = GlooTransport(
            store,
            range(num_sites),
            launch.site,
            timeout_s=timeout_s,
            join_s=end - time.monotonic(),
            interface=interface,
            prefix=f"{prefix}/{number}",
            inside=inside,
            place=f"{socket.gethostname()}, {own}",
            hosts_store=hosts_store,
        )
        opened.append(lane)

    try:
        if launch.rank == 0:  # all first ranks are a lane, the first one
            open_lane(0)
            meeting = opened[0].membership
        else:
            meeting = Membership(
                dist.PrefixStore(f"{prefix}/0", store), range(num_sites), launch.site
            )
            meeting.wait(end - time.monotonic())
        counts = [meeting.ranks_of[site] for site in range(num_sites)]
        for number, ranks in enumerate(lanes(counts)):
            if ranks[launch.site] == launch.rank and number:
                open_lane(number)
    except SyncError as error:
        for lane in opened:
            lane.close(str(error))
        raise SyncError(f"{error} (the sites meet at {launch.where})") from error
    return opened[0] if len(opened) == 1 else Lanes(opened)


def resolve(name: str, port: int, timeout_s: float) -> list[Address]:
    """Addresses of a host name.

    Raises:
        ConfigError: if it has none.
    """
    try:
        found = in_thread(
            lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM), timeout_s=timeout_s
        )
    except (OSError, UnicodeError, TimeoutError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError("MASTER_ADDR", name, f"cannot be resolved: {reason}") from None
    return [(family, address) for family, _, _, _, address in found]


def host_store(
    launch: Launch, addresses: list[Address], interface: str | None
) -> tuple[dist.Store, str]:
    """Listen for the other sites; only on the interface, if the address belongs to it.

    Returns:
        The store, and this site's address.

    Raises:
        ConfigError: if the port is taken, or the address does not lead to this machine.
    """
    inside = [(f, a) for f, a in addresses if a[0] in interface_addresses(interface)]
    if interface is not None and not inside:
        say(
            launch.site,
            f"MASTER_ADDR {launch.address} is not an address of --interface {interface}, so the "
            f"sites' store listens on all addresses of this machine",
        )
    try:
        listener = _listen(inside[0] if inside else None, launch.port)
    except OSError as error:
        rule = f"cannot be opened on this machine: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            rule = "is in use on this machine: is another run, or another site 0, started here?"
        raise ConfigError("MASTER_PORT", launch.port, rule) from None
    with listener:
        own, reason = _connect(addresses)
        if not own:
            rule = f"does not lead to this machine, which is site 0: {reason}"
            raise ConfigError("MASTER_ADDR", launch.address, rule)
        return _open_store(launch, listener.detach()), own


def reach_store(
    launch: Launch, addresses: list[Address], timeout_s: float
) -> tuple[dist.Store, str]:
    """Connect to the store at site 0, which may start later than this site.

    Returns:
        The store, and the address from which this site reaches it.

    Raises:
        SyncError: at the timeout.
    """
    started, said = time.monotonic(), False
    while True:
        own, reason = _connect(addresses)
        if own:
            return _open_store(launch, None), own
        waited = time.monotonic() - started
        if waited > timeout_s:
            raise SyncError(
                f"no answer from site 0 at {launch.where} within {timeout_s:g} s ({reason}); is "
                f"site 0 started, and is this address open to this site?"
            )
        if waited > waiting.PATIENCE_S and not said:
            said = True
            text = f"waiting for site 0 at {launch.where} ({reason}), up to {timeout_s:g} s"
            say(launch.site, text)
        time.sleep(_RETRY_S)


def interface_addresses(interface: str | None) -> set[str]:
    """IPv4 and IPv6 addresses of a network interface of this machine, as Linux lists them."""
    found: set[str] = set()
    if interface is None:
        return found
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        found.add(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if name == interface:
                found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def _listen(address: Address | None, port: int) -> socket.socket:
    if address is not None:
        family, place = address
        return socket.create_server(place, family=family)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _connect(addresses: list[Address]) -> tuple[str, str]:
    """Try to connect once; returns this site's address, or an empty one and the reason."""
    reason = ""
    for family, place in addresses:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_S)  # Python's own wait, which a signal ends
            try:
                probe.connect(place)
                return probe.getsockname()[0], ""
            except OSError as error:
                reason = error.strerror or str(error)
    return "", reason


def _open_store(launch: Launch, listener: int | None) -> dist.Store:
    """Open torch's store at an address where something listens.

    Raises:
        SyncError: if it is not a store.
    """
    limit = timedelta(seconds=_ANSWER_S)
    try:
        return in_thread(
            lambda: dist.TCPStore(
                launch.address,
                launch.port,
                None,
                listener is not None,
                limit,
                wait_for_workers=False,
                master_listen_fd=listener,
            ),
            timeout_s=_ANSWER_S,
        )
    except (RuntimeError, TimeoutError) as error:
        raise SyncError(
            f"no store of a run answers at {launch.where} ({one_line(error)}); does another "
            f"program listen there, or has site 0 just stopped?"
        ) from None
