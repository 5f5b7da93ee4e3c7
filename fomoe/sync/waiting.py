"""Waits that end at Ctrl-C and SIGTERM, and that print which sites they wait for.

Python handles a signal only between two steps of the main thread, and a wait inside torch is a
single step of up to `sync.timeout_s`. So torch waits in other threads, and the main thread waits in
Python.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from fomoe.errors import say_line

T = TypeVar("T")

PATIENCE_S = 10.0  # a longer wait prints a line that names the missing sites
_LOOK_S = 1.0  # how often a wait checks whether the run has stopped elsewhere
_SETTLE_S = 2.0  # longest wait for threads whose messages were made to fail
_CALL = "call that may block"


class Beside(Generic[T]):
    """A call that runs in a thread of its own, beside the caller."""

    def __init__(self, call: Callable[[], T]) -> None:
        answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._answers = answers
        self._answer: tuple[T | None, BaseException | None] | None = None

        def run() -> None:
            try:
                answers.put((call(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=run, name=_CALL, daemon=True).start()

    def ended(self, timeout_s: float) -> bool:
        """Wait for the call, but not longer; a signal ends the wait at once."""
        if self._answer is None:
            with suppress(Empty):
                self._answer = self._answers.get(timeout=timeout_s)
        return self._answer is not None

    def result(self) -> T:
        """What the call returned, however long it takes.

        Raises:
            Exception: what the call raised.
        """
        while not self.ended(_LOOK_S):
            pass
        assert self._answer is not None
        answer, error = self._answer
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]


def in_thread(
    call: Callable[[], T], *, timeout_s: float, look: Callable[[], None] | None = None
) -> T:
    """Run a call that may block outside Python; a signal ends the wait at once.

    Args:
        look: called at intervals during the wait; it may print a line, or end the wait with an
            exception.

    Raises:
        TimeoutError: if the call does not return in time. It continues in its thread.
        Exception: what the call raises.
    """
    running = Beside(call)
    end = time.monotonic() + timeout_s
    left = timeout_s
    while not running.ended(max(min(left, _LOOK_S), 0.0)):
        if left <= 0:
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        if look is not None:
            look()
        left = end - time.monotonic()
    return running.result()


def is_blocked() -> bool:
    """Whether a call of `in_thread` has not returned yet."""
    return any(thread.name == _CALL for thread in threading.enumerate())


class Pending(Protocol):
    """A message that is on its way (a Work of torch.distributed)."""

    def wait(self) -> object: ...


class PeerWaits:
    """Waits for messages, with one thread per peer, so that a failure names its peer.

    Args:
        peers: sites that messages are exchanged with.
        abort: makes every pending message fail, so that no thread stays blocked.
        timed_out: whether an error is this site's own timeout, which fails all pending messages.
    """

    def __init__(
        self,
        peers: list[int],
        *,
        abort: Callable[[], None],
        timed_out: Callable[[BaseException], bool],
    ) -> None:
        self._abort, self._timed_out = abort, timed_out
        self._patience_s = PATIENCE_S
        # The results are in a table by peer: a signal may lose a wake-up, never a result.
        self._ended: dict[int, BaseException | None] = {}
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._todo: dict[int, SimpleQueue[list[Pending] | None]] = {}
        for peer in peers:
            self._todo[peer] = SimpleQueue()
            threading.Thread(
                target=_wait_for_peer,
                args=(peer, self._todo[peer], self._ended, self._wake),
                name=f"messages with site {peer}",
                daemon=True,
            ).start()

    def run(
        self,
        works: dict[int, list[Pending]],
        *,
        on_slow: Callable[[list[int]], None],
        on_failure: Callable[[list[int], BaseException], BaseException],
        stopped: Callable[[], BaseException | None],
    ) -> None:
        """Return when all messages have been exchanged.

        Args:
            works: messages by peer.
            on_slow: called once in a long wait, with the sites that are missing.
            on_failure: called with the sites that failed and the first error, while the other
                connections are still open; returns the error to raise.
            stopped: called at intervals; an error that it returns is raised.

        Raises:
            BaseException: what `on_failure` or `stopped` returned, or a signal's exception. All
                messages have failed then, at the peers as well.
        """
        self._ended.clear()
        started, said, peers = time.monotonic(), False, sorted(works)
        try:
            for peer, own in works.items():
                self._todo[peer].put(own)
            while waiting := [peer for peer in peers if peer not in self._ended]:
                with suppress(Empty):
                    self._wake.get(timeout=_LOOK_S)
                self._raise_first(peers, on_failure)
                waited = time.monotonic() - started
                if not said and waited > self._patience_s:
                    said = True
                    on_slow(waiting)
                if waited > _LOOK_S and (error := stopped()) is not None:
                    raise error
            self._raise_first(peers, on_failure)
        except BaseException:
            self._abort()
            self._settle(peers)
            raise
        # This wait was long and ended well, so another one as long prints no line.
        self._patience_s = max(self._patience_s, 1.5 * (time.monotonic() - started))

    def close(self) -> None:
        """End the threads."""
        for todo in self._todo.values():
            todo.put(None)

    def _raise_first(
        self, peers: list[int], on_failure: Callable[[list[int], BaseException], BaseException]
    ) -> None:
        failed = [peer for peer in peers if self._ended.get(peer) is not None]
        if failed:
            error = self._ended[failed[0]]
            assert error is not None
            if self._timed_out(error):
                self._settle(peers)
                failed = [peer for peer in peers if self._ended.get(peer) is not None]
            raise on_failure(failed, error)

    def _settle(self, peers: list[int]) -> None:
        """Wait for the threads to see that their messages failed or were exchanged."""
        end = time.monotonic() + _SETTLE_S
        while any(peer not in self._ended for peer in peers) and time.monotonic() < end:
            with suppress(Empty):
                self._wake.get(timeout=_SETTLE_S / 100)


def _wait_for_peer(
    peer: int,
    todo: SimpleQueue[list[Pending] | None],
    ended: dict[int, BaseException | None],
    wake: SimpleQueue[None],
) -> None:
    while (works := todo.get()) is not None:
        failure: BaseException | None = None
        try:
            while works:
                works.pop(0).wait()
        except BaseException as error:
            # Its frames would keep the messages, and so the connection, as long as the error lives.
            failure = error.with_traceback(None)
        works.clear()
        ended[peer] = failure
        wake.put(None)


def say(site: int, text: str) -> None:
    """Write one line of a site to stderr."""
    say_line(f"site {site}: {text}")


def one_line(error: BaseException) -> str:
    """An error as one line; from gloo and the store, the line that says what happened."""
    text = str(error).strip() or type(error).__name__
    # gloo puts its source file before the reason, and advice after it.
    return re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).split(". This is")[0][:300]
