"""What a site that comes back must fetch from the others, and how long that takes.

A joiner fetches what the outer step needs: the anchor (equal to the parameters) and the outer
optimizer's state. Its inner optimizer starts afresh. A method that exchanges in every step has no
anchor: parameters and both Adam moments must be the others', 12 bytes per element in fp32. What no
other site holds (experts with one holder, FSDP's shards) comes from the site's own checkpoint.
"""

from __future__ import annotations

import numpy as np

from fomoe_sim.activations import FLOAT32
from fomoe_sim.cluster import Cluster
from fomoe_sim.scenario import Scenario
from fomoe_sim.traffic import Floats, Ints

EVERY_STEP_BYTES = 3 * FLOAT32  # a parameter and two moments


def rejoin(scenario: Scenario) -> tuple[Floats, Floats]:
    """Bytes that each site fetches when it comes back, [K], and the seconds that it takes, [K].

    All other holders of a part send it at once, in proportion to their uplinks; the joiner's
    downlink, each donor's uplink and every shared uplink carry what passes through them, and the
    slowest of them decides.
    """
    num_sites = scenario.cluster.num_sites
    up = np.array([site.up_bps for site in scenario.cluster.sites])
    amounts, seconds = np.zeros(num_sites), np.zeros(num_sites)
    for joiner in range(num_sites):
        given = _given(scenario, joiner, up)
        amounts[joiner] = given.sum()
        seconds[joiner] = _slowest_link_s(scenario.cluster, joiner, 8 * given)
    return amounts, seconds


def _given(scenario: Scenario, joiner: int, up: Floats) -> Floats:
    """Bytes that every site gives the joiner, [K]."""
    shape, method = scenario.shape, scenario.method
    num_sites = len(up)
    given = np.zeros(num_sites)
    if num_sites == 1 or method == "fsdp":
        return given
    everyone = np.arange(num_sites)[None, :]
    to_all = shape.shared_total if method in ("fomoe", "ep") else shape.total
    groups: list[tuple[Ints, Ints]] = [(everyone, np.array([to_all]))]
    if method == "fomoe":
        groups += scenario.holdings.groups
    for members, numel in groups:
        mine = (members == joiner).any(axis=1)
        rates = np.where(members == joiner, 0.0, up[members])[mine]  # [B, n]
        total = rates.sum(axis=1, keepdims=True)
        share = np.divide(rates, total, out=np.zeros_like(rates), where=total > 0)
        np.add.at(given, members[mine], share * numel[mine][:, None])
    return given * bytes_per_element(scenario)


def bytes_per_element(scenario: Scenario) -> float:
    """Of what a joiner fetches."""
    if scenario.traffic.every_step:
        return EVERY_STEP_BYTES
    states = scenario.trainer_states
    if states is not None and states[0].anchor:
        return FLOAT32 * (1 + states[0].outer_optimizer / states[0].anchor)
    return FLOAT32 * (1 + scenario.outer_vectors)


def _slowest_link_s(cluster: Cluster, joiner: int, bits: Floats) -> float:
    """Time of the slowest link when every site sends its bits to the joiner at once."""
    site = cluster.sites[joiner]
    loads = [(float(bits.sum()), site.down_bps)]
    loads += [(float(b), donor.up_bps) for b, donor in zip(bits, cluster.sites, strict=True)]
    for name, rate in cluster.uplinks:
        inside = [i for i, other in enumerate(cluster.sites) if other.uplink == name]
        sent = float(bits[inside].sum())
        loads.append((sent, rate))  # what its sites give, and what its joiner takes
        if joiner in inside:
            loads.append((float(bits.sum()), rate))
    return max(load / (rate * cluster.efficiency) for load, rate in loads)
