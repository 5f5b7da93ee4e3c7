"""One site of a distributed run: its messages to the other sites, over gloo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.errors import ConfigError, SyncError
from fomoe.ranks import ONE_RANK, Ranks
from fomoe.sync import waiting
from fomoe.sync.membership import Membership
from fomoe.sync.transport import ByteCounts, Message, count_wire, failure_text
from fomoe.sync.waiting import PeerWaits, Pending, one_line

_ABORT_TAG = (1 << 20) + 2


class GlooTransport:
    """One site of a distributed run; its peers are other processes (or threads, in tests).

    Args:
        store: a torch.distributed store that all members reach.
        members: sites that take part, ascending; the same at every member.
        site: this site.
        timeout_s: longest wait for a peer.
        join_s: longest wait for all members to join, `timeout_s` by default.
        interface: network interface to use, such as eth0; by default the host name's address.
        prefix: name of this membership in the store; a name is used once.
        inside: the ranks of this site; one rank of every site is a member.
        place, hosts_store: see `Membership`.

    Attributes:
        membership: of this site.

    Raises:
        SyncError: if the members do not all join in time, or this site has joined already.
        ConfigError: if there is no such interface.
    """

    remote = True

    def __init__(
        self,
        store: dist.Store,
        members: Sequence[int],
        site: int,
        *,
        timeout_s: float,
        join_s: float | None = None,
        interface: str | None = None,
        prefix: str = "sync",
        inside: Ranks = ONE_RANK,
        place: str = "",
        hosts_store: bool = False,
    ) -> None:
        self.members = tuple(sorted(members))
        self.sites: tuple[int, ...] = (site,)
        self.counts = {site: ByteCounts()}
        self.inside = inside
        self._site, self._timeout_s = site, timeout_s
        self._rank = {member: rank for rank, member in enumerate(self.members)}
        self._aborted = False
        self._peers = [member for member in self.members if member != site]
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [open_interface(interface)]
        prefixed = dist.PrefixStore(prefix, store)
        self._twins: list[GlooTransport] = []
        rank, size = self._rank[site], len(self.members)

        def connect(name: str) -> dist.ProcessGroupGloo:
            return dist.ProcessGroupGloo(dist.PrefixStore(name, prefixed), rank, size, options)

        self._connect_as = connect
        self.membership = Membership(
            prefixed,
            self.members,
            site,
            place=place,
            hosts_store=hosts_store,
            num_ranks=inside.size,
        )
        end = time.monotonic() + (timeout_s if join_s is None else join_s)
        try:
            self.membership.join(end - time.monotonic())
            self._group = self._connect(lambda: connect("own"), timeout_s=end - time.monotonic())
        except BaseException as error:
            self.membership.record(failure_text(error))
            self.membership.leave()
            if not isinstance(error, Exception):
                raise
            raise SyncError(f"joining the other sites failed: {one_line(error)}") from error
        self._waits = PeerWaits(self._peers, abort=self._abort, timed_out=_timed_out)

    def _connect(
        self, connect: Callable[[], dist.ProcessGroupGloo], timeout_s: float
    ) -> dist.ProcessGroupGloo:
        """Connect to every member; all have joined."""
        started, said = time.monotonic(), False
        names = self.membership.names(self._peers)

        def look() -> None:
            nonlocal said
            self.membership.raise_if_stopped()
            if time.monotonic() - started > waiting.PATIENCE_S and not said:
                said = True
                waiting.say(self._site, f"connecting to {names}, up to {timeout_s:.0f} s")

        try:
            return waiting.in_thread(connect, timeout_s=timeout_s, look=look)
        except TimeoutError:
            raise SyncError(
                f"no connection to each of {names} within {timeout_s:.0f} s; can the sites reach "
                f"the ports that gloo opens at each other?"
            ) from None

    @property
    def lanes(self) -> Sequence[GlooTransport]:
        return (self,)

    def beside(self) -> GlooTransport:
        return self.twin(self.inside.beside(), {self._site: ByteCounts()})

    def twin(self, inside: Ranks, counts: dict[int, ByteCounts]) -> GlooTransport:
        """A transport between the same members with connections of its own; it closes with this
        one.

        Args:
            inside: the ranks of this site, for its thread.
            counts: its bytes.

        Raises:
            SyncError: if the members cannot be reached.
        """
        twin = copy(self)
        twin.counts, twin.inside = counts, inside
        number = len(self._twins)
        twin._group = self._connect(
            lambda: self._connect_as(f"beside-{number}"), timeout_s=self._timeout_s
        )
        twin._waits = PeerWaits(self._peers, abort=twin._abort, timed_out=_timed_out)
        self._twins.append(twin)
        return twin

    def move(self, what: str, messages: Sequence[Message]) -> list[Tensor | None]:
        works: list[tuple[int, int, Tensor, Tensor]] = []
        found: list[Tensor | None] = []
        nothing = torch.empty(0)
        for tag, message in enumerate(messages):
            here = message.source == self._site, message.target == self._site
            received = message.tensor if all(here) else None
            if here == (True, False):
                assert message.tensor is not None
                works.append((message.target, tag, message.tensor, nothing))
                count_wire(self.counts, message)
            elif here == (False, True):
                received = message.into
                if received is None:
                    received = torch.empty(message.shape, dtype=message.dtype)
                works.append((message.source, tag, nothing, received))
            found.append(received)
        self._exchange(what, works)
        return found

    def _exchange(self, what: str, messages: Iterable[tuple[int, int, Tensor, Tensor]]) -> None:
        """Send and receive with all peers at once, and wait; empty tensors are not sent.

        Args:
            messages: peer, tag, the tensor to send, the tensor to receive into.
        """
        if self._aborted:
            raise SyncError(f"{what} failed: an earlier exchange failed")
        works: dict[int, list[Pending]] = {peer: [] for peer in self._peers}
        for peer, tag, out, into in messages:
            try:
                works[peer] += self._post(peer, tag, out, into)
            except RuntimeError as error:  # the peer has left since the last exchange
                failure = self._failure(what, [peer], error)
                self._abort()
                raise failure from error
        self._waits.run(
            {peer: own for peer, own in works.items() if own},
            on_slow=lambda peers: self._say_slow(what, peers),
            on_failure=lambda peers, error: self._failure(what, peers, error),
            stopped=lambda: self._stopped(what),
        )

    def _post(self, peer: int, tag: int, out: Tensor, into: Tensor) -> list[Pending]:
        works, rank = [], self._rank[peer]
        if into.numel():
            works.append(self._group.recv([into], rank, tag))
        if out.numel():
            works.append(self._group.send([out.contiguous()], rank, tag))
        return works

    def _say_slow(self, what: str, peers: list[int]) -> None:
        names = self.membership.names(peers)
        waiting.say(self._site, f"{what}: waiting for {names}, up to {self._timeout_s:g} s")

    def _failure(self, what: str, peers: list[int], error: BaseException) -> SyncError:
        names = self.membership.names(peers)
        if _timed_out(error):
            seen = f"no word from {names} within {self._timeout_s:g} s"
        else:
            seen = f"lost {names}: {one_line(error)}"
        why = self.membership.explain(seen, lost=peers, patient=not _timed_out(error))
        return SyncError(f"{what} failed: {why}")

    def _stopped(self, what: str) -> SyncError | None:
        """A failure at a site whose messages of this exchange have arrived already."""
        failure = self.membership.first_failure()
        return None if failure is None else SyncError(f"{what} failed: {failure}")

    def _abort(self) -> None:
        """Make every pending message fail, here and at the peers: one timeout closes everything."""
        self._aborted = True
        for peer in self._peers:
            with suppress(RuntimeError):
                never = self._group.recv([torch.empty(1)], self._rank[peer], _ABORT_TAG)
                never.wait(timedelta(milliseconds=1))

    def close(self, reason: str = "") -> None:
        """Leave the group: peers that still wait for this site fail now, not at their timeout."""
        if reason:
            self.membership.record(reason)
        for transport in (*self._twins, self):
            if reason:
                transport._abort()
            transport._waits.close()
        if reason:
            self.membership.leave()
        for transport in (*self._twins, self):
            # The connections close with the last reference to the group; shutdown leaves them open.
            transport._group.shutdown()
            del transport._group


def open_interface(interface: str | None) -> dist.ProcessGroupGloo.Device:
    """The network device that gloo listens on.

    Raises:
        ConfigError: if this machine has no such interface.
    """
    try:
        if interface is None:
            return dist.ProcessGroupGloo.create_default_device()
        return dist.ProcessGroupGloo.create_device(interface=interface)
    except RuntimeError:
        if interface is None:
            rule = "must name a network interface: this machine's host name has no address here"
        else:
            rule = "is not a network interface of this machine"
        raise ConfigError("--interface", interface or "", rule) from None


def _timed_out(error: BaseException) -> bool:
    """Whether gloo reports a wait that was too long; it has closed all connections then."""
    return "Timed out waiting" in str(error) or "Application timeout" in str(error)
