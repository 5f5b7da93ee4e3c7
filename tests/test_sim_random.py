"""300 drawn questions: monotone, ordered, summed, in range, and the same alone as in a grid."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from helpers_cli import fomoe

from fomoe_sim.evaluate import answer_one, evaluate
from fomoe_sim.methods import METHODS, PUBLIC
from fomoe_sim.options import Ask
from fomoe_sim.plan import Constraints, command, pareto, search
from fomoe_sim.question import build
from fomoe_sim.sites import grid
from fomoe_sim.solve import least, utilisation_of
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


@pytest.mark.parametrize("seed", range(20))
def test_what_is_solved_holds_and_less_does_not(seed):
    chance = random.Random(1000 + seed)
    what = chance.choice(("bandwidth", "local_steps"))
    target = chance.choice((0.5, 0.9, 0.99))
    holds = utilisation_of(target)
    while True:
        ask, method = draw(chance)
        if ask.sites == 1 or (what == "local_steps" and METHODS[method].every_step):
            continue
        try:
            question = build(ask, method)
            solved = least(question, what, holds, "--utilisation")
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
