"""Who takes part: each site claims its place in a store, and the first to fail records why.

The store only brings the sites together and keeps the first failure; exchanges do not need it. It
runs at site 0 or in torchrun's agent. If that process ends, no other site can read the failure.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from fomoe.errors import SyncError
from fomoe.sync import waiting

T = TypeVar("T")

_POLL_S = 0.05
_ANSWER_S = 1.0  # longest wait for the store's answer after a failure
_GRACE_S = 1.0  # time for a site that closed its connections to record the reason
_LINGER_S = 0.5  # time for the others to read it, if the store ends with this process
_FIRST, _LEFT = "first failure", "left"


class Failure(NamedTuple):
    """Why a site stopped, in its own words."""

    site: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} stopped: {self.reason}"


class Membership:
    """This site's place among the members of one run.

    Args:
        store: a torch.distributed store that all members reach; its keys serve one membership.
        members: sites that take part, ascending; the same at every member.
        site: this site.
        place: where this site is (host name, address), for messages at other sites.
        hosts_store: whether the store ends with this process.
        num_ranks: of this site.

    Attributes:
        ranks_of: number of ranks of every member, once all have joined.
    """

    def __init__(
        self,
        store: dist.Store,
        members: Sequence[int],
        site: int,
        *,
        place: str = "",
        hosts_store: bool = False,
        num_ranks: int = 1,
    ) -> None:
        self.members, self.site = tuple(members), site
        self.ranks_of = {site: num_ranks}
        self._store, self._hosts_store = store, hosts_store
        self._places = {site: place}
        self._claimed = False

    def names(self, sites: Iterable[int]) -> str:
        """Sites with their places, where they are known."""
        return ", ".join(_name(site, self._places.get(site, "")) for site in sites)

    def join(self, timeout_s: float) -> None:
        """Claim this site's place and wait until every member has claimed its own.

        Raises:
            SyncError: at once, if another process has claimed this site, if the members disagree
                about who takes part, or if one of them fails; else at the timeout, naming the
                missing sites.
        """
        started = time.monotonic()
        self._claim(timeout_s)
        self.wait(timeout_s - (time.monotonic() - started))

    def wait(self, timeout_s: float) -> None:
        """Wait until every member has claimed its place, whether or not this process claims one.

        Raises:
            SyncError: as `join` does.
        """
        started, said, seconds = time.monotonic(), False, f"{timeout_s:.0f} s"
        keys = [_key(member) for member in self.members]
        while not self._ask(lambda: self._store.check(keys), timeout_s):
            self.raise_if_stopped(timeout_s)
            waited = time.monotonic() - started
            if waited > timeout_s:
                raise SyncError(
                    f"{self._missing(timeout_s)} did not join within {seconds}; are all sites "
                    f"started, and is the address where they meet open to them?"
                )
            if waited > waiting.PATIENCE_S and not said:
                said = True
                missing = self._missing(timeout_s)
                waiting.say(self.site, f"waiting for {missing} to join, up to {seconds}")
            time.sleep(_POLL_S)
        claims = self._ask(lambda: [self._store.get(key) for key in keys], timeout_s)
        found = dict(zip(self.members, map(json.loads, claims), strict=True))
        self._places = {member: claim[0] for member, claim in found.items()}
        self.ranks_of = {member: claim[2] for member, claim in found.items()}

    def raise_if_stopped(self, timeout_s: float = _ANSWER_S) -> None:
        """Raise if a member has failed, or the store is gone before all are connected.

        Raises:
            SyncError: with the member's own reason.
        """
        failure = self._ask(self._read, timeout_s)
        if failure is not None:
            raise SyncError(str(failure))

    def explain(self, seen: str, *, lost: Sequence[int], patient: bool) -> str:
        """What stopped the run, as far as this site knows.

        Args:
            seen: what this site saw; it is recorded if no failure was recorded before.
            lost: the sites that `seen` names.
            patient: give a site that closed its connections a moment to record its reason.
        """
        failure = None
        end = time.monotonic() + (_GRACE_S if patient else 0.0)
        try:
            while failure is None and time.monotonic() < end:
                failure = self._ask(self._read, _ANSWER_S)
                time.sleep(_POLL_S)
            failure = failure or self._record(seen)
        except SyncError:  # the store ended with its process
            return seen
        if failure.site == self.site or failure.reason in seen:
            return seen
        return str(failure) if failure.site in lost else f"{seen}; first, {failure}"

    def first_failure(self) -> Failure | None:
        """The first failure that a site recorded; None without one, or without the store."""
        with suppress(SyncError):
            return self._ask(self._read, _ANSWER_S)
        return None

    def record(self, reason: str) -> None:
        """Record for the others why this site stops before the run's end."""
        if self._claimed:
            with suppress(SyncError):  # the store ended with its process
                self._record(reason)

    def leave(self) -> None:
        """Leave before the run's end; a site that hosts the store waits a moment for the others."""
        if not self._claimed:
            return
        with suppress(SyncError):
            left = self._ask(lambda: self._store.add(_LEFT, 1), _ANSWER_S)
            end = time.monotonic() + _LINGER_S
            while self._hosts_store and left < len(self.members) and time.monotonic() < end:
                time.sleep(_POLL_S)
                left = self._ask(lambda: self._store.add(_LEFT, 0), _ANSWER_S)

    def _claim(self, timeout_s: float) -> None:
        everyone = ",".join(map(str, self.members))
        first = self._set_once("members", everyone, timeout_s)
        if first != everyone:
            raise SyncError(
                f"site {self.site} was started as one of {len(self.members)} sites, but the first "
                f"to join as one of {first.count(',') + 1}; is another run there?"
            )
        own = json.dumps([self._places[self.site], uuid.uuid4().hex, self.ranks_of[self.site]])
        holder = self._set_once(_key(self.site), own, timeout_s)
        if holder != own:
            raise SyncError(
                f"{_name(self.site, json.loads(holder)[0])} has joined already: is another run "
                f"there, or are two processes started as site {self.site}?"
            )
        self._claimed = True

    def _missing(self, timeout_s: float) -> str:
        present = self._ask(
            lambda: [member for member in self.members if self._store.check([_key(member)])],
            timeout_s,
        )
        return self.names(member for member in self.members if member not in present)

    def _record(self, reason: str) -> Failure:
        own = _as_text(self.site, self.names([self.site]), reason)
        return Failure(*json.loads(self._set_once(_FIRST, own, _ANSWER_S)))

    def _read(self) -> Failure | None:
        there = self._store.check([_FIRST])
        return Failure(*json.loads(self._store.get(_FIRST))) if there else None

    def _set_once(self, key: str, value: str, timeout_s: float) -> str:
        """Set a key unless it is set already; returns its value."""
        return self._ask(lambda: self._store.compare_set(key, "", value), timeout_s).decode()

    def _ask(self, call: Callable[[], T], timeout_s: float) -> T:
        try:
            return waiting.in_thread(call, timeout_s=timeout_s)
        except (RuntimeError, TimeoutError) as error:
            why = waiting.one_line(error)
            raise SyncError(f"the store where the sites meet is gone: {why}") from None


def _as_text(site: int, name: str, reason: str) -> str:
    return json.dumps([site, name, reason[:1000]])


def _key(site: int) -> str:
    return f"site {site}"


def _name(site: int, place: str) -> str:
    return f"site {site} ({place})" if place else f"site {site}"
