"""What goes wrong, and what it costs in time: failures, lost work, restarts, checkpoints, coverage.

A failed site is down until it is repaired and has fetched what it lacks. All sites wait for it, and
what was computed since the last safe state is lost. Everything is a closed form over arrays of
points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe_sim.question import Question
from fomoe_sim.traffic import Floats, Ints

# Llama-3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, table 5),
# at more than 90 % effective training time over 466 interruptions.
ACCELERATOR_MTBF_HOURS = 54 * 24 * 16_384 / 419
REPAIR_HOURS = 0.1 * 54 * 24 / 466
CHECKPOINT_MINUTES = 15.0
COPY_BYTES_PER_S = 25e9  # from an accelerator to its host, PCIe 4.0 x16
FLOAT32, HOUR = 4, 3600.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Risk:
    """Of every point, [P] (or a number that holds for all).

    Attributes:
        goodput: share of the time that becomes progress.
        failures_per_hour: of all sites.
        lost_hours: work that a failure undoes, half an interval between safe states.
        rejoin_bytes, rejoin_s: that a returning site fetches, the largest and the longest.
        coverage_per_hour: how often some expert loses its last live holder; 0 without placement.
    """

    goodput: Floats
    failures_per_hour: float
    lost_hours: Floats
    rejoin_bytes: float
    rejoin_s: Floats
    coverage_per_hour: Floats


def risk(question: Question, *, safe_s: Floats, bandwidth: Floats, state_bytes: float) -> Risk:
    """Failures of one grid.

    Args:
        safe_s: time from one state that all sites can save to the next, [P].
        bandwidth: of every site's own link instead of the cluster's, bit/s, [P]; NaN: its own.
        state_bytes: of an accelerator, copied for a checkpoint.
    """
    ask, counts = question.ask, question.cluster.counts
    each = ask.mtbf_hours
    mtbf = np.full(len(counts), each) if each else ACCELERATOR_MTBF_HOURS / counts
    amounts, seconds = rejoin(question, bandwidth)  # [K], [P, K]
    down_hours = (ask.repair_hours or REPAIR_HOURS) + seconds / HOUR
    up = mtbf / (mtbf + down_hours)  # [P, K]
    interval = np.maximum((ask.checkpoint_minutes or CHECKPOINT_MINUTES) / 60, safe_s / HOUR)
    copy_hours = state_bytes / COPY_BYTES_PER_S / HOUR
    rate, lost = float((1 / mtbf).sum()), interval / 2
    # Progress needs every site, every failure undoes half an interval, and copies are waited for.
    goodput = up.prod(axis=1) / (1 + rate * lost) / (1 + copy_hours / interval)
    return Risk(
        goodput=np.maximum(goodput, 1e-9),
        failures_per_hour=rate,
        lost_hours=lost,
        rejoin_bytes=float(amounts.max()),
        rejoin_s=seconds.max(axis=1),
        coverage_per_hour=_coverage(question, mtbf, down_hours),
    )


def _coverage(question: Question, mtbf: Floats, down_hours: Floats) -> Floats:
    """Events per hour in which some expert loses its last live holder, [P].

    Sites fail and return independently (exponential times). A set of holders goes from one live
    holder to none at the rate P(all down) x sum_i 1 / downtime_i. Sets are summed, which counts
    sets that share sites as if they were independent.
    """
    found = np.zeros(len(down_hours))
    if not question.method.skips or not question.shape.num_experts or mtbf.size < 2:
        return found
    down = down_hours / (mtbf + down_hours)  # [P, K]
    for members, numel in question.holdings.groups:
        sets = np.unique(members[numel > 0], axis=0)
        all_down = down[:, sets].prod(axis=2)
        found += (all_down * (1 / down_hours)[:, sets].sum(axis=2)).sum(axis=1)
    return found


# ------------------------------------------------------------------------------------------ rejoin


def rejoin(question: Question, bandwidth: Floats) -> tuple[Floats, Floats]:
    """Bytes that each site fetches when it comes back, [K], and the seconds that it takes, [P, K].

    A joiner fetches what the outer step needs: the anchor (equal to the parameters) and the outer
    optimizer's state; its inner optimizer starts afresh. Where every step exchanges, parameters and
    both moments must be the others'. What no other site holds comes from the site's own checkpoint.

    All other holders of a part send it at once, in proportion to their uplinks; the joiner's
    downlink, each donor's uplink and every shared uplink carry what passes through them, and the
    slowest decides.
    """
    cluster, method, shape = question.cluster, question.method, question.shape
    num_sites = cluster.num_sites
    asked = ~np.isnan(bandwidth)
    amounts, seconds = np.zeros(num_sites), np.zeros((len(bandwidth), num_sites))
    if num_sites == 1 or not method.fetches:
        return amounts, seconds
    rates = np.ones(num_sites) if asked.all() else cluster.own_bps[0]
    everywhere = shape.shared_total if method.stores in ("placed", "share") else shape.total
    groups: list[tuple[Ints, Ints]] = [(np.arange(num_sites)[None, :], np.array([everywhere]))]
    if method.stores == "placed":
        groups += question.holdings.groups
    width: float = FLOAT32 * method.fetches
    if not method.every_step and question.counted and question.counted[0].anchor:
        states = question.counted[0]
        width = FLOAT32 * (1 + states.outer_optimizer / states.anchor)
    for joiner in range(num_sites):
        given = width * _given(groups, joiner, rates)
        amounts[joiner], bits = given.sum(), 8 * given
        own = max(bits.sum() / cluster.own_bps[1, joiner], float((bits / cluster.own_bps[0]).max()))
        shared = 0.0
        for (_, rate), inside in zip(cluster.uplinks, cluster.uplink_members, strict=True):
            takes = bits.sum() if joiner in inside else 0.0
            shared = max(shared, float(bits[inside].sum()) / rate, takes / rate)
        links = np.where(asked, bits.sum() / np.where(asked, bandwidth, 1.0), own)
        seconds[:, joiner] = np.maximum(links, shared) / cluster.efficiency
    return amounts, seconds


def _given(groups: list[tuple[Ints, Ints]], joiner: int, up: Floats) -> Floats:
    """Elements that every site gives the joiner, [K]."""
    given = np.zeros(len(up))
    for members, numel in groups:
        mine = (members == joiner).any(axis=1)
        rates = np.where(members == joiner, 0.0, up[members])[mine]  # [B, n]
        total = rates.sum(axis=1, keepdims=True)
        share = np.divide(rates, total, out=np.zeros_like(rates), where=total > 0)
        np.add.at(given, members[mine], share * numel[mine][:, None])
    return given
