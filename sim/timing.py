"""Time of a round: compute from FLOPs, transfers from bytes, and what of them is exposed.

Analytic mode works on arrays over local steps and bandwidths, for sweeps. Event mode runs the layer
model of `fomoe_sim.event` for methods whose syncs overlap with compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fomoe_sim.cluster import Cluster
from fomoe_sim.event import EventSpec, check_conservation, simulate
from fomoe_sim.event_spec import send_at_round_end, strided_fragments
from fomoe_sim.scenario import Scenario
from fomoe_sim.traffic import Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """What one exchange asks of the slowest link; arrays over the bandwidths asked about.

    Attributes:
        transfer_s: time of the bytes alone at the effective rate.
        bits: that the slowest link carries.
        rate_bps: its effective rate (nominal x efficiency).
        latency_s: messages in sequence and the fixed cost.
        where: the slowest link, in words (of the first bandwidth).
    """

    transfer_s: Floats
    bits: Floats
    rate_bps: Floats
    latency_s: float
    where: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Timing:
    """Times of one configuration, arrays over (local steps, bandwidth) pairs.

    Attributes:
        step_times_s: compute time of one step per site, [K].
        exchange_s: one exchange's transfer and latency.
        exposed_s: time per round in which sites wait for the link.
        round_time_s: of the slowest site.
        utilisation: share of time spent computing, mean over accelerators.
        model: analytic or event.
    """

    step_times_s: Floats
    exchange_s: Floats
    exposed_s: Floats
    round_time_s: Floats
    utilisation: Floats
    load: Load
    model: str


def step_times(scenario: Scenario, mfu: float) -> Floats:
    """Compute time of one step at every site, [K], from the FLOPs that it executes."""
    if scenario.step_time_s is None:
        return scenario.step_at_peak_s / mfu
    work = scenario.tokens_per_step * scenario.flops.executed(scenario.traffic.executed)
    peak = scenario.cluster.peak_flops(scenario.compute_bytes)
    # A measured step has its recomputation in it and fixes the speed of the slowest site; the
    # FLOPs still say what others save.
    full = scenario.tokens_per_step * scenario.flops.full
    part = work / peak * peak.min() / (scenario.step_time_flops or full)
    return scenario.step_fixed_s + (scenario.step_time_s - scenario.step_fixed_s) * part


def link_load(
    scenario: Scenario, up_bps: ArrayLike | None = None, down_bps: ArrayLike | None = None
) -> Load:
    """The slowest link of one exchange, over sites, directions and shared uplinks.

    Args:
        up_bps, down_bps: replace every site's own link, arrays [P]; None: the cluster's.
    """
    cluster, traffic = scenario.cluster, scenario.traffic
    num_sites = cluster.num_sites
    both = np.stack([traffic.sent, traffic.received])  # bytes, [2, K]
    own = cluster.own_bps if up_bps is None else np.zeros_like(cluster.own_bps)
    shared = [both[:, inside].sum(axis=1) for inside in cluster.uplink_members]
    bits = 8 * np.concatenate([both.ravel(), *shared])
    nominal = np.concatenate([own.ravel(), np.repeat([rate for _, rate in cluster.uplinks], 2)])
    rates = nominal[:, None]
    if up_bps is not None and down_bps is not None:
        rates = np.repeat(rates, np.size(up_bps), axis=1)
        rates[:num_sites], rates[num_sites : 2 * num_sites] = up_bps, down_bps
    rates = cluster.efficiency * rates
    seconds = bits[:, None] / rates
    slowest = seconds.argmax(axis=0)
    columns = np.arange(seconds.shape[1])
    return Load(
        transfer_s=seconds[slowest, columns],
        bits=bits[slowest],
        rate_bps=rates[slowest, columns],
        latency_s=(num_sites > 1) * (cluster.sync_fixed_s + _latency(scenario)),
        where=_link_name(cluster, int(slowest[0])),
    )


def _link_name(cluster: Cluster, index: int) -> str:
    """A link's name: own links up and down, then each shared uplink up and down."""
    place, direction = divmod(index, cluster.num_sites)
    if place < 2:
        return f"{cluster.sites[direction].name} {('up', 'down')[place]}"
    uplink, direction = divmod(index - 2 * cluster.num_sites, 2)
    return f"uplink {cluster.uplinks[uplink][0]} {('up', 'down')[direction]}"


def _latency(scenario: Scenario) -> float:
    return scenario.traffic.hops * scenario.cluster.rtt_s / 2


def analytic(
    scenario: Scenario,
    local_steps: ArrayLike,
    *,
    mfu: float,
    load: Load,
) -> Timing:
    """Round times for arrays of local steps and bandwidths, in closed form.

    - DDP hides its exchange behind the backward pass (2/3 of a step), FSDP behind the whole step,
      expert parallelism hides nothing: tokens wait for their experts.
    - Round-based methods wait for a fragment's exchange beyond `overlap_steps` steps; the link can
      not be busier than the round is long.
    """
    steps = np.atleast_1d(np.asarray(local_steps, float))
    times = step_times(scenario, mfu)
    slowest = float(times.max())
    if scenario.traffic.every_step:
        exchange = load.transfer_s + load.latency_s
        hidden = {"ddp": 2 / 3, "fsdp": 1.0, "ep": 0.0}[scenario.method] * slowest
        exposed = steps * np.maximum(0.0, exchange - hidden)
    else:
        parts = np.minimum(scenario.fragments, steps)  # those of one step are sent together
        exchange = load.transfer_s / parts + load.latency_s
        exposed = parts * np.maximum(0.0, exchange - scenario.overlap_steps * slowest)
        exposed = np.maximum(exposed, parts * exchange - steps * slowest)
    return _timing(scenario, steps, times, exchange, steps * slowest + exposed, load, "analytic")


def event(scenario: Scenario, *, mfu: float, load: Load) -> Timing:
    """The round of one configuration in the layer model, for methods that overlap."""
    times = step_times(scenario, mfu)
    every_step = scenario.traffic.every_step
    layers = scenario.shape.num_layers
    steps = 1 if every_step else scenario.local_steps
    if every_step:
        sends, overlap = send_at_round_end(layers, 1), None
    else:
        sends = strided_fragments(layers, steps, scenario.fragments)
        overlap = scenario.overlap_steps or None
    spec = EventSpec(
        layer_bits=layer_bits(scenario, float(load.bits[0])),
        step_time_s=float(times.max()),
        local_steps=steps,
        sends=sends,
        overlap_steps=overlap,
        sync_fixed_s=load.latency_s,
    )
    repeats = scenario.local_steps // steps
    round_time = repeats * simulate(spec, load.rate_bps).round_time_s
    local_steps = np.array([float(scenario.local_steps)])
    exchange = load.transfer_s / (1 if every_step else len(sends)) + load.latency_s
    return _timing(scenario, local_steps, times, exchange, round_time, load, "event")


def layer_bits(scenario: Scenario, total_bits: float) -> tuple[float, ...]:
    """The slowest link's bits spread over the layers by what each layer syncs.

    The embedding counts to the first layer, final norm and head to the last.
    """
    shape, traffic = scenario.shape, scenario.traffic
    shared = np.array(shape.layer_shared, float)
    table = shape.vocab_size * shape.d_model
    shared[0] += table
    shared[-1] += shape.d_model + (0 if shape.tied else table)
    shared *= float(traffic.payload_shared.max()) / shared.sum()
    if shape.num_moe_layers:
        expert = float(traffic.payload_expert.max()) / shape.num_moe_layers
        shared[shape.num_layers - shape.num_moe_layers :] += expert
    weight = shared.sum()
    return tuple(shared * (total_bits / weight)) if weight else (0.0,) * shape.num_layers


def overlaps(scenario: Scenario) -> bool:
    """Whether a method's exchange runs beside compute, so that layers matter."""
    return scenario.method == "ddp" or scenario.fragments > 1 or scenario.overlap_steps > 0


def _timing(
    scenario: Scenario,
    steps: Floats,
    times: Floats,
    exchange: Floats,
    round_time: Floats,
    load: Load,
    model: str,
) -> Timing:
    counts = scenario.cluster.counts
    mean_step = float((times * counts).sum() / counts.sum())
    exchanges = steps if scenario.traffic.every_step else np.ones_like(steps)
    round_time = round_time + 0 * exchange
    timing = Timing(
        step_times_s=times,
        exchange_s=exchange,
        exposed_s=np.maximum(0.0, round_time - steps * float(times.max())),
        round_time_s=round_time,
        utilisation=steps * mean_step / round_time,
        load=load,
        model=model,
    )
    _conserve(timing, exchanges * load.bits, steps, float(times.max()))
    return timing


def _conserve(timing: Timing, bits: Floats, steps: Floats, slowest: float) -> None:
    """Refuse a round in which the slowest link would carry more than it can."""
    floor = bits / timing.round_time_s
    if (floor <= timing.load.rate_bps).all() and (timing.utilisation <= 1).all():
        return
    busy = steps * slowest / timing.round_time_s
    worst = int(np.argmax(floor - timing.load.rate_bps))

    def at(values: Floats) -> float:
        return float(np.broadcast_to(values, floor.shape)[worst])

    check_conservation(
        bits=at(bits),
        bandwidth_bps=at(timing.load.rate_bps),
        utilisation=at(busy),
        local_steps=int(at(steps)),
        step_time_s=slowest,
    )


def cluster_rate(cluster: Cluster) -> float:
    """The slowest own link of a cluster, bit/s: what `bandwidth` means in a row."""
    return min(min(site.up_bps, site.down_bps) for site in cluster.sites)
