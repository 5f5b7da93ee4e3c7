"""The event model: bytes conserved, monotone in bandwidth, equal to closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe.config import build_config
from fomoe.errors import ConfigError
from fomoe.placement import build_placement
from fomoe.segments import build_plan, sync_traffic
from fomoe.shapes import parameter_specs
from fomoe_sim.event import (
    GRID_BPS,
    ImpossibleResult,
    UnreachableUtilisation,
    check_conservation,
    closed_form_round_time_s,
    required_bandwidth,
    simulate,
)
from fomoe_sim.event_spec import (
    EventSpec,
    equal_layers,
    layer_wire_bits,
    send_at_round_end,
    send_fragments,
)
from fomoe_sim.stragglers import StepTimes, round_time_percentiles, shared_uplink_s

BANDWIDTHS = np.logspace(6, 12, 60)


def spec_of(**changes):
    options = {
        "layer_bits": equal_layers(1e9, 12, bits=16, num_sites=2),
        "step_time_s": 0.5,
        "local_steps": 20,
        "sends": send_at_round_end(12, 20),
    }
    return EventSpec(**(options | changes))


def random_spec(seed: int) -> EventSpec:
    """Unequal layers, any schedule (also several syncs of one layer per round), any overlap."""
    random = np.random.default_rng(seed)
    layers, steps = int(random.integers(1, 9)), int(random.integers(1, 12))
    sends = tuple(
        (step, tuple(int(layer) for layer in np.nonzero(random.random(layers) < 0.5)[0]))
        for step in range(steps)
        if random.random() < 0.5
    )
    shares = random.random(layers)
    return EventSpec(
        layer_bits=tuple(random.random(layers) * 1e9),
        step_time_s=1.0,
        local_steps=steps,
        sends=sends,
        overlap_steps=(None, 0, 1, 2, 5)[int(random.integers(5))],
        sync_fixed_s=(0.0, 0.3)[int(random.integers(2))],
        compute_shares=tuple(shares / shares.sum()),
    )


# -------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(40))
def test_a_round_obeys_the_link_and_the_clock(seed):
    """Bytes, order and speed of every transfer, recomputed from the timeline itself."""
    spec = random_spec(seed)
    timeline = simulate(spec, BANDWIDTHS)
    expected = sum(spec.layer_bits[layer] for _, group in spec.sends for layer in group)
    assert sum(t.bits for t in timeline.transfers) == pytest.approx(expected)
    for before, after in zip(timeline.transfers, timeline.transfers[1:], strict=False):
        assert (after.start_s >= before.end_s).all()
    for transfer in timeline.transfers:
        assert (transfer.start_s >= transfer.ready_s).all()
        carried = (transfer.end_s - transfer.start_s) * BANDWIDTHS
        np.testing.assert_allclose(carried, transfer.bits, rtol=1e-4)
    assert (timeline.round_time_s * BANDWIDTHS >= expected * (1 - 1e-9)).all()
    assert (timeline.exposed_s >= -1e-9).all()


@pytest.mark.parametrize("seed", range(40))
def test_utilisation_never_falls_with_bandwidth(seed):
    utilisation = simulate(random_spec(seed), BANDWIDTHS).utilisation
    assert (np.diff(utilisation) >= -1e-9).all()
    assert utilisation[0] < utilisation[-1] or not random_spec(seed).round_bits


@pytest.mark.parametrize("seed", range(40))
def test_the_measured_round_is_steady(seed):
    """A spec unrolled to three rounds in one takes three times as long."""
    spec = random_spec(seed)
    unrolled = EventSpec(
        layer_bits=spec.layer_bits,
        step_time_s=spec.step_time_s,
        local_steps=3 * spec.local_steps,
        sends=tuple((step + k * spec.local_steps, g) for k in range(3) for step, g in spec.sends),
        overlap_steps=spec.overlap_steps,
        sync_fixed_s=spec.sync_fixed_s,
        compute_shares=spec.compute_shares,
    )
    once, thrice = simulate(spec, BANDWIDTHS), simulate(unrolled, BANDWIDTHS)
    np.testing.assert_allclose(thrice.round_time_s, 3 * once.round_time_s, rtol=1e-9)


@pytest.mark.parametrize("local_steps", [1, 7, 100])
@pytest.mark.parametrize("num_layers", [1, 24])
def test_the_closed_form_equals_the_simulation(local_steps, num_layers):
    spec = spec_of(
        layer_bits=equal_layers(1e9, num_layers, bits=16, num_sites=4),
        local_steps=local_steps,
        sends=send_at_round_end(num_layers, local_steps),
        bits_factor=1.15,
    )
    closed = closed_form_round_time_s(spec, BANDWIDTHS)
    np.testing.assert_allclose(closed, simulate(spec, BANDWIDTHS).round_time_s, rtol=1e-9)


def test_the_closed_form_refuses_what_it_does_not_cover():
    with pytest.raises(ConfigError, match="closed form only"):
        closed_form_round_time_s(spec_of(sends=send_fragments(12, 20)), 1e9)


def test_data_parallel_sends_h_times_the_bits_of_diloco():
    """Bits over the same number of steps, counted from the transfers."""
    every_step = spec_of(sends=tuple((step, tuple(range(12))) for step in range(20)))
    streamed = spec_of(sends=send_fragments(12, 20))
    diloco_bits, every_step_bits, streamed_bits = (
        sum(t.bits for t in simulate(spec, 1e9).transfers)
        for spec in (spec_of(), every_step, streamed)
    )
    assert every_step_bits == pytest.approx(20 * diloco_bits)
    assert streamed_bits == pytest.approx(diloco_bits)
    assert diloco_bits == pytest.approx(16e9)


def test_a_slow_link_is_the_only_thing_that_counts():
    """Where the link never rests, a round lasts as long as its bits, for every method."""
    for overlap in (None, 1):
        for sends in (send_at_round_end(12, 1), send_fragments(12, 1)):
            spec = spec_of(local_steps=1, sends=sends, overlap_steps=overlap)
            slow = simulate(spec, 1e6)
            bits_s = spec.round_bits / 1e6
            assert slow.round_time_s[0] == pytest.approx(bits_s, rel=1e-3)


def test_overlap_hides_a_fragment_that_fits_into_one_step():
    """Each fragment has one layer: its transfer must end within the next step."""
    spec = spec_of(sends=send_fragments(12, 20, 1), overlap_steps=1)
    bits = spec.layer_bits[0]
    assert simulate(spec, bits / 0.49).utilisation[0] == pytest.approx(1.0, abs=1e-12)
    assert simulate(spec, bits / 1.5).utilisation[0] < 0.9
    waiting = spec_of(sends=send_fragments(12, 20, 1))
    assert simulate(waiting, bits / 0.49).utilisation[0] < 0.8


def test_a_fixed_cost_stands_beside_the_bits():
    plain, fixed = spec_of(), spec_of(sync_fixed_s=0.25)
    slow = 1e8  # link-bound from the first layer on
    difference = simulate(fixed, slow).round_time_s - simulate(plain, slow).round_time_s
    assert difference[0] == pytest.approx(0.25)


# --------------------------------------------------------------------------------------- schedules


def test_fragments_are_strided_and_evenly_staggered():
    """1B of Streaming DiLoCo: 24 layers, 8 fragments of 3, one every 12.5 steps."""
    sends = send_fragments(24, 100, 3)
    assert [step for step, _ in sends] == [0, 12, 25, 37, 50, 62, 75, 87]
    assert [layers for _, layers in sends] == [(p, p + 8, p + 16) for p in range(8)]


def test_more_fragments_than_steps_share_steps():
    assert send_fragments(7, 2, 3) == ((0, (0, 1, 3, 4, 6)), (1, (2, 5)))
    assert send_fragments(7, 1, 3) == send_at_round_end(7, 1)


def test_layer_bits_of_a_real_model_equal_its_counted_bytes():
    """Partially replicated experts: per-layer bits add up to what a sync sends, at every site."""
    tree = {
        "num_sites": 4,
        "model": {"num_layers": 3, "num_experts": 6, "d_model": 32, "num_dense_layers": 1},
        "placement": {"replication_factor": 2},
    }
    config = build_config(tree)
    specs = parameter_specs(config)
    plan = build_plan(specs, build_placement(config))
    for site in range(4):
        sizes = layer_wire_bits(specs, plan, site)
        assert len(sizes) == 3
        assert sum(sizes) == pytest.approx(8 * sync_traffic(plan, site).wire)
    alone = build_config(tree | {"placement": {"replication_factor": 1}})
    plan_alone = build_plan(specs, build_placement(alone))
    shared = layer_wire_bits(specs, plan_alone, 0)
    assert sum(shared) == pytest.approx(8 * sync_traffic(plan_alone, 0).wire_shared)
    assert shared[1] < layer_wire_bits(specs, plan, 0)[1]


# ------------------------------------------------------------------------------------ refusals


def test_an_impossible_result_is_refused_with_the_reason():
    fine = {"bits": 4e9, "local_steps": 100, "step_time_s": 0.1}
    check_conservation(bandwidth_bps=0.2e9, utilisation=0.5, **fine)
    with pytest.raises(ImpossibleResult, match=r"50 % at 0\.199 Gbit/s .* at least 0\.2 Gbit/s"):
        check_conservation(bandwidth_bps=0.199e9, utilisation=0.5, **fine)
    with pytest.raises(ImpossibleResult, match="110 %"):
        check_conservation(bandwidth_bps=1e12, utilisation=1.1, **fine)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_must_be_above_zero(bandwidth):
    with pytest.raises(ConfigError, match=r"bandwidth .* must be above 0"):
        simulate(spec_of(), [1e9, bandwidth])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step_time_s": 0.0}, "step_time_s 0.0 must be above 0"),
        ({"layer_bits": ()}, "layer_bits"),
        ({"layer_bits": (-1.0,) * 12}, "layer_bits"),
        ({"sends": ((20, (0,)),)}, "20 must lie in the round's 20 local steps"),
        ({"sends": ((0, (12,)),)}, "must be different layers of the 12"),
        ({"sends": ((0, (1, 1)),)}, "must be different layers"),
        ({"sends": ((0, (1,)), (0, (2,)))}, "must name every step once"),
        ({"overlap_steps": -1}, "overlap_steps -1"),
        ({"sync_fixed_s": -0.1}, "sync_fixed_s -0.1"),
        ({"compute_shares": (1.0,)}, "one share for each of the 12 layers"),
        ({"compute_shares": (0.5,) * 12}, "sum to 1"),
    ],
)
def test_a_senseless_spec_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        spec_of(**changes)


def test_required_bandwidth_is_the_first_grid_value_that_reaches():
    spec = spec_of()
    (found,) = required_bandwidth(spec, 0.9)
    index = list(GRID_BPS).index(found)
    assert simulate(spec, found).utilisation[0] >= 0.9
    assert simulate(spec, GRID_BPS[index - 1]).utilisation[0] < 0.9
    with pytest.raises(UnreachableUtilisation, match=r"90 % is not reached: 0\.001 Gbit/s"):
        required_bandwidth(spec, 0.9, grid_bps=np.array([1e6]))
    with pytest.raises(ConfigError, match="utilisation"):
        required_bandwidth(spec, 1.5)


# -------------------------------------------------------------------------------------- stragglers


def test_without_spread_a_round_lasts_as_long_as_the_slowest_site():
    times = StepTimes(mean_s=(1.0, 3.0, 2.0))
    assert round_time_percentiles(times, local_steps=10, sync_s=5.0).tolist() == [35.0] * 3
    two = round_time_percentiles(times, local_steps=10, sync_s=5.0, quorum=2)
    assert two.tolist() == [25.0] * 3


def test_spread_and_slow_sites_lengthen_rounds():
    calm = StepTimes(mean_s=(1.0,) * 8, variation=0.3)
    rough = StepTimes(mean_s=(1.0,) * 8, variation=0.3, slow_probability=0.2, slow_factor=2.0)
    options = {"local_steps": 50, "sync_s": 0.0, "seed": 3}
    median, high, highest = round_time_percentiles(calm, **options)
    assert 50 < median < high < highest < 60
    assert round_time_percentiles(rough, **options)[1] > 90
    # 0.8 ** 8 of the rounds have no slow site: the 10th percentile is one of them.
    (low,) = round_time_percentiles(rough, **options, percentiles=(10,))
    assert low < 60
    assert (
        round_time_percentiles(rough, **options) == round_time_percentiles(rough, **options)
    ).all()


def test_streams_on_one_uplink_wait_in_order():
    assert shared_uplink_s([0.0, 0.0, 1.0], [2.0, 1.0, 1.0]).tolist() == [2.0, 3.0, 4.0]
    assert shared_uplink_s([5.0, 0.0], 1.0).tolist() == [6.0, 1.0]


def test_a_quorum_needs_its_sites():
    with pytest.raises(ConfigError, match="quorum 3"):
        round_time_percentiles(StepTimes(mean_s=(1.0,) * 2), local_steps=1, sync_s=0.0, quorum=3)
