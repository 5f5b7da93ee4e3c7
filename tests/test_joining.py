"""How sites come together, what they say while they wait, and who stopped a run."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from conftest import all_good, over_gloo

from fomoe.errors import ConfigError, SyncError
from fomoe.launch import Launch
from fomoe.sync import joining, waiting
from fomoe.sync.exchange import gather
from fomoe.sync.membership import Membership
from fomoe.sync.waiting import PeerWaits, in_thread, is_blocked


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run some works at once; what each returned, or the exception that it raised."""
    results: list[Any] = [TimeoutError("hangs")] * len(works)

    def run(index: int, work: Callable[[], Any]) -> None:
        try:
            results[index] = work()
        except Exception as error:
            results[index] = error

    threads = [
        threading.Thread(target=run, args=(index, work), daemon=True)
        for index, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def member(store: dist.Store, site: int, count: int = 3, **options: Any) -> Membership:
    return Membership(store, range(count), site, place=f"node-{site}, 10.8.0.{site}", **options)


# ------------------------------------------------------------------------------------- membership


def test_members_know_each_others_places():
    store = dist.HashStore()
    members = [member(store, site) for site in range(3)]
    assert members[0].names([2]) == "site 2"
    assert together(*[lambda m=m: m.join(20) for m in members]) == [None] * 3
    assert members[0].names([1, 2]) == "site 1 (node-1, 10.8.0.1), site 2 (node-2, 10.8.0.2)"


def test_a_second_process_that_is_the_same_site_is_refused_at_once():
    """It may be of another run; the run that is there goes on as if nothing had been."""
    store = dist.HashStore()
    members = [member(store, site) for site in range(3)]
    assert together(*[lambda m=m: m.join(20) for m in members]) == [None] * 3
    second = member(store, 1)
    with pytest.raises(SyncError, match=r"site 1 \(node-1, 10.8.0.1\) has joined already: is ano"):
        second.join(600)
    second.record("it was refused")
    second.leave()
    assert members[0].first_failure() is None


def test_of_two_processes_that_are_the_same_site_one_joins():
    store = dist.HashStore()
    twins = [member(store, 0, 1) for _ in range(6)]
    results = together(*[lambda m=m: m.join(600) for m in twins])
    assert sum(result is None for result in results) == 1
    assert sum("has joined already" in str(result) for result in results) == 5


def test_members_that_count_the_sites_differently_are_refused():
    store = dist.HashStore()
    first = member(store, 0)
    with pytest.raises(SyncError, match="site 1, site 2 did not join within 0 s"):
        first.join(0.1)
    with pytest.raises(SyncError, match="site 1 was started as one of 2 sites, but the first to"):
        member(store, 1, 2).join(600)


def test_who_is_missing_is_said_during_the_wait_and_at_its_end(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.05)
    store = dist.HashStore()
    for result in together(*[lambda s=s: member(store, s, 4).join(0.6) for s in (0, 2)]):
        assert isinstance(result, SyncError)
        assert str(result).startswith("site 1, site 3 did not join within 1 s; are all sites start")
    said = capsys.readouterr().err.splitlines()
    assert "site 0: waiting for site 1, site 3 to join, up to 1 s" in said
    assert "site 2: waiting for site 1, site 3 to join, up to 1 s" in said


def test_a_site_that_stops_while_others_join_stops_them_at_once():
    store = dist.HashStore()
    leaving = member(store, 1)
    with pytest.raises(SyncError):
        leaving.join(0.01)
    leaving.record("interrupted")
    with pytest.raises(SyncError, match=r"site 1 \(node-1, 10.8.0.1\) stopped: interrupted"):
        member(store, 0).join(600)


def joined(count: int = 3, **options: Any) -> list[Membership]:
    store = dist.HashStore()
    members = [member(store, site, count, **options) for site in range(count)]
    assert together(*[lambda m=m: m.join(20) for m in members]) == [None] * count
    return members


def test_all_sites_learn_the_first_cause():
    """By the site that stopped, or by the first that lost one which says nothing itself."""
    a, b, c = joined()
    c.record("the disk is full")
    b.record("lost site 2")
    why = "site 2 (node-2, 10.8.0.2) stopped: the disk is full"
    assert a.explain("lost site 2", lost=[2], patient=True) == why
    assert a.explain("lost site 1", lost=[1], patient=True) == f"lost site 1; first, {why}"
    assert c.explain("lost site 1", lost=[1], patient=True) == "lost site 1"


def test_what_only_survivors_have_seen_is_recorded_once():
    a, b, _ = joined()
    assert a.explain("lost site 2", lost=[2], patient=False) == "lost site 2"
    assert b.explain("lost site 2", lost=[2], patient=False) == "lost site 2"
    seen = b.explain("lost site 0", lost=[0], patient=False)
    assert seen == "site 0 (node-0, 10.8.0.0) stopped: lost site 2"


class GoneStore:
    """A store whose process has ended."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any) -> None:
            raise dist.DistNetworkError("Connection reset by peer")

        return fail


def test_without_the_store_a_failure_is_reported_as_it_was_seen():
    left = joined()[0]
    left._store = GoneStore()  # type: ignore[assignment]
    left.record("interrupted")
    left.leave()
    assert left.first_failure() is None
    assert left.explain("lost site 2", lost=[2], patient=True) == "lost site 2"
    with pytest.raises(SyncError, match="the store where the sites meet is gone: Connection res"):
        member(GoneStore(), 1).join(5)  # type: ignore[arg-type]


def test_the_store_stays_until_the_others_have_read_why():
    a, b, c = joined(hosts_store=True)
    a.record("interrupted")
    order = []

    def leave(site: Membership) -> None:
        site.leave()
        order.append(site.site)

    threads = [threading.Thread(target=leave, args=(m,)) for m in (a, b, c)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(order) == [0, 1, 2]
    assert a._store.add("left", 0) == 3


# ------------------------------------------------------------------------------------------ waits


class Message:
    """A message that crosses when it is told to."""

    def __init__(self) -> None:
        self.over, self.error = threading.Event(), None

    def wait(self) -> None:
        assert self.over.wait(30)
        if self.error is not None:
            raise self.error

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.over.set()


class Exchange:
    """Waits for messages of sites 1, 2 and 3, two each."""

    def __init__(self) -> None:
        self.messages = {peer: [Message(), Message()] for peer in (1, 2, 3)}
        self.aborted, self.slow, self.failed = 0, [], []
        self.stopped: Exception | None = None
        self.waits = PeerWaits([1, 2, 3], abort=self.abort, timed_out=self.is_timeout)

    def abort(self) -> None:
        self.aborted += 1
        for own in self.messages.values():
            for message in own:
                if not message.over.is_set():
                    message.end(RuntimeError("aborted"))

    @staticmethod
    def is_timeout(error: BaseException) -> bool:
        return "Timed out" in str(error)

    def run(self) -> None:
        def on_failure(peers: list[int], error: BaseException) -> Exception:
            assert not self.aborted, "the others must be able to hear why first"
            return SyncError(f"{peers}: {error}")

        self.waits.run(
            {peer: list(messages) for peer, messages in self.messages.items()},
            on_slow=self.slow.append,
            on_failure=on_failure,
            stopped=lambda: self.stopped,
        )

    def later(self, seconds: float, action: Callable[[], Any]) -> None:
        threading.Timer(seconds, action).start()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(waiting, "_LOOK_S", 0.02)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.05)


def test_all_messages_are_waited_for():
    exchange = Exchange()
    for peer in (3, 1, 2):
        for message in exchange.messages[peer]:
            exchange.later(0.01 * peer, message.end)
    exchange.run()
    assert all(message.over.is_set() for own in exchange.messages.values() for message in own)
    assert not exchange.aborted


@pytest.mark.usefixtures("impatient")
def test_a_slow_exchange_names_the_sites_that_it_waits_for():
    """Once; and a wait of usual length is not slow."""
    exchange = Exchange()
    for message in exchange.messages[2]:
        message.end()
    for peer in (1, 3):
        for message in exchange.messages[peer]:
            exchange.later(0.4, message.end)
    exchange.run()
    assert exchange.slow == [[1, 3]]
    assert exchange.waits._patience_s >= 0.6


def test_the_first_failure_ends_the_wait_for_all():
    """Although other peers are slow, and none of them is blamed."""
    exchange = Exchange()
    exchange.later(0.05, lambda: exchange.messages[3][0].end(RuntimeError("closed")))
    with pytest.raises(SyncError, match=r"^\[3\]: closed$"):
        exchange.run()
    assert exchange.aborted == 1


def test_a_timeout_names_every_site_that_was_silent():
    exchange = Exchange()
    exchange.messages[1][0].end()
    exchange.messages[1][1].end()

    def time_out() -> None:
        for peer in (2, 3):
            exchange.messages[peer][0].end(RuntimeError("Timed out"))

    exchange.later(0.05, time_out)
    with pytest.raises(SyncError, match=r"^\[2, 3\]: Timed out$"):
        exchange.run()


@pytest.mark.usefixtures("impatient")
def test_a_run_that_has_stopped_elsewhere_is_not_waited_for():
    exchange = Exchange()
    exchange.stopped = SyncError("site 5 stopped: the disk is full")
    with pytest.raises(SyncError, match="site 5 stopped: the disk is full"):
        exchange.run()
    assert exchange.aborted == 1


@contextmanager
def interrupted() -> Iterator[None]:
    """A signal comes soon, as Ctrl-C would."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_ends_an_exchange_and_leaves_nothing_pending():
    exchange = Exchange()
    with interrupted(), pytest.raises(KeyboardInterrupt):
        exchange.run()
    assert exchange.aborted == 1
    assert all(message.over.is_set() for own in exchange.messages.values() for message in own)


def test_a_signal_ends_the_wait_for_a_call():
    release = threading.Event()
    with interrupted(), pytest.raises(KeyboardInterrupt):
        in_thread(lambda: release.wait(30), timeout_s=30)
    assert is_blocked(), "the process must not take torch down now"
    release.set()


def test_a_call_that_does_not_come_back_is_given_up():
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0.05 s"):
        in_thread(lambda: release.wait(30), timeout_s=0.05)
    release.set()
    assert in_thread(lambda: "here", timeout_s=30) == "here"
    with pytest.raises(KeyError):
        in_thread(lambda: {}["nothing"], timeout_s=30)


# ----------------------------------------------------------------------------------------- at work


def test_a_silent_site_is_named_while_it_is_waited_for_and_at_the_timeout(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.2)
    monkeypatch.setattr(waiting, "_LOOK_S", 0.1)  # well before the timeout
    noticed = threading.Barrier(3)

    def work(transport):
        gather(transport, lambda _: b"here")
        if transport.sites != (1,):
            with pytest.raises(SyncError) as caught:
                gather(transport, lambda _: b"and here")
            with pytest.raises(SyncError, match="exchanging messages failed: an earlier exchange"):
                gather(transport, lambda _: b"again")
        noticed.wait(20)
        return None if transport.sites == (1,) else str(caught.value)

    messages = all_good(over_gloo(3, work, timeout_s=1.0))
    assert messages[1] is None
    # The second of the two to notice may read the first one's reason instead of its own clock.
    waited = r"exchanging messages failed: (site [02] stopped: )?no word from site 1 within 1 s"
    for message in (messages[0], messages[2]):
        assert re.match(waited, message)
    said = capsys.readouterr().err.splitlines()
    for site in (0, 2):
        assert f"site {site}: exchanging messages: waiting for site 1, up to 1 s" in said


def test_a_site_that_fails_tells_the_others_why():
    """Whatever they are doing: none says only that a connection was closed."""

    def work(transport):
        gather(transport, lambda _: b"here")
        if transport.sites == (2,):
            raise OSError("the disk is full")
        with pytest.raises(SyncError) as caught:
            gather(transport, lambda _: b"and here")
        return str(caught.value)

    *messages, failure = over_gloo(3, work)
    assert isinstance(failure, OSError)
    for message in all_good(messages):
        assert message.startswith("exchanging messages failed: ")
        assert message.endswith("site 2 stopped: OSError: the disk is full")


# ------------------------------------------------------------------------------- site 0's store


def launch(site: int, port: int, address: str = "127.0.0.1") -> Launch:
    return Launch(site=site, num_sites=2, address=address, port=port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reachable(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def test_a_run_over_one_interface_listens_on_that_interface_only(capsys):
    port = free_port()
    addresses = joining.resolve("127.0.0.1", port, 10)
    store, own = joining.host_store(launch(0, port), addresses, "lo")
    assert own == "127.0.0.1"
    assert reachable("127.0.0.1", port)
    assert not reachable("127.0.0.2", port)
    assert capsys.readouterr().err == ""
    other, _ = joining.reach_store(launch(1, port), addresses, 10)
    assert store.compare_set("key", "", "a") == other.compare_set("key", "", "b") == b"a"


def test_without_an_interface_all_addresses_listen():
    port = free_port()
    store, _ = joining.host_store(launch(0, port), joining.resolve("127.0.0.1", port, 10), None)
    assert reachable("127.0.0.2", port)
    del store


def test_an_address_outside_the_interface_is_said(capsys):
    port = free_port()
    addresses = joining.resolve("127.0.0.2", port, 10)
    store, _ = joining.host_store(launch(0, port, "127.0.0.2"), addresses, "lo")
    assert (
        "MASTER_ADDR 127.0.0.2 is not an address of --interface lo, so" in capsys.readouterr().err
    )
    del store


def test_an_address_that_leads_elsewhere_is_refused_at_site_0(monkeypatch):
    port = free_port()
    monkeypatch.setattr(joining, "_listen", lambda *_: socket.create_server(("127.0.0.1", port)))
    with pytest.raises(ConfigError, match=r"MASTER_ADDR 127.0.0.2 does not lead to this machine"):
        joining.host_store(
            launch(0, port, "127.0.0.2"), joining.resolve("127.0.0.2", port, 10), None
        )


def test_who_does_not_listen_is_said_during_the_wait_and_at_its_end(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    port = free_port()
    where = rf"site 0 at 127.0.0.1:{port} \(Connection refused\)"
    with pytest.raises(SyncError, match=f"no answer from site 0 at 127.0.0.1:{port} within 0.5 s"):
        joining.reach_store(launch(1, port), joining.resolve("127.0.0.1", port, 10), 0.5)
    assert re.search(f"site 1: waiting for {where}, up to 0.5 s", capsys.readouterr().err)


def test_what_is_no_store_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(joining, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(SyncError, match=f"no store of a run answers at 127.0.0.1:{port}"):
            joining.reach_store(launch(1, port), joining.resolve("127.0.0.1", port, 10), 30)


def test_sites_join_over_a_store_and_a_third_is_refused():
    """The whole way, in one process; as torchrun restarts it, a second attempt is another run."""
    port = free_port()

    def work(site: int, attempt: str = "0") -> Any:
        given = Launch(site=site, num_sites=2, address="localhost", port=port, attempt=attempt)
        transport = joining.open_transport(
            given, 2, lanes=lambda ranks: [(0, 0)], timeout_s=20, interface="lo"
        )
        answers = gather(transport, lambda own: f"site {own}".encode())
        return answers, transport

    results = together(lambda: work(0), lambda: work(1))
    assert [answers for answers, _ in all_good(results)] == [[b"site 0", b"site 1"]] * 2
    with pytest.raises(SyncError, match=rf"site 1 \(.*\) has joined already.*localhost:{port}"):
        work(1)
    with pytest.raises(ConfigError, match=f"MASTER_PORT {port} is in use"):
        work(0)
    for _, transport in results:
        transport.close()
