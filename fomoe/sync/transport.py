"""Transports: what each of them does, and the one for all sites in one process.

A transport is built from a store and a list of members, never from global state. It moves messages
and counts the bytes that each site sends, by class. What the messages mean is decided in
`fomoe.sync.exchange` alone, so a proxy run and a distributed run give the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fomoe.errors import FomoeError
from fomoe.ranks import ONE_RANK, Ranks


class ByteCounts:
    """Bytes by class (shared, expert, control, evaluation) of one site."""

    def __init__(self) -> None:
        self.payload: Counter[str] = Counter()
        self.wire: Counter[str] = Counter()

    def add(self, kind: str, *, payload: int, wire: int) -> None:
        # A class without bytes is not listed, whatever the transport.
        if payload or wire:
            self.payload[kind] += payload
            self.wire[kind] += wire

    def take(self, other: ByteCounts) -> None:
        """Add what others have counted, who start again from 0."""
        for kind in other.payload | other.wire:
            self.add(kind, payload=other.payload[kind], wire=other.wire[kind])
        other.payload.clear()
        other.wire.clear()

    def state(self) -> dict[str, dict[str, int]]:
        return {"payload": dict(self.payload), "wire": dict(self.wire)}

    def load_state(self, state: dict[str, dict[str, int]]) -> None:
        self.payload, self.wire = Counter(state["payload"]), Counter(state["wire"])


@dataclass(frozen=True)
class Message:
    """One tensor on its way from one member to another.

    Attributes:
        source, target: members; equal where a site keeps its own.
        tensor: what is sent, on the CPU; None where the source is in another process.
        shape, dtype: of the tensor, known at both ends.
        kind: class of bytes that it is counted in.
        into: memory of the target that receives it; None: new memory.
    """

    source: int
    target: int
    tensor: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    into: Tensor | None = None


class Transport(Protocol):
    """Moves messages between the members, and counts their bytes.

    Attributes:
        members: all sites that take part, ascending.
        sites: the members that live in this process.
        counts: bytes per site of this process.
        inside: the ranks of this process's site. Each has a transport of its own, to ranks of the
            other sites.
        remote: whether other members live in other processes.
        lanes: this transport alone; or, of a rank whose rows several ranks of another site have,
            one for each of its lanes (`fomoe.shards`), in their order. What all sites do together
            is done in every lane.
    """

    members: tuple[int, ...]
    sites: tuple[int, ...]
    counts: dict[int, ByteCounts]
    inside: Ranks
    remote: bool

    @property
    def lanes(self) -> Sequence[Transport]: ...

    def move(self, what: str, messages: Sequence[Message]) -> list[Tensor | None]:
        """Move messages, all at once; every member passes the same list in the same order.

        Args:
            what: how an error names the operation.

        Returns:
            For each message its tensor, or None where the target is in another process. A tensor
            that stays in one process is not copied.

        Raises:
            SyncError: naming the sites that sent nothing, or the first failure that is known.
        """
        ...

    def beside(self) -> Transport:
        """A transport between the same sites for a thread of its own; it closes with this one.

        It counts bytes apart. In one process it is this one: nothing is to be waited for.

        Raises:
            SyncError: if the sites cannot be reached.
        """
        ...

    def close(self, reason: str = "") -> None:
        """Leave; peers that still wait for this process receive the reason, if there is one."""
        ...


def model_bytes(counts: ByteCounts) -> tuple[int, int]:
    """Payload and wire bytes of model values: shared and expert."""
    payload, wire = counts.payload, counts.wire
    return payload["shared"] + payload["expert"], wire["shared"] + wire["expert"]


class InMemoryTransport:
    """All sites in one process; counts the bytes that a network would carry."""

    remote = False

    def __init__(self, members: Sequence[int], inside: Ranks = ONE_RANK) -> None:
        self.inside = inside
        self.members = self.sites = tuple(sorted(members))
        self.counts = {site: ByteCounts() for site in self.sites}

    def move(self, what: str, messages: Sequence[Message]) -> list[Tensor | None]:
        for message in messages:
            assert message.tensor is not None
            if message.source != message.target:
                count_wire(self.counts, message)
        return [message.tensor for message in messages]

    @property
    def lanes(self) -> Sequence[Transport]:
        return (self,)

    def beside(self) -> Transport:
        return self

    def close(self, reason: str = "") -> None:
        pass


def count_wire(counts: dict[int, ByteCounts], message: Message) -> None:
    """Count a message at its source."""
    assert message.tensor is not None
    counts[message.source].add(message.kind, payload=0, wire=message.tensor.nbytes)


def failure_text(error: BaseException) -> str:
    """The reason why a process stops, as the other sites read it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, FomoeError) else f"{type(error).__name__}: {error}"
