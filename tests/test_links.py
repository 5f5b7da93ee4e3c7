"""The links that a run measures at its start, and what it says of a sync on them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from conftest import (
    all_good,
    anchors_of,
    assert_same_bits,
    make_run,
    one_round,
    over_gloo,
    tiny_config,
)

from fomoe.planning import plan_run
from fomoe.ranks import Ranks
from fomoe.sync import links
from fomoe.sync.gloo import GlooTransport
from fomoe.sync.links import (
    Link,
    Links,
    links_line,
    links_record,
    measure_links,
    probes,
    sync_estimate,
)
from fomoe.sync.transport import InMemoryTransport, Message


def test_all_sites_get_the_same_links_and_their_counts_stay() -> None:
    def work(transport: GlooTransport) -> tuple[Links, dict[str, Any]]:
        (counts,) = transport.counts.values()
        counts.add("shared", payload=3, wire=5)
        found = measure_links(transport)
        assert transport.counts[transport.sites[0]] is counts
        return found, counts.state()

    results = all_good(over_gloo(3, work))
    found, counts = results[0]
    assert [link.sites for link in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(0 < link.rtt_s < 10 and min(link.rates) > 0 for link in found.pairs)
    assert min(found.probe_bytes) > 0
    assert counts == {"payload": {"shared": 3}, "wire": {"shared": 5}}
    assert all(result == (found, counts) for result in results)


class Line:
    """A transport whose messages to this site take a time that a test gives."""

    remote, members, inside = True, (0, 1), Ranks()

    def __init__(self, clock: list[float], rtt_s: float, rate: float, slow: int = 0) -> None:
        self.sites, self.counts, self.slow = (0,), {}, slow
        self.clock, self.rtt_s, self.rate, self.sizes = clock, rtt_s, rate, [0]

    def move(self, what: str, messages: list[Message]) -> list[torch.Tensor | None]:
        (tensor,) = {id(m.tensor): m.tensor for m in messages}.values()
        assert tensor is not None
        self.sizes.append(tensor.nbytes)
        slow = self.slow / tensor.nbytes if 2**14 <= tensor.nbytes < self.slow else 1.0
        self.clock[0] += self.rtt_s + slow * tensor.nbytes / self.rate
        return [None, tensor]  # the other site sends the same


@pytest.mark.parametrize(
    ("rate", "largest"),
    [(1.25e5, 2**16), (1.25e6, 2**18), (2.5e7, 2**24), (1.25e7, 2**22), (1.25e9, 2**24)],
)
def test_a_message_grows_until_it_tells_the_rate_from_the_delay(
    monkeypatch: pytest.MonkeyPatch, rate: float, largest: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    line = Line(clock, 0.05, rate)
    rtt_s, found = links._measure(line, (0, 1))  # type: ignore[arg-type]
    assert rtt_s == pytest.approx(0.05, rel=1e-3)
    assert found == pytest.approx(rate, rel=1e-2)
    assert max(line.sizes) == largest
    assert sum(line.sizes) < 1.4 * largest


def test_a_rate_that_still_grows_is_not_the_link_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP's first round trips are slow; what is sent in them must not end the measurement."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    line = Line(clock, 0.02, 1.25e7, slow=2**20)  # every message below takes as long as it does
    _, found = links._measure(line, (0, 1))  # type: ignore[arg-type]
    assert found == pytest.approx(1.25e7, rel=0.01)


def test_who_measures() -> None:
    def few(transport: GlooTransport) -> list[bool]:
        return [probes(wanted, transport) for wanted in (None, True, False)]

    assert all_good(over_gloo(2, few)) == [[True, True, False]] * 2
    assert not probes(True, InMemoryTransport(range(2)))
    line = Line([0.0], 0.0, 1.0)
    line.members = tuple(range(9))  # type: ignore[assignment]
    assert [probes(wanted, line) for wanted in (None, True)] == [False, True]  # type: ignore[arg-type]
    line.inside = Ranks()
    line.inside.rank = 1
    assert not probes(True, line)  # type: ignore[arg-type]


def test_the_numbers_of_a_run_are_those_without_it() -> None:
    config = tiny_config(num_sites=2)

    def work(transport: GlooTransport, measured: bool) -> tuple[Any, Any]:
        run = make_run(config, transport)
        if measured:
            measure_links(transport)
        one_round(run)
        return anchors_of(run), run.site_counts()

    with_it = all_good(over_gloo(2, lambda t: work(t, True)))
    without = all_good(over_gloo(2, lambda t: work(t, False)))
    for (anchors, counts), (other, same) in zip(with_it, without, strict=True):
        assert_same_bits(anchors, other)
        assert counts == same


def made(rates: dict[tuple[int, int], tuple[float, float]], rtt_s: float = 0.0) -> Links:
    return Links(
        pairs=tuple(Link(sites=p, rtt_s=rtt_s, rates=r) for p, r in rates.items()),
        probe_bytes=(1,) * 4,
    )


def test_a_sync_takes_the_bytes_of_the_plan_over_the_rate() -> None:
    """Equal sites, each behind its own line: bytes sent over its rate, and the round trips."""
    plan = plan_run(tiny_config(method="diloco"))
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    size, seconds = sync_estimate(plan, made(dict.fromkeys(pairs, (1e4, 1e4)), rtt_s=0.5))
    assert size == max(traffic.wire for traffic in plan.traffic)
    assert seconds == pytest.approx(size / 1e4 + 5 * 0.5, rel=1e-3)


def test_one_slow_link_holds_the_sync_up() -> None:
    plan = plan_run(tiny_config(method="diloco"))
    rates = {(a, b): (1e4, 1e4) for a in range(4) for b in range(a + 1, 4)}
    size, seconds = sync_estimate(plan, made(rates | {(1, 3): (1e4, 1e2)}))
    assert seconds == pytest.approx(size / 3 / 1e2, rel=1e-2)  # a third of it is for site 1


@pytest.mark.parametrize(
    "options", [{"placement.replication_factor": 1}, {"method": "copies"}, {"sync.codec": "int8"}]
)
def test_every_kind_of_plan_is_answered(options: dict[str, Any]) -> None:
    plan = plan_run(tiny_config(options))
    rates = {(a, b): (1e4, 1e4) for a in range(4) for b in range(a + 1, 4)}
    size, _ = sync_estimate(plan, made(rates))
    assert size == max(traffic.wire for traffic in plan.traffic)


def test_the_largest_fragment_is_told() -> None:
    plan = plan_run(tiny_config({"sync.fragments": 2, "model.num_layers": 4}, method="diloco"))
    rates = {(a, b): (1e4, 1e4) for a in range(4) for b in range(a + 1, 4)}
    size, _ = sync_estimate(plan, made(rates))
    assert size == max(traffic.wire for fragment in plan.fragments for traffic in fragment)
    assert size < plan.traffic[0].wire


def test_the_line_and_the_record() -> None:
    plan = plan_run(tiny_config(num_sites=2, method="diloco"))
    found = made({(0, 1): (12.5e6, 1.25e6)}, rtt_s=0.051)
    size, seconds = sync_estimate(plan, found)
    assert links_line(plan, found) == (
        f"links: site 0-1 100 and 10 Mbit/s, 51 ms; a sync of {size / 1e6:.3g} MB takes about "
        f"{seconds:.2g} s"
    )
    assert links_record(plan, found)["sync_s"] == seconds


def test_many_links_are_told_in_one_short_line() -> None:
    plan = plan_run(tiny_config(num_sites=6, method="diloco"))
    rates = {(a, b): (1e6, 1e6) for a in range(6) for b in range(a + 1, 6)}
    line = links_line(plan, made(rates | {(2, 4): (1e5, 1e5)}))
    assert line.startswith("links: 15 pairs, slowest site 2-4 0.8 Mbit/s, 0 ms, fastest site 4-5 8")
