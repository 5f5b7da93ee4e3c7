"""Transports: what the rest of the system asks of one, and all sites in one process.

A transport is built from a list of members, never from global state. All transports add
contributions in ascending site order, so a proxy run and a distributed run get the same bits, and
all count bytes per site and class: payload is what a site puts in, wire is what it sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fomoe.errors import FomoeError, SyncError
from fomoe.segments import Bucket, wire_elements
from fomoe.sync.aggregate import Contribution, sum_in_order


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

    def add_sum(self, bucket: Bucket, own: Contribution, *, wire: int) -> None:
        """One reduction: the values by their class, the weights as control."""
        peers = len(bucket.holders) - 1
        if peers:
            kind = "expert" if bucket.expert_class else "shared"
            self.add(kind, payload=own.values.nbytes, wire=wire)
            self.add("control", payload=own.weights.nbytes, wire=own.weights.nbytes * peers)

    def add_gather(self, message: bytes, num_members: int) -> None:
        """One message and its length, to every other member."""
        size = len(message) + 8
        self.add("control", payload=size, wire=size * (num_members - 1))

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

    def close(self, reason: str = "") -> None:
        """Leave; with a reason, peers that still wait for this process are told it."""
        ...


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
            self.counts[site].add_sum(bucket, own, wire=own.values.element_size() * sent)
        assert values is not None
        return Contribution(values, sum_in_order(weights))

    def gather(self, message: Callable[[int], bytes]) -> list[bytes]:
        messages = [message(site) for site in self.sites]
        for site, own in zip(self.sites, messages, strict=True):
            self.counts[site].add_gather(own, len(self.members))
        return messages

    def share(self, make: Callable[[], bytes]) -> bytes:
        return make()

    def fetch(self, items: Sequence[Item], read: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
        for item in items:
            sent = 4 * torch.Size(item.shape).numel() * (len(self.members) - len(item.holders))
            self.counts[item.holders[0]].add("evaluation", payload=sent, wire=sent)
        return {item.name: read(item.holders[0], item.name) for item in items}

    def close(self, reason: str = "") -> None:
        pass


def failure_text(error: BaseException) -> str:
    """Why a process stops, for the other sites."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, FomoeError) else f"{type(error).__name__}: {error}"
