"""The event model: a round obeys the link and the clock, also where points differ in H."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe_sim.overlap import at_round_end, round_time, rounds, strided

RATES = np.logspace(6, 12, 60)
BITS = 16e9


def simulate(num_layers=12, local_steps=20, fragments=0, overlap=None, step_s=0.5, **more):
    """Round times over RATES: equal layers, whole model at the round's end or in fragments."""
    steps = np.full(RATES.shape, float(local_steps))
    sends = strided(num_layers, steps, fragments) if fragments else at_round_end(num_layers, steps)
    return round_time(
        layer_s=np.tile(BITS / num_layers / RATES, (num_layers, 1)),
        step_s=step_s,
        local_steps=steps,
        sends=sends,
        overlap_steps=overlap,
        **more,
    )


def drawn(seed):
    chance = np.random.default_rng(seed)
    overlap = (None, 0, 1, 2, 5)[int(chance.integers(5))]
    options = {"num_layers": int(chance.integers(1, 9)), "local_steps": int(chance.integers(1, 12))}
    fragments = int(chance.integers(1, options["num_layers"] + 1))
    return {**options, "fragments": fragments, "overlap": overlap}


@pytest.mark.parametrize("seed", range(40))
def test_a_round_obeys_the_link_and_the_clock(seed):
    options = drawn(seed)
    time = simulate(**options)
    assert (time * RATES >= BITS * (1 - 1e-9)).all()
    assert (time >= 0.5 * options["local_steps"] * (1 - 1e-12)).all()
    assert (np.diff(time) <= 1e-9).all()
    # Nothing waits for longer than the whole transfer.
    most = 0.5 * options["local_steps"] + BITS / RATES
    assert (time <= most * (1 + 1e-9)).all()


@pytest.mark.parametrize("local_steps", [1, 7, 100])
@pytest.mark.parametrize("num_layers", [1, 24])
def test_a_closed_form_where_there_is_no_contention(local_steps, num_layers):
    """The queue is fed every b = 2T/(3L) and serves a layer in c; the last is complete
    max(c, L c - (L - 1) b) after the backward pass."""
    time = simulate(num_layers, local_steps)
    serve = BITS / num_layers / RATES
    feed = 2 * 0.5 / (3 * num_layers)
    expected = 0.5 * local_steps + np.maximum(serve, num_layers * serve - (num_layers - 1) * feed)
    np.testing.assert_allclose(time, expected, rtol=1e-9)


def test_a_slow_link_is_the_only_thing_that_counts():
    """Where the link never rests, a round lasts as long as its bits, for every method."""
    for overlap in (None, 1):
        for fragments in (0, 4):
            time = simulate(local_steps=1, fragments=fragments, overlap=overlap)
            assert time[0] == pytest.approx(BITS / RATES[0], rel=1e-3)


def test_overlap_hides_a_fragment_that_fits_into_one_step():
    """Each fragment has one layer: its transfer must end within the next step."""
    fast, slow = (BITS / 12 / seconds for seconds in (0.49, 1.5))
    times = simulate(fragments=12, overlap=1)
    waiting = simulate(fragments=12)
    at = [int(np.abs(RATES - rate).argmin()) for rate in (1.05 * fast, slow)]
    assert times[at[0]] == pytest.approx(10.0, abs=1e-9)
    assert times[at[1]] > 11
    assert waiting[at[0]] > 12


def test_a_fixed_cost_stands_beside_the_bits():
    more = simulate(fixed_s=0.25) - simulate()
    assert more[0] == pytest.approx(0.25)


def test_fragments_are_strided_and_evenly_staggered():
    """1B of Streaming DiLoCo: 24 layers, 8 fragments of 3, one every 12.5 steps."""
    sends = strided(24, 100, 8)
    assert [float(step[0]) for step, _ in sends] == [0, 12, 25, 37, 50, 62, 75, 87]
    assert [layers for _, layers in sends] == [(p, p + 8, p + 16) for p in range(8)]


def test_more_fragments_than_steps_share_steps():
    sends = strided(7, 2, 3)
    assert [(float(step[0]), layers) for step, layers in sends] == [
        (0, (0, 1, 3, 4, 6)),
        (1, (2, 5)),
    ]


@pytest.mark.parametrize("overlap", [1, 3])
def test_points_that_differ_in_h_are_answered_as_if_alone(overlap):
    """Models are simulated together; each point is the answer to its own question."""
    names = ("transfer_s", "step_s", "fixed_s", "local_steps", "fragments", "overlap_steps")
    steps, fragments = [1.0, 2.0, 3.0, 5.0, 8.0, 40.0], [4.0, 4.0, 4.0, 1.0, 6.0, 6.0]
    points = np.array(
        [[3.0, 0.5, 0.1, h, f, overlap] for h, f in zip(steps, fragments, strict=True)]
    ).T
    weights = [(0.4, 0.3, 0.1, 0.1, 0.05, 0.05), (0.2, 0.8)]

    def asked(table, which):
        return rounds(weights, np.array(which), **dict(zip(names, table, strict=True)))

    together = asked(np.tile(points, 3), [0] * 6 + [1] * 6 + [0] * 6)
    np.testing.assert_array_equal(together[:6], together[12:])
    alone = [asked(points[:, i : i + 1], [model])[0] for model in (0, 1) for i in range(6)]
    np.testing.assert_allclose(together[:12], alone, rtol=1e-12)
