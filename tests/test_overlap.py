"""Syncs that run beside local steps: what is merged, when, and with what."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import (
    LAYOUTS,
    all_good,
    anchors_of,
    assert_same_bits,
    make_run,
    over_gloo,
    parameters_of,
    tiny_config,
)
from helpers_cli import fomoe, load_part, records, trained, write_config

from fomoe.checkpoint import remove_parts
from fomoe.errors import ConfigError, SyncError
from fomoe.fragments import Leg, legs, synced_again
from fomoe.planning import plan_run
from fomoe.sync.exchange import gather
from fomoe.sync.transport import InMemoryTransport
from fomoe.training import merged_loss, run_local_steps, synchronize

TWO = {"sync.fragments": 2, "local_steps": 6, "rounds": 2, "sync.overlap_steps": 2}


# ------------------------------------------------------------------------------------- the schedule


def test_no_sync_is_under_way_between_two_rounds() -> None:
    config = tiny_config(TWO)
    first = (Leg(1, begins=0), Leg(2, ends=0))
    assert legs(config, 0) == (*first, Leg(1, begins=1), Leg(2))
    # The result of the run's last sync is the model, so nothing is mixed into it.
    assert legs(config, 1) == (*first, Leg(3))
    assert synced_again(config) == range(1)


def test_without_steps_beside_it_a_sync_blocks() -> None:
    config = tiny_config(TWO, sync__overlap_steps=0)
    assert legs(config, 0) == legs(config, 1) == (Leg(3, begins=0, ends=0), Leg(3))
    assert config.sync.own_share == 0
    assert tiny_config(TWO).sync.own_share == 0.5
    assert tiny_config(TWO, sync__mix=0.0).sync.own_share == 0


REFUSED = {
    "too long": ({"sync.overlap_steps": 3}, "sync.overlap_steps 3 must be below the 3 local steps"),
    "one fragment": (
        {"sync.fragments": 1, "sync.overlap_steps": 6},
        "sync.overlap_steps 6 must be below the 6 local steps between two syncs",
    ),
    "nothing to mix": (
        {"sync.overlap_steps": 0, "sync.mix": 0.5},
        "sync.mix 0.5 has no meaning without steps beside a sync (sync.overlap_steps)",
    ),
    "ddp": (
        {"sync.fragments": 1, "method": "ddp"},
        "sync.overlap_steps 2 must be 0 with sync.average gradients",
    ),
    "copies": (
        {"sync.fragments": 1, "method": "copies"},
        "sync.overlap_steps 2 must be 0 with placement.kind copies",
    ),
    "share": ({"sync.mix": 1.5}, "sync.mix 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_overlap_is_refused_in_one_line(case: str) -> None:
    more, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        tiny_config({**TWO, **more})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_a_mix_by_hand(mix: float) -> None:
    """Two sites: the anchor comes from when the sync began, the mix from what is there now."""
    config = tiny_config(
        TWO,
        num_sites=2,
        sync__mix=mix,
        outer__lr=0.5,
        outer__momentum=0.0,
        sync__weight="uniform",
    )
    run = make_run(config)
    name = "layers.0.attention.q_proj.weight"
    start = anchors_of(run)[name].double()
    other = "layers.1.attention.q_proj.weight"
    with torch.no_grad():
        for site, own in run.sites.items():
            own.parameters[name] += 1.0 + 2 * site  # 1 and 3: their mean is 2
        run.sync.begin(0)
        for own in run.sites.values():
            own.parameters[name] += 0.25
            own.parameters[other] += 0.25
    before = parameters_of(run)
    run.sync.end(0)
    after = parameters_of(run)
    anchor = start + 0.5 * 2
    torch.testing.assert_close(anchors_of(run)[name].double(), anchor)
    for site in (0, 1):
        own = start + 1.25 + 2 * site
        expected = mix * own + (1 - mix) * anchor
        torch.testing.assert_close(after[site, name].double(), expected)
        assert torch.equal(after[site, other], before[site, other])
    if mix == 0:
        assert torch.equal(after[0, name], after[1, name])


@pytest.mark.parametrize(("mix", "tokens"), [(0.0, 0), (0.5, 20)])
def test_what_is_dropped_is_not_counted(mix: float, tokens: int) -> None:
    """Tokens of the steps beside a sync weigh in the next one, unless the merge drops them."""
    run = make_run(tiny_config(TWO, sync__mix=mix))
    for own in run.sites.values():
        own.counter.tokens += 10
    run.sync.begin(0)
    for own in run.sites.values():
        own.counter.tokens += 20
    run.sync.end(0)
    for own in run.sites.values():
        own.counter.tokens += 5
    assert [s.take(0).tokens for s in run.sync.since.values()] == [tokens + 5] * 4
    assert [s.take(1).tokens for s in run.sync.since.values()] == [35] * 4


CASES: dict[str, dict[str, Any]] = {
    "one fragment": {"sync.fragments": 1, "sync.overlap_steps": 5},
    "fp32": {},
    "int8, half": {"sync.codec": "int8", "sync.mix": 0.0, "sync.weight": "tokens"},
    "int4, bias": {"sync.codec": "int4", "router.balance": "both", "sync.mix": 0.25},
    "one holder": LAYOUTS["one holder"],
    "diloco, Adam": {"method": "diloco", "outer.optimizer": "Adam", "outer.lr": 0.01},
    "resident-routing": LAYOUTS["resident-routing"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_distributed_run_in_which_steps_run_meanwhile_gives_the_bits_of_a_proxy_run(
    case: str,
) -> None:
    """And counts the bytes that are planned; at the end every site has the anchors."""
    config = tiny_config({**TWO, **CASES[case]})
    plan = plan_run(config)

    def work(transport):
        run = make_run(config, transport)
        hashes = []
        for round_idx in range(2):
            run_local_steps(run, round_idx)
            synchronize(run)
            hashes.append(run.sync.check_replicas())
            if round_idx == 0:
                middle = parameters_of(run)
        states = {(s, n): t for s in run.sites for n, t in run.sync.state_of(s).items()}
        counts = {s: run.transport.counts[s].state() for s in run.sites}
        everything = parameters_of(run)
        anchors = run.sync.anchors.values
        for (_, name), value in everything.items():
            assert name not in anchors or torch.equal(value, anchors[name]), name
        return everything | states, middle, counts, hashes, merged_loss(run).loss

    results = all_good(over_gloo(4, work))
    everything, middle, counts, hashes, loss = work(InMemoryTransport(range(4)))
    assert_same_bits({k: v for own in results for k, v in own[0].items()}, everything)
    assert_same_bits({k: v for own in results for k, v in own[1].items()}, middle)
    assert [own[4] for own in results] == [loss] * 4
    for site, (_, _, own_counts, own_hashes, _) in enumerate(results):
        assert all(a.items() <= b.items() for a, b in zip(own_hashes, hashes, strict=True))
        assert own_counts[site] == counts[site]
        for kind, per_round in (
            ("payload", plan.payload_per_round(site)),
            ("wire", plan.wire_per_round(site)),
        ):
            sent = counts[site][kind].get("shared", 0) + counts[site][kind].get("expert", 0)
            assert sent == config.rounds * per_round


# ------------------------------------------------------------------------------------- in a thread


def test_local_steps_run_while_a_sync_waits_for_a_slow_site() -> None:
    """Site 1 begins only when site 0 has taken its steps and says so."""
    config = tiny_config(TWO, num_sites=2)
    stepped = threading.Event()

    def work(transport):
        run = make_run(config, transport)
        (site,) = run.sites.values()
        if site.site == 1:
            assert stepped.wait(20)
            run.sync.begin(0)
        else:
            run.sync.begin(0)
            site.run_local_steps(1, lambda _: None)
            # Messages of the main thread do not mix with those of the sync that is under way.
            stepped.set()
        assert gather(transport, lambda s: bytes([s])) == [b"\0", b"\1"]
        run.sync.end(0)
        return True

    assert all_good(over_gloo(2, work)) == [True, True]


def test_a_site_that_fails_ends_the_sync_that_is_under_way_with_its_reason() -> None:
    config = tiny_config(TWO, num_sites=2)

    def work(transport):
        run = make_run(config, transport)
        if transport.sites == (1,):
            raise SyncError("the disk is full")
        run.sync.begin(0)
        before = parameters_of(run)
        with pytest.raises(SyncError, match="the disk is full"):
            run.sync.end(0)
        assert_same_bits(parameters_of(run), before)

    first, second = over_gloo(2, work)
    assert first is None
    assert "the disk is full" in str(second)


def test_a_state_that_is_not_finite_is_found_before_anything_is_merged() -> None:
    run = make_run(tiny_config(TWO))
    with torch.no_grad():
        run.sites[2].parameters["embedding.weight"][0, 0] = float("nan")
    with pytest.raises(SyncError, match="site 2: its parameters are not finite"):
        run.sync.begin(0)


# ------------------------------------------------------------------------------------------- runs

WORDS = ("local_steps=4", "sync.fragments=2", "sync.overlap_steps=1", "rounds=3")


def test_a_resume_goes_on_to_the_bit(tmp_path) -> None:
    """No sync is under way at a checkpoint, whether one is saved or not."""
    config = write_config(tmp_path)
    words = [config, *WORDS, "sync.codec=int8", "run.eval_merged_every=1"]
    straight, broken, seldom = (tmp_path / name for name in ("straight", "broken", "seldom"))
    trained(*words, f"run.dir={straight}")
    trained(*words, f"run.dir={broken}")
    trained(*words, f"run.dir={seldom}", "run.checkpoint_every=0", "run.eval_merged_every=0")
    for round_idx in (2, 3):
        remove_parts(broken, round_idx, range(3))
    trained(*words, f"run.dir={broken}", "--resume")
    for site in range(3):
        own, again, rare = (load_part(run, 3, site)[0] for run in (straight, broken, seldom))
        assert_same_bits(again, own)
        assert_same_bits(
            *({k: v for k, v in part.items() if k.startswith("anchor/")} for part in (own, rare))
        )
    for row in records(straight, "round"):
        assert 0 < row["utilisation"] < 1
        assert row["utilisation"] == pytest.approx(
            row["train_s"] / (row["train_s"] + row["sync_s"])
        )
        assert row["peak_bytes_per_s"] is None  # nothing crosses a link in one process
        assert sum(row["wire_bytes_by_sync"]) == row["wire_bytes"]
        assert len(row["wire_bytes_by_sync"]) == (3 if row["round"] == 2 else 2)
    dry = fomoe("train", *words, "--dry-run", "--json").json
    steps = [(r["begins_after_step"], r["ends_after_step"]) for r in dry["fragments"]]
    assert steps == [(1, 2), (3, 4)]
