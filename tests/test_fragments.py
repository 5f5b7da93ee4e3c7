"""Fragments: parts of the model that are synced at different steps of a round."""

from __future__ import annotations

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
from fomoe.errors import ConfigError
from fomoe.fragments import Leg, fragment_of, legs, synced_again
from fomoe.planning import plan_run
from fomoe.run import Run
from fomoe.shapes import parameter_specs
from fomoe.state import entry
from fomoe.sync.since import Since
from fomoe.sync.transport import InMemoryTransport
from fomoe.training import merged_loss, run_local_steps, synchronize
from fomoe_sim.evaluate import answer_one
from fomoe_sim.options import Ask
from fomoe_sim.question import build

FOUR = {"model.num_layers": 4, "sync.fragments": 2, "local_steps": 4, "rounds": 2}


def names_of(run: Run, fragment: int) -> set[str]:
    """Segments of a fragment."""
    buckets = run.plan.segment_plan.buckets
    return {s.name for b in buckets if b.fragment == fragment for s in b.segments}


# ------------------------------------------------------------------------------------ what is cut


@pytest.mark.parametrize(
    ("order", "layers"), [("strided", [0, 1, 0, 1]), ("contiguous", [0, 0, 1, 1])]
)
def test_every_parameter_is_in_one_fragment_with_its_layer(order: str, layers: list[int]) -> None:
    config = tiny_config(FOUR, sync__fragment_order=order)
    for spec in parameter_specs(config):
        found = fragment_of(config, spec)
        if spec.layer is not None:
            assert found == layers[spec.layer], spec.name
        else:
            assert found == {"embedding.weight": 0}.get(spec.name, 1), spec.name
    plan = plan_run(config).segment_plan
    whole = plan_run(tiny_config(FOUR, sync__fragments=1)).segment_plan
    assert plan.numel == whole.numel
    names = [segment.name for bucket in plan.buckets for segment in bucket.segments]
    assert sorted(names) == sorted(s.name for b in whole.buckets for s in b.segments)
    assert [b.index for b in plan.buckets] == list(range(len(plan.buckets)))


def test_one_fragment_is_a_sync_at_the_rounds_end_and_nothing_else() -> None:
    config = tiny_config()
    assert legs(config, 0) == legs(config, config.rounds - 1) == (Leg(config.local_steps),)
    assert not synced_again(config)
    assert {b.fragment for b in plan_run(config).segment_plan.buckets} == {0}


REFUSED = {
    "steps": ({"local_steps": 6}, "sync.fragments 4 does not divide local_steps 6; "),
    "layers": ({"model.num_layers": 6}, "sync.fragments 4 does not divide model.num_layers 6"),
    "ddp": ({"method": "ddp"}, "sync.fragments 4 must be 1 with sync.average gradients"),
    "copies": ({"method": "copies"}, "sync.fragments 4 must be 1 with placement.kind copies"),
    "none": ({"sync.fragments": 0}, "sync.fragments 0"),
}


def test_the_refusal_names_what_divides() -> None:
    sizes = {"model.num_layers": 12, "local_steps": 32}
    with pytest.raises(ConfigError, match=r"local_steps 32 and model.num_layers 12: 1, 2, 4$"):
        tiny_config(sizes, sync__fragments=3)
    for number in (1, 2, 4):
        tiny_config(sizes, sync__fragments=number)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_and_never_rounded(case: str) -> None:
    more, message = REFUSED[case]
    options = {"model.num_layers": 8, "local_steps": 8, "sync.fragments": 4, **more}
    with pytest.raises(ConfigError) as caught:
        tiny_config(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- what moves


@pytest.mark.parametrize("layout", ["cyclic", "one holder", "diloco", "uneven", "spes"])
@pytest.mark.parametrize("order", ["strided", "contiguous"])
def test_every_element_is_reduced_once_per_round(layout: str, order: str) -> None:
    """Sites move by constants of their own: a fragment's sync shows the exact mean, elsewhere
    nothing has changed."""
    plain = {"outer.lr": 1.0, "outer.momentum": 0.0, "sync.weight": "uniform"}
    config = tiny_config({**LAYOUTS[layout], **FOUR, **plain}, sync__fragment_order=order)
    run = make_run(config)
    anchors = anchors_of(run)
    with torch.no_grad():
        for site, own in run.sites.items():
            for parameter in own.parameters.values():
                parameter += 2.0**site
    done: set[str] = set()
    for fragment in range(2):
        before = parameters_of(run)
        run.sync.sync_fragment(fragment)
        own_names = names_of(run, fragment)
        assert own_names
        assert not own_names & done
        done |= own_names
        after = parameters_of(run)
        others = [key for key in after if key[1] not in own_names]
        assert_same_bits({k: after[k] for k in others}, {k: before[k] for k in others})
        for bucket in run.plan.segment_plan.buckets:
            for segment in bucket.segments if bucket.fragment == fragment else ():
                trainers = segment.trainers
                moved = sum(2.0**site for site in trainers) / max(len(trainers), 1)
                for site in segment.holders if trainers else ():
                    got = after[site, segment.name] - anchors[segment.name]
                    torch.testing.assert_close(got, torch.full_like(got, moved))
    assert done == {s.name for b in run.plan.segment_plan.buckets for s in b.segments}


CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, contiguous": {"sync.codec": "bf16", "sync.fragment_order": "contiguous"},
    "int8, tokens": {"sync.codec": "int8", "sync.weight": "tokens"},
    "int4, four": {"sync.codec": "int4", "sync.fragments": 4},
    "one holder, local": LAYOUTS["one holder, local"],
    "diloco": LAYOUTS["diloco"],
    "diloco-half": LAYOUTS["diloco-half"],
    "resident-routing, bias": {"method": "resident-routing", "router.balance": "both"},
    "spes": LAYOUTS["spes"],
    "Adam": {"outer.optimizer": "Adam", "outer.lr": 0.01},
}


@pytest.mark.parametrize("case", CASES)
def test_a_fragments_replicas_are_equal_after_its_sync_and_a_proxy_run_gives_the_same_bits(
    case: str,
) -> None:
    """Parameters, anchors, outer state, residuals and counts; bytes are those planned."""
    config = tiny_config({**FOUR, **CASES[case]})
    plan = plan_run(config)

    def work(transport):
        run = make_run(config, transport)
        seen, real = [], run.sync.sync_fragment

        def watch(fragment: int) -> None:
            real(fragment)
            own = parameters_of(run)
            seen.append({k: v for k, v in own.items() if k[1] in names_of(run, fragment)})

        run.sync.sync_fragment = watch
        hashes = []
        for round_idx in range(2):
            run_local_steps(run, round_idx)
            synchronize(run)
            hashes.append(run.sync.check_replicas())
        states = {(s, n): t for s in run.sites for n, t in run.sync.state_of(s).items()}
        counts = {s: run.transport.counts[s].state() for s in run.sites}
        return seen, parameters_of(run) | states, counts, hashes, merged_loss(run).loss

    results = all_good(over_gloo(4, work))
    seen, everything, counts, hashes, loss = work(InMemoryTransport(range(4)))
    assert_same_bits({k: v for own in results for k, v in own[1].items()}, everything)
    assert [own[4] for own in results] == [loss] * 4
    number = config.sync.fragments
    assert len(seen) == 2 * (number - 1) + len(synced_again(config)) == 3 * (number - 1)
    for position, own in enumerate(seen):
        assert_same_bits({k: v for r in results for k, v in r[0][position].items()}, own)
        for (_, name), value in own.items():
            holder = min(site for site, other in own if other == name)
            assert torch.equal(value, own[holder, name]), f"{name} differs after its sync"
    for site, (_, _, own_counts, own_hashes, _) in enumerate(results):
        assert all(a.items() <= b.items() for a, b in zip(own_hashes, hashes, strict=True))
        for own in (own_counts[site], counts[site]):
            for kind, per_round in (
                ("payload", plan.payload_per_round(site)),
                ("wire", plan.wire_per_round(site)),
            ):
                sent = own[kind].get("shared", 0) + own[kind].get("expert", 0)
                assert sent == config.rounds * per_round


def test_at_the_runs_end_every_site_has_the_anchors() -> None:
    run = make_run(tiny_config(FOUR))
    for round_idx in range(2):
        run_local_steps(run, round_idx)
        synchronize(run)
        anchors = anchors_of(run)
        differ = {n for (_, n), v in parameters_of(run).items() if not torch.equal(v, anchors[n])}
        # Within the run fragment 0 has moved on since its sync; fragment 1 is due now.
        assert differ == (names_of(run, 0) if round_idx == 0 else set())


def test_the_merged_model_is_that_of_the_anchors_and_the_sites_keep_their_own() -> None:
    config = tiny_config(FOUR)
    run = make_run(config)
    run_local_steps(run, 0)
    synchronize(run)
    before = parameters_of(run)
    loss = merged_loss(run).loss
    assert_same_bits(parameters_of(run), before)
    with torch.no_grad():
        for site, own in run.sites.items():
            for segment in own.segments:
                own.view(segment).copy_(run.sync.anchor(segment))
            del site
    assert merged_loss(run).loss == loss
    with run.sync.whole():
        assert_same_bits(
            parameters_of(run), {k: run.sync.anchors.values[k[1]].detach() for k in before}
        )


def test_counts_start_anew_at_a_fragments_own_sync() -> None:
    """By hand: two layers with experts, one in each fragment."""
    config = tiny_config(sync__fragments=2, num_sites=1, placement__replication_factor=1)
    site = make_run(config).sites[0]
    since = Since(config, site)
    site.counter.executed_LE[0, 3] += 5
    site.counter.executed_LE[1, 3] += 7
    site.counter.tokens += 10
    first = since.take(0)
    assert (first.tokens, first.executed[0, 3], first.executed[1, 3]) == (10, 5, 7)
    site.counter.executed_LE[0, 4] += 2
    site.counter.executed_LE[1, 4] += 1
    site.counter.tokens += 20
    second = since.take(1)
    assert (second.tokens, second.executed[1, 3], second.executed[1, 4]) == (30, 7, 1)
    site.counter.tokens += 1
    routing = since.end_round()
    assert routing.tokens == 31
    assert int(routing.executed_LE[1, 3]) == 7
    site.counter.executed_LE[0, 5] += 9
    site.counter.tokens += 4
    third = since.take(0)
    assert (third.tokens, third.executed[0, 3]) == (25, 0)
    assert (third.executed[0, 4], third.executed[0, 5]) == (2, 9)


# ------------------------------------------------------------------------------------------- runs

WORDS = ("local_steps=2", "sync.fragments=2", "rounds=3", "sync.weight=tokens")


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_resume_goes_on_to_the_bit_and_a_saved_round_merges_as_in_the_run(tmp_path, codec):
    """From the middle of the run, where fragments have different ages."""
    config = write_config(tmp_path)
    words = [config, *WORDS, f"sync.codec={codec}", "run.eval_merged_every=1"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trained(*words, f"run.dir={straight}")
    trained(*words, f"run.dir={broken}")
    for round_idx in (2, 3):
        remove_parts(broken, round_idx, range(3))
    trained(*words, f"run.dir={broken}", "--resume")
    for site in range(3):
        own, expected = (load_part(run, 3, site)[0] for run in (broken, straight))
        assert_same_bits(own, expected)
    early = load_part(straight, 1, 0)[0]
    assert int(early[entry("since", "tokens")].sum()) > 0
    assert any(
        not torch.equal(value, early[name.replace("param/", "anchor/", 1)])
        for name, value in early.items()
        if name.startswith("param/")
    )
    for row in records(straight, "merged"):
        asked = fomoe("eval", straight, "--round", row["round"] + 1, "--json")
        assert asked.status == 0, asked.err
        assert asked.json["merged"]["loss"] == pytest.approx(row["val_loss_merged"], rel=1e-6)


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_dry_run_run_and_cost_model_say_the_same_bytes(tmp_path, codec):
    config = write_config(tmp_path)
    words = [config, *WORDS, f"sync.codec={codec}"]
    dry = fomoe("train", *words, "--dry-run", "--json").json
    ended = trained(*words)
    for kind in ("payload", "wire"):
        key = f"{kind}_bytes_per_site_per_round_by_site"
        assert dry[key] == ended[key]
        per_sync = [row[f"{kind}_bytes_per_site"] for row in dry["fragments"]]
        mean = dry[f"{kind}_bytes_per_site_per_round"]
        assert mean == pytest.approx(sum(per_sync) + per_sync[0] / 3)
    assert [row["layers"] for row in dry["fragments"]] == [[0], [1]]
    assert [row["ends_after_step"] for row in dry["fragments"]] == [1, 2]
    cut = config.with_name("cut.yaml")
    cut.write_text(f"{config.read_text()}sync: {{codec: {codec}, fragments: 2, weight: tokens}}\n")
    asked = answer_one(build(Ask(config=str(cut)), "fomoe"))
    assert asked["needs"] == "runs today"
    assert asked["fragments"] == 2
    # The cost model does not cut what crosses by fragments: a block of the codec more or less.
    for kind in ("payload", "wire"):
        per_sync = [row[f"{kind}_bytes_per_site"] for row in dry["fragments"]]
        assert asked[f"{kind}_bytes_per_site_per_round"] == pytest.approx(sum(per_sync), rel=0.01)
