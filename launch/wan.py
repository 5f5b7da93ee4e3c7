"""A run over emulated links: network namespaces, and a relay between their TUN devices.

`launch/wan.sh` starts it. The relay is a process that takes every packet from the sender's device
and hands it to the receiver's when the links of the cluster file would have: it waits for its turn
on the sender's way up, on the receiver's way down and on shared uplinks, and for half a round trip
with jitter. A packet that would wait longer than a queue holds is dropped, as a router drops it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import heapq
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe.cli import load
from fomoe_sim.cluster import Cluster, load_cluster
from fomoe_sim.trainer import ConfigError

ROOT = Path(__file__).parent.parent
DEVICE = "wan"  # its name in every site's namespace
SUBNET = "10.214.0"
PORT = 29500
# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LATE_S = 0.005  # a relay that is later than this tells a slow machine, not a slow link


@dataclass
class Link:
    """One direction of a link: packets go one after another, at `rate` bytes/s."""

    rate: float
    free_at: float = 0.0

    def pass_at(self, arrival: float, size: int, queue_s: float) -> float | None:
        """When a packet has left the link, or None if the queue has no room for it."""
        start = max(arrival, self.free_at)
        if start - arrival > queue_s:
            return None
        self.free_at = start + size / self.rate
        return self.free_at


@dataclass
class Network:
    """All links of a cluster, and what becomes of a packet.

    Args:
        queue_s: the longest wait in the queue of one link, seconds.
    """

    cluster: Cluster
    queue_s: float
    random: random.Random = field(default_factory=lambda: random.Random(0))
    dropped: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self.up = [Link(site.up_bps / 8) for site in self.cluster.sites]
        self.down = [Link(site.down_bps / 8) for site in self.cluster.sites]
        uplinks = self.cluster.uplinks
        self.shared_up = {name: Link(rate / 8) for name, rate in uplinks}
        self.shared_down = {name: Link(rate / 8) for name, rate in uplinks}

    def arrival(self, source: int, target: int, size: int, now: float) -> float | None:
        """When a packet of `size` bytes, sent at `now`, is at `target`; None: it never is."""
        sites, cluster = self.cluster.sites, self.cluster
        if cluster.loss and self.random.random() < cluster.loss:
            self.lost += 1
            return None
        way = [self.up[source]]
        if sites[source].uplink is not None:
            way.append(self.shared_up[sites[source].uplink])
        if sites[target].uplink is not None:
            way.append(self.shared_down[sites[target].uplink])
        way.append(self.down[target])
        at: float | None = now
        for link in way:
            at = link.pass_at(at, size, self.queue_s)
            if at is None:
                self.dropped += 1
                return None
        delay = cluster.rtt_ms / 2e3
        if cluster.jitter_ms:
            delay += self.random.uniform(-1, 1) * min(cluster.jitter_ms / 1e3, delay)
        return at + delay


def relay(devices: Sequence[int], network: Network, stop: int) -> float:
    """Pass packets on until `stop` can be read; the longest that one was handed over late, seconds.

    Args:
        devices: file descriptors of the sites' TUN devices, which do not block.
        stop: a file descriptor.
    """
    poll = select.epoll()
    for fd in (*devices, stop):
        poll.register(fd, select.EPOLLIN)
    site_of = {fd: site for site, fd in enumerate(devices)}
    waiting: list[tuple[float, int, int, bytes]] = []
    last = [0.0] * len(devices) ** 2  # so that jitter does not change the order of a pair's packets
    number, latest = 0, 0.0
    clock = time.perf_counter
    while True:
        now = clock()
        while waiting and waiting[0][0] <= now:
            due, _, target, packet = heapq.heappop(waiting)
            latest = max(latest, now - due)
            with contextlib.suppress(BlockingIOError, OSError):  # a full or closed device drops it
                os.write(devices[target], packet)
        # epoll waits in whole milliseconds; the last one is spent asking.
        timeout = max(0.0, waiting[0][0] - clock() - 0.001) if waiting else 1.0
        for fd, _ in poll.poll(timeout):
            if fd == stop:
                return latest
            source = site_of[fd]
            for _ in range(64):
                try:
                    packet = os.read(fd, 65536)
                except BlockingIOError:
                    break
                if packet[0] >> 4 != 4:
                    continue  # IPv6's own messages
                target = packet[19] - 1
                if not 0 <= target < len(devices) or target == source:
                    continue
                at = network.arrival(source, target, len(packet), clock())
                if at is not None:
                    pair = source * len(devices) + target
                    last[pair] = at = max(at, last[pair])
                    number += 1
                    heapq.heappush(waiting, (at, number, target, packet))


def open_tun(name: str) -> int:
    """A file descriptor of a new TUN device: IP packets, nothing before them."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def namespace(site: int) -> str:
    """The name of a site's network namespace: it holds this process's id, so runs do not meet."""
    return f"fomoe-{os.getpid()}-{site}"


def address(site: int) -> str:
    """The address of a site inside the emulation."""
    return f"{SUBNET}.{site + 1}"


@contextlib.contextmanager
def emulated_links(network: Network, mtu: int) -> Iterator[list[str]]:
    """Namespaces of all sites, joined by a relay of its own process while the block runs.

    When the block ends, the relay prints how it did.
    """
    names, devices = [], []
    stop_read, stop_write = os.pipe()
    child = 0
    try:
        for site in range(network.cluster.num_sites):
            name, device = namespace(site), f"fo{os.getpid() % 10**7}-{site}"
            _call(f"ip netns add {name}")
            names.append(name)
            devices.append(open_tun(device))
            _call(f"ip link set {device} netns {name} name {DEVICE}")
            _call(f"ip -n {name} address add {address(site)}/24 dev {DEVICE}")
            _call(f"ip -n {name} link set {DEVICE} mtu {mtu} txqueuelen 2000 up")
            _call(f"ip -n {name} link set lo up")
        child = os.fork()
        if child == 0:
            os.close(stop_write)
            os._exit(_relay_process(devices, network, stop_read))
        yield names
    finally:
        os.close(stop_write)
        os.close(stop_read)
        if child:
            os.waitpid(child, 0)
        for fd in devices:
            os.close(fd)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _relay_process(devices: Sequence[int], network: Network, stop: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent tells it when to end
    with contextlib.suppress(OSError):  # on time even while all cores compute
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    late = relay(devices, network, stop)
    line = (
        f"relay: {network.dropped} packets found a full queue, {network.lost} were lost on purpose"
    )
    if late > _LATE_S:
        line += f"; one was {late * 1e3:.0f} ms late, so this machine is too slow for these links"
    print(line, flush=True)
    return 0


def interface_bytes(name: str) -> tuple[int, int]:
    """Bytes that a site's device has sent and received, headers and repeats among them."""
    words = ["ip", "-n", name, "-s", "-j", "link", "show", DEVICE]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    stats = found[0]["stats64"]
    return stats["tx"]["bytes"], stats["rx"]["bytes"]


def _call(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(command.split()[0], command, f"failed: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------ the command


def train(names: Sequence[str], words: Sequence[str]) -> int:
    """One `launch/site.sh` per namespace; the first status that is not 0, else 0."""
    processes: list[subprocess.Popen[bytes]] = []
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable}
    script = str(ROOT / "launch" / "site.sh")
    try:
        for site, name in enumerate(names):
            where = ["ip", "netns", "exec", name, script, str(site), str(len(names))]
            command = [*where, f"{address(0)}:{PORT}", *words, "--interface", DEVICE]
            processes.append(subprocess.Popen(command, env=environment))
        left = dict(enumerate(processes))
        while left:
            for site, process in list(left.items()):
                status = process.poll()
                if status is None:
                    continue
                del left[site]
                if status:
                    time.sleep(3)  # the others notice by themselves and say what they were doing
                    print(f"launch/wan.sh: site {site} ended with status {status}", file=sys.stderr)
                    return status
            time.sleep(0.1)
        return 0
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def report(names: Sequence[str], summary: dict[str, Any]) -> None:
    """Print what each interface sent beside what the run counted.

    The interface's bytes are higher by TCP/IP headers, acknowledgements and repeats.
    """
    kinds = ("wire_bytes_per_site_per_round", "control_wire_bytes_per_site")
    kinds += ("evaluation_wire_bytes_per_site",)
    probe = summary.get("links", {}).get("probe_bytes_by_site", [0] * len(names))
    for site, name in enumerate(names):
        per_round, control, evaluation = (summary[f"{kind}_by_site"][site] for kind in kinds)
        counted = round(per_round * summary["rounds"] + control + evaluation) + probe[site]
        sent, received = interface_bytes(name)
        more = f", {sent / counted - 1:+.2%}" if counted else ""
        print(
            f"site {site}: the run counted {counted:,} bytes sent, its interface {sent:,}{more}; "
            f"received {received:,}"
        )


def main() -> int:
    """Emulate the links, train, and compare the bytes; the exit status of the run."""
    parser = argparse.ArgumentParser(
        prog="launch/wan.sh", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("cluster", metavar="CLUSTER.yaml", help="rates, rtt_ms, jitter_ms, loss")
    parser.add_argument("config", metavar="CONFIG", help="of the run, as fomoe train takes it")
    parser.add_argument("--mtu", type=int, default=9000, metavar="BYTES", help="(default: 9000)")
    parser.add_argument(
        "--queue-ms", type=float, default=100.0, metavar="MS", help="longest queue (default: 100)"
    )
    args, more = parser.parse_known_args()
    try:
        return run(args, [args.config, *more])
    except ConfigError as error:
        print(f"launch/wan.sh: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Check the words, run, and report.

    Raises:
        ConfigError: for a wrong value, before anything is set up.
    """
    if not 576 <= args.mtu <= 65535:
        raise ConfigError("--mtu", args.mtu, "must be from 576 to 65535")
    if not 0 < args.queue_ms <= 60_000:
        raise ConfigError("--queue-ms", args.queue_ms, "must be above 0 and at most 60000")
    cluster = load_cluster(args.cluster)
    if os.geteuid() != 0 or shutil.which("ip") is None:
        rule = "network namespaces need root and iproute2"
        raise ConfigError("launch/wan.sh", f"user {os.geteuid()}", rule)
    # The dry run checks the config first, so that a mistake is told once and not by every site.
    plan = [sys.executable, "-m", "fomoe", "train", *words, "--dry-run", "--json"]
    done = subprocess.run(plan, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    num_sites = json.loads(done.stdout)["num_sites"]
    if num_sites != cluster.num_sites:
        rule = f"must be {cluster.num_sites}, the sites of {args.cluster}"
        raise ConfigError("num_sites", num_sites, rule)
    network = Network(cluster, args.queue_ms / 1e3)
    print(
        f"emulating {num_sites} sites in network namespaces, by a relay in user space: "
        f"{cluster.rtt_ms:g} ms there and back, jitter {cluster.jitter_ms:g} ms, "
        f"loss {cluster.loss:g}",
        flush=True,
    )
    start = time.time()
    with emulated_links(network, args.mtu) as names:
        status = train(names, words)
        found = newest_summary(words, start)
        if status == 0 and found is not None:
            report(names, found)
    return status


def newest_summary(words: Sequence[str], since: float) -> dict[str, Any] | None:
    """The summary that a run of these words has written since a time, or None."""
    config = load(words[0], [word for word in words[1:] if "=" in word and word[0] != "-"])
    folder = Path(config.run.dir)
    paths = list(folder.parent.glob(f"{glob.escape(folder.name)}*/summary.json"))
    new = [path for path in paths if path.stat().st_mtime >= since]
    if not new:
        return None
    found: dict[str, Any] = json.loads(max(new, key=lambda p: p.stat().st_mtime).read_text())
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
