"""350 drawn questions: monotone, ordered, summed, in range, and the same alone as in a grid."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from helpers_cli import fomoe

from fomoe_sim.cluster import accelerator_preset
from fomoe_sim.evaluate import answer_one, evaluate
from fomoe_sim.methods import METHODS, PUBLIC
from fomoe_sim.options import Ask
from fomoe_sim.plan import Constraints, command, pareto, search
from fomoe_sim.question import Question, baseline, build
from fomoe_sim.sites import grid
from fomoe_sim.solve import days_within, least, utilisation_of
from fomoe_sim.trainer import ConfigError

GROUPS, EACH = 12, 25
MODELS = ("olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b", "100b-moe", "proxy-54m", "10b")
RATES = np.geomspace(1e6, 1e14, 9)


def draw(chance: random.Random) -> tuple[Ask, str]:
    """What a user might ask; contradictions are left to the caller."""
    method = METHODS[chance.choice(PUBLIC)]
    model = chance.choice(MODELS)
    sites = chance.choice((1, 2, 3, 5, 8))
    accelerator = chance.choice(("A100", "H100", "B200"))
    placed = method.placed and model != "10b"
    return Ask(
        model=model,
        sites=sites,
        accelerators=chance.choice((1, 8, 32)),
        accelerator=accelerator,
        batch_tokens=float(2**24),
        replication=chance.randint(1, sites) if placed else None,
        local_steps=chance.choice((1, 2, 7, 32, 100, 500)),
        bits=chance.choice((None, 0.11, 4.0, 16.0)),
        fragments=None if method.every_step else chance.choice((None, 1, 3, 6)),
        overlap_steps=None if method.every_step else chance.choice((None, 0, 1, 3)),
        rtt_ms=chance.choice((None, 0.0, 300.0)),
        mtbf_hours=chance.choice((None, 50.0)),
        states=chance.choice(("fp32", "mixed")),
        precision=None if accelerator == "A100" else chance.choice((None, "fp8")),
        outer_on=None if method.every_step else chance.choice((None, "accelerator", "disk")),
        mfu=chance.choice((None, 0.3)),
    ), method.name


def check(row):
    """What holds for every answer."""
    assert 0 < row["utilisation"] <= 1
    assert 0 < row["goodput"] <= 1
    assert 0 < row["executed_fraction"] <= 1
    assert 0 <= row["coverage_loss_probability"] <= 1
    assert 0 < row["mfu"] < 1
    assert row["idle_usd"] >= 0
    assert row["days"] >= row["days_without_failures"]
    assert row["days_at_equal_work"] >= row["days"] * (1 - 1e-12)
    assert row["days_at_equal_loss"] >= row["days"] * (1 - 1e-12)
    for name in ("days", "cost_usd"):
        assert row[f"{name}_low"] <= row[name] * (1 + 1e-9) <= row[f"{name}_high"] * (1 + 2e-9)
    spent = row["local_steps"] * row["step_time_s"] + row["exposed_s_per_round"]
    assert row["round_time_s"] == pytest.approx(spent)
    assert sum(row["tokens_per_step_by_site"]) * row["local_steps"] == pytest.approx(
        row["tokens_per_s"] * row["round_time_s"]
    )
    by_site = row["wire_bytes_per_site_per_round_by_site"]
    assert np.mean(by_site) == pytest.approx(row["wire_bytes_per_site_per_round"], rel=1e-6, abs=1)
    inside = [p["bytes"] for p in row["memory_parts"].values() if p["where"] == "accelerator"]
    assert sum(inside) == pytest.approx(row["memory_bytes_per_accelerator"], rel=1e-6)


def same(one, other):
    """Equal rows, to the rounding of another order of sums."""
    for name, value in other.items():
        number = isinstance(value, float)
        assert one[name] == (pytest.approx(value, rel=1e-12) if number else value), name


@pytest.mark.parametrize("group", range(GROUPS))
def test_drawn_questions(group):
    chance = random.Random(group)
    done = 0
    while done < EACH:
        ask, method = draw(chance)
        try:
            question = build(ask, method)
            row = answer_one(question)
        except ConfigError:
            continue  # too many fragments or too small a batch: refused, in one line
        done += 1
        check(row)
        swept = evaluate([grid(question, bandwidth=RATES)])
        for name, sign in (("utilisation", 1), ("days_without_failures", -1)):
            steps = sign * np.diff(np.array(swept.values[name]))
            assert (steps >= -1e-9 * np.abs(swept.values[name][1:])).all(), name
        # Fewer bits never take longer, and sites that fail more often neither.
        bits = np.array([0.11, 4.0, 16.0, 32.0])
        costs = np.array(evaluate([grid(question, bits=bits)]).values["round_time_s"])
        assert (np.diff(costs) >= -1e-9 * costs[1:]).all()
        frail, firm = (
            answer_one(replace(question, ask=replace(question.ask, mtbf_hours=hours)))
            for hours in (20.0, 2000.0)
        )
        for name in ("days", "cost_usd", "failures_per_run", "coverage_loss_probability"):
            assert frail[name] >= firm[name] * (1 - 1e-9), name
        assert frail["goodput"] <= firm["goodput"]
        # A point of a grid is the single question of that point.
        rate = float(RATES[3])
        alone = replace(question, cluster=question.cluster.with_bandwidth(rate, rate))
        same(evaluate([grid(alone)]).rows()[0], swept.rows()[3])
        axes = {"local_steps": [3, 64], "bits": [32.0, 2.0]}
        if not question.method.every_step:
            axes |= {"fragments": [1, 5], "overlap_steps": [0, 2]}
        pair = evaluate([grid(question, **axes)]).rows()
        for index in range(2):
            one = replace(question, **{name: values[index] for name, values in axes.items()})
            same(evaluate([grid(one)]).rows()[0], pair[index])


def unequal(chance: random.Random, question: Question) -> Question:
    """The same question where accelerators, counts, links, prices and uplinks differ by site."""
    names = ("H100", "H200", "B200")
    sites = tuple(
        replace(
            site,
            accelerator=accelerator_preset(chance.choice(names)),
            count=chance.choice((8, 16, 32)),
            up_bps=10.0 ** chance.uniform(8, 11),
            down_bps=10.0 ** chance.uniform(8, 11),
            price_per_hour=(1.0, chance.choice((1.0, 4.0))),
            egress_per_gb=(0.0, chance.choice((0.0, 0.1))),
            uplink=chance.choice((None, "shared")),
        )
        for site in question.cluster.sites
    )
    cluster = replace(question.cluster, sites=sites, uplinks=(("shared", 1e9),))
    return replace(question, cluster=cluster)


@pytest.mark.parametrize("group", range(4))
def test_drawn_questions_of_unequal_sites(group):
    """Sums, ranges and order hold too; speed shares end together and never take longer."""
    chance = random.Random(500 + group)
    done = 0
    while done < EACH // 2:
        ask, method = draw(chance)
        try:
            question = unequal(chance, build(replace(ask, mfu=None, precision=None), method))
            row = answer_one(question)
            equal = answer_one(replace(question, split="equal"))
            alone = answer_one(baseline(question))
        except ConfigError:
            continue
        done += 1
        for one in (row, equal, alone):
            check(one)
        assert row["step_time_s"] <= equal["step_time_s"] * (1 + 1e-9)
        assert alone["accelerators"] == row["accelerators"] == sum(question.cluster.counts)
        assert alone["executed_fraction"] == 1
        assert sum(row["tokens_per_step_by_site"]) == pytest.approx(question.batch_tokens)
        same(row, evaluate([grid(question), grid(replace(question, split="equal"))]).rows()[0])


@pytest.mark.parametrize("seed", range(20))
def test_what_is_solved_holds_and_less_does_not(seed):
    chance = random.Random(1000 + seed)
    what = chance.choice(("bandwidth", "local_steps", "break_even"))
    target = utilisation_of(chance.choice((0.5, 0.9, 0.99)))
    while True:
        ask, method = draw(chance)
        if ask.sites == 1 or (what == "local_steps" and METHODS[method].every_step):
            continue
        try:
            question = build(ask, method)
            holds, name = target, what
            if what == "break_even":
                holds, name = days_within(answer_one(baseline(question))["days"]), "bandwidth"
            solved = least(question, name, holds, "--utilisation")
        except ConfigError:
            continue
        break
    assert holds(evaluate([grid(solved)])) == [True]
    if what == "local_steps":
        fewer = replace(solved, local_steps=solved.local_steps - 1)
        assert solved.local_steps == 1 or holds(evaluate([grid(fewer)])) == [False]
    else:
        rate = solved.cluster.bandwidth_bps / 1.001
        lower = replace(solved, cluster=solved.cluster.with_bandwidth(rate, rate))
        assert rate < 1e3 or holds(evaluate([grid(lower)])) == [False]


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "10b"])
def test_no_plan_of_a_pareto_set_is_beaten_and_each_comes_back(model):
    ask = Ask(model=model, sites=3, accelerators=8, bandwidth="2Gbit")
    found, _ = search(ask, Constraints(), trainable=False)
    allowed = [candidate for candidate in found if not candidate.broken]
    front = pareto(allowed)
    assert front

    def scores(candidate):
        row = candidate.row
        return row["days"], row["cost_usd"], row["local_steps"], -row["executed_fraction"]

    for one in front:
        for other in allowed:
            better = all(a <= b for a, b in zip(scores(other), scores(one), strict=True))
            assert not better or scores(other) == scores(one)
    for one in front[:3]:
        row = fomoe(*command(ask, one).split()[1:], "--json").json
        assert {key: row[key] for key in one.row} == one.row
