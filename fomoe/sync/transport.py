"""Transports: in one process, or between processes over gloo; no other file talks to a network.

A transport is built from a store and a list of members, never from global state. Both transports
add contributions in ascending site order, so a proxy run and a distributed run get the same bits,
and both count bytes per site and class: payload is what a site puts in, wire is what it sends.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.errors import FomoeError, SyncError
from fomoe.segments import Bucket, wire_elements
from fomoe.sync.aggregate import Contribution, sum_in_order
from fomoe.sync.bucketsum import BucketSum, Message

_NOT_COMMITTED = (
    "; a sync that fails is committed nowhere, --resume continues from the newest checkpoint"
)


class ByteCounts:
    """Bytes by class (shared, expert, control, evaluation) of one site."""

    def __init__(self) -> None:
        self.payload: Counter[str] = Counter()
        self.wire: Counter[str] = Counter()

    def add(self, kind: str, *, payload: int, wire: int) -> None:
        # A class that never cost a byte is not listed, whatever the transport.
        if payload or wire:
            self.payload[kind] += payload
            self.wire[kind] += wire

    def state(self) -> dict[str, dict[str, int]]:
        return {"payload": dict(self.payload), "wire": dict(self.wire)}

    def load_state(self, state: dict[str, dict[str, int]]) -> None:
        self.payload, self.wire = Counter(state["payload"]), Counter(state["wire"])


@dataclass(frozen=True)
class Item:
    """A tensor that some sites hold and others want to read.

    Attributes:
        name: what `read` is asked for.
        shape: its shape; fp32.
        holders: sites that have it; the first sends it.
    """

    name: str
    shape: tuple[int, ...]
    holders: tuple[int, ...]


# One site's contribution to a bucket; sums by bucket index.
Contribute = Callable[[Bucket, int], Contribution]
Sums = dict[int, Contribution]


class Transport(Protocol):
    """What the rest of the system asks of a transport.

    Attributes:
        members: all sites that take part, ascending.
        sites: the members that live in this process.
        counts: bytes per site of this process.
    """

    members: tuple[int, ...]
    sites: tuple[int, ...]
    counts: dict[int, ByteCounts]

    def sum_over_holders(self, buckets: Sequence[Bucket], contribute: Contribute) -> Sums:
        """Sums of all holders' contributions, in site order, of the buckets held here.

        The buckets cross together, so that no site waits for a peer that is still in another one.
        Contributions are fresh copies and belong to the transport.
        """
        ...

    def gather(self, message: Callable[[int], bytes]) -> list[bytes]:
        """One control message per member, in site order, at every member."""
        ...

    def share(self, make: Callable[[], bytes]) -> bytes:
        """Run `make` at the first member and return its bytes at every member."""
        ...

    def fetch(self, items: Sequence[Item], read: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
        """Every item, read at a site of this process where one holds it, else received."""
        ...

    def close(self) -> None: ...


def check_agreement(transport: Transport, problem: Callable[[int], str]) -> None:
    """Raise at every member if any has a problem: all go on, or none does.

    Raises:
        SyncError: naming the sites and their problems.
    """
    answers = transport.gather(lambda site: problem(site).encode())
    problems = [
        f"site {site}: {answer.decode()}"
        for site, answer in zip(transport.members, answers, strict=True)
        if answer
    ]
    if problems:
        raise SyncError("; ".join(problems))


class InMemoryTransport:
    """All sites in one process; counts the bytes that the network would have carried."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = self.sites = tuple(sorted(members))
        self.counts = {site: ByteCounts() for site in self.sites}

    def sum_over_holders(self, buckets: Sequence[Bucket], contribute: Contribute) -> Sums:
        return {bucket.index: self._sum(bucket, contribute) for bucket in buckets}

    def _sum(self, bucket: Bucket, contribute: Contribute) -> Contribution:
        values, weights = None, []
        for position, site in enumerate(bucket.holders):
            own = contribute(bucket, site)
            values = own.values if values is None else values.add_(own.values)
            weights.append(own.weights)
            sent = wire_elements(bucket.numel, len(bucket.holders), position)
            _count_sum(self.counts[site], bucket, own, wire=own.values.element_size() * sent)
        assert values is not None
        return Contribution(values, sum_in_order(weights))

    def gather(self, message: Callable[[int], bytes]) -> list[bytes]:
        messages = [message(site) for site in self.sites]
        for site, own in zip(self.sites, messages, strict=True):
            _count_gather(self.counts[site], own, len(self.members))
        return messages

    def share(self, make: Callable[[], bytes]) -> bytes:
        return make()

    def fetch(self, items: Sequence[Item], read: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
        for item in items:
            sent = 4 * torch.Size(item.shape).numel() * (len(self.members) - len(item.holders))
            self.counts[item.holders[0]].add("evaluation", payload=sent, wire=sent)
        return {item.name: read(item.holders[0], item.name) for item in items}

    def close(self) -> None:
        pass


class GlooTransport:
    """One site of a distributed run; its peers are other processes (or threads, in tests).

    Args:
        store: a torch.distributed store that all members reach.
        members: sites that take part, ascending; the same at every member.
        site: this site.
        timeout_s: longest wait for a peer.
        interface: network interface to use, such as eth0; by default the host name's address.
        prefix: name of this membership in the store; a name is used once.
        local_rank: which of the site's ranks this is; equal local ranks of all sites are peers.

    Raises:
        SyncError: if the members do not meet within the timeout.
    """

    def __init__(
        self,
        store: dist.Store,
        members: Sequence[int],
        site: int,
        *,
        timeout_s: float,
        interface: str | None = None,
        prefix: str = "sync",
        local_rank: int = 0,
    ) -> None:
        self.members = tuple(sorted(members))
        self.sites: tuple[int, ...] = (site,)
        self.counts = {site: ByteCounts()}
        self._site = site
        self._rank = {member: rank for rank, member in enumerate(self.members)}
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [_open_interface(interface)]
        prefixed = dist.PrefixStore(f"{prefix}/{local_rank}", store)
        with _named("joining the other sites", hint=""):
            self._group = dist.ProcessGroupGloo(
                prefixed, self._rank[site], len(self.members), options
            )

    def sum_over_holders(self, buckets: Sequence[Bucket], contribute: Contribute) -> Sums:
        held = [bucket for bucket in buckets if self._site in bucket.holders]
        sums = [BucketSum(b, self._site, contribute(b, self._site)) for b in held]
        with _named("summing over the holders"):
            # Every site sends its buckets in the plan's order, two messages a peer and bucket; a
            # tag names the bucket and the message.
            self._wait([w for s in sums for w in self._post(s.parts(), 4 * s.bucket.index)])
            for own in sums:
                own.add()
            self._wait([w for s in sums for w in self._post(s.totals(), 4 * s.bucket.index + 2)])
        for own in sums:
            _count_sum(self.counts[self._site], own.bucket, own.contribution, wire=own.wire_bytes)
        return {own.bucket.index: own.total() for own in sums}

    def gather(self, message: Callable[[int], bytes]) -> list[bytes]:
        own = message(self._site)
        peers = [member for member in self.members if member != self._site]
        lengths = {peer: torch.empty(1, dtype=torch.int64) for peer in peers}
        with _named("exchanging messages"):
            self._exchange(dict.fromkeys(peers, torch.tensor([len(own)])), lengths, 1 << 20)
            parts = {p: torch.empty(int(lengths[p]), dtype=torch.uint8) for p in peers}
            mine = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.empty(0)
            self._exchange(dict.fromkeys(peers, mine), parts, (1 << 20) + 1)
        _count_gather(self.counts[self._site], own, len(self.members))
        return [own if m == self._site else parts[m].numpy().tobytes() for m in self.members]

    def share(self, make: Callable[[], bytes]) -> bytes:
        first = self._site == self.members[0]
        failure: FomoeError | None = None
        answer = b""
        if first:
            try:
                answer = b"+" + make()
            except FomoeError as error:
                failure, answer = error, b"-" + str(error).encode()
        answer = self.gather(lambda _: answer)[0]
        if failure is not None:
            raise failure
        if answer[:1] == b"-":
            raise SyncError(f"site {self.members[0]}: {answer[1:].decode()}")
        return answer[1:]

    def fetch(self, items: Sequence[Item], read: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
        found, works, kept, sent = {}, [], [], 0
        with _named("fetching experts for evaluation"):
            for index, item in enumerate(items):
                tag = (1 << 21) + index
                if self._site not in item.holders:
                    found[item.name] = torch.empty(item.shape)
                    source = self._rank[item.holders[0]]
                    works.append(self._group.recv([found[item.name]], source, tag))
                    continue
                found[item.name] = read(self._site, item.name)
                if self._site == item.holders[0]:
                    kept.append(found[item.name].detach().float().cpu().contiguous())
                    for peer in self.members:
                        if peer not in item.holders:
                            works.append(self._group.send([kept[-1]], self._rank[peer], tag))
                            sent += kept[-1].nbytes
            for work in works:
                work.wait()
        self.counts[self._site].add("evaluation", payload=sent, wire=sent)
        return found

    def _exchange(self, out: dict[int, Tensor], into: dict[int, Tensor], tag: int) -> None:
        """Send and receive one message with every peer at once."""
        self._wait(self._post([(peer, out[peer], into[peer]) for peer in into], tag))

    def _post(self, messages: Iterable[Message], tag: int) -> list[dist.Work]:
        """Start messages; several with one peer take successive tags. Empty ones are not sent."""
        works, used = [], Counter[int]()
        for peer, out, into in messages:
            own_tag = tag + used[peer]
            used[peer] += 1
            if into.numel():
                works.append(self._group.recv([into], self._rank[peer], own_tag))
            if out.numel():
                works.append(self._group.send([out.contiguous()], self._rank[peer], own_tag))
        return works

    @staticmethod
    def _wait(works: list[dist.Work]) -> None:
        for work in works:
            work.wait()

    def close(self) -> None:
        """Leave the group: peers that still wait for this site fail now, not at their timeout."""
        # The connections close with the last reference to the group; shutdown alone leaves them.
        self._group.shutdown()
        del self._group


def _count_sum(counts: ByteCounts, bucket: Bucket, own: Contribution, *, wire: int) -> None:
    """One reduction: the values by their class, the weights as control."""
    if len(bucket.holders) == 1:
        return
    kind = "expert" if bucket.expert_class else "shared"
    counts.add(kind, payload=own.values.nbytes, wire=wire)
    counts.add(
        "control", payload=own.weights.nbytes, wire=own.weights.nbytes * (len(bucket.holders) - 1)
    )


def _count_gather(counts: ByteCounts, message: bytes, num_members: int) -> None:
    """One message and its length, to every other member."""
    size = len(message) + 8
    counts.add("control", payload=size, wire=size * (num_members - 1))


def _open_interface(interface: str | None) -> dist.ProcessGroupGloo.Device:
    """The network device that gloo listens on.

    Raises:
        SyncError: if this machine has no such interface.
    """
    try:
        if interface is None:
            return dist.ProcessGroupGloo.create_default_device()
        return dist.ProcessGroupGloo.create_device(interface=interface)
    except RuntimeError:
        asked = f"--interface {interface}" if interface else "the host name's network address"
        raise SyncError(f"{asked}: this machine has no such network interface") from None


@contextmanager
def _named(what: str, hint: str = _NOT_COMMITTED) -> Iterator[None]:
    """A failed exchange becomes one line that says what was being done; it is never swallowed."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, FomoeError):
            raise
        # Pending operations in the failed frames would keep the connections open after `close`.
        traceback.clear_frames(error.__traceback__)
        text = str(error).strip() or type(error).__name__
        # gloo puts its source file before the reason and advice behind it.
        reason = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).split(". This is")[0]
        raise SyncError(f"{what} failed: {reason[:200]}{hint}") from error


# ----------------------------------------------------------------------------------------- launch


@dataclass(frozen=True)
class Launch:
    """Where this process stands in a distributed run; launch arguments, never config.

    Attributes:
        rank, world_size: from torchrun; (0, 1) for a proxy run.
        local_rank: index on this machine, which chooses the accelerator.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def launch_from_environment() -> Launch:
    """Read what torchrun sets; without it the run is a proxy run."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, world_size, local_rank = (int(os.environ.get(name, "0")) for name in names)
    except ValueError:
        raise FomoeError(
            "RANK, WORLD_SIZE and LOCAL_RANK must be integers, as torchrun sets them"
        ) from None
    return Launch(rank, world_size, local_rank)


@contextmanager
def _patience(where: str, timeout_s: float) -> Iterator[None]:
    """Say what a long silence is waiting for."""
    text = f"waiting for the other sites at {where}, up to {timeout_s:g} s"
    timer = threading.Timer(5.0, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_transport(
    launch: Launch, num_sites: int, *, timeout_s: float, interface: str | None = None
) -> Transport:
    """A transport for this process: all sites in memory, or this site over gloo.

    Raises:
        SyncError: if torchrun started another number of ranks, or the sites do not meet.
    """
    if not launch.distributed:
        return InMemoryTransport(range(num_sites))
    if launch.world_size != num_sites:
        raise SyncError(
            f"{launch.world_size} processes were started, but num_sites is {num_sites}; "
            f"start one per site"
        )
    _open_interface(interface)  # a wrong name is told before the wait for the other sites
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    question = "; are all sites started, and is this address open to them?"
    with _named(f"meeting the other sites at {where}", hint=question), _patience(where, timeout_s):
        store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return GlooTransport(
        store,
        range(num_sites),
        rank,
        timeout_s=timeout_s,
        interface=interface,
        prefix=f"attempt-{attempt}",
    )
