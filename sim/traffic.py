"""Elements and bytes that each method sends and receives, per site, in closed form.

Payload is what is reduced (a bucket with one holder costs nothing), sent and received are what a
site's link carries for a ring. The trainer counts with its segments; the closed forms here are that
same arithmetic over arrays of buckets, and a test holds the two equal to the byte. Bytes are
elements x bits / 8. Where the trainer's codec is asked about, elements are its bytes over its mean
bits: what the padding and the scales of short blocks add is among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from fomoe_sim.methods import Method
from fomoe_sim.shape import ModelShape
from fomoe_sim.trainer import FP32, Codec, Placement, holder_bytes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ACTIVATION_BYTES = 2  # bf16 activations cross between sites in expert parallelism


@dataclass(frozen=True, kw_only=True, eq=False)
class Holdings:
    """Who holds how many experts.

    Attributes:
        num_sites: K.
        groups: buckets with equally many holders: members [B, n] ascending, elements [B].
        residents: experts per MoE layer and site, [L_moe, K].
        trained: routed-expert elements that each site trains, [K]; None: all that it holds.
    """

    num_sites: int
    groups: tuple[tuple[Ints, Ints], ...]
    residents: Ints
    trained: Ints | None = None

    @cached_property
    def elements(self) -> Ints:
        """Routed-expert elements that each site holds, [K]."""
        held = np.zeros(self.num_sites, np.int64)
        for members, numel in self.groups:
            np.add.at(held, members, numel[:, None])
        return held


@lru_cache(maxsize=4096)
def cyclic_holdings(shape: ModelShape, num_sites: int, replication_factor: int) -> Holdings:
    """Holdings of `fomoe.kinds.cyclic` without its table.

    Expert e of MoE layer l lies on r consecutive sites from e + l on, so the pairs with equal
    (e + l) mod K share their holders.
    """
    per_residue = np.bincount(np.arange(shape.num_experts) % num_sites, minlength=num_sites)
    layers = np.arange(shape.num_moe_layers)
    sites = np.arange(num_sites)
    # starts[l, j]: experts of layer l whose first holder is site j.
    starts = per_residue[(sites[None, :] - layers[:, None]) % num_sites]
    window = (sites[None, :] + np.arange(replication_factor)[:, None]) % num_sites  # [r, K]
    residents = np.zeros((shape.num_moe_layers, num_sites), np.int64)
    for row in window:  # experts that start at j also lie at row[j]
        residents[:, row] += starts
    if not shape.num_moe_layers:
        groups: tuple[tuple[Ints, Ints], ...] = ()
    elif replication_factor == num_sites:
        groups = ((sites[None, :], np.array([shape.expert_total])),)
    else:
        numel = starts.sum(axis=0) * shape.expert_numel
        groups = ((np.sort(window.T, axis=1), numel.astype(np.int64)),)
    return Holdings(num_sites=num_sites, groups=groups, residents=residents)


def table_holdings(shape: ModelShape, placement: Placement) -> Holdings:
    """Holdings of any placement table; like the trainer's, a bucket has one set of trainers."""
    tables = zip(placement.holders, placement.trainers, strict=True)
    sets = Counter(pair for rows in tables for pair in zip(*rows, strict=True))
    by_size: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    trained = np.zeros(placement.num_sites, np.int64)
    for (holders, trainers), count in sorted(sets.items()):
        by_size.setdefault(len(holders), []).append((holders, count * shape.expert_numel))
        trained[list(trainers)] += count * shape.expert_numel
    groups = tuple(
        (np.array([h for h, _ in rows]), np.array([n for _, n in rows], np.int64))
        for rows in by_size.values()
    )
    residents = np.zeros((len(placement.holders), placement.num_sites), np.int64)
    for row, layer in enumerate(placement.holders):
        for holders in layer:
            residents[row, list(holders)] += 1
    return Holdings(
        num_sites=placement.num_sites, groups=groups, residents=residents, trained=trained
    )


def spread(
    groups: tuple[tuple[Ints, Ints], ...],
    num_sites: int,
    *,
    wire: bool = False,
    codec: Codec = FP32,
) -> Floats:
    """Elements per site of one sync: reduced, or (`wire`) sent, which are as many received.

    What is sent is what the trainer's segments count: 2 (n - 1) / n of a bucket of n holders.
    """
    total = np.zeros(num_sites, np.int64)
    for members, numel in groups:
        num_holders = members.shape[1]
        if num_holders > 1:
            positions = np.arange(num_holders)[None, :]
            counted = holder_bytes(numel[:, None], num_holders, positions, codec)
            np.add.at(total, members, counted[wire])
    return total * 8 / codec.mean_bits


def _everyone(num_sites: int, numel: int) -> tuple[Ints, Ints]:
    return np.arange(num_sites)[None, :], np.array([numel], np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What each site moves in one exchange: a step's, or a round's.

    Attributes:
        shared, experts: elements reduced per site by class, [K].
        sent, received: elements that the site's link carries, [K].
        token_bytes: bytes that tokens add to each of the four per token of the site's step.
        held, trained: parameters that each site stores and trains, [K].
        hops: one-way messages in sequence per exchange.
        executed: share of the top-k assignments that each site runs, [K].
        residents: experts per MoE layer and site, [L_moe, K].
    """

    shared: Floats
    experts: Floats
    sent: Floats
    received: Floats
    token_bytes: float
    held: Ints
    trained: Ints
    hops: int
    executed: Floats
    residents: Ints


def method_traffic(
    shape: ModelShape,
    method: Method,
    holdings: Holdings,
    *,
    at_least_one: bool = True,
    route_scope: str = "all",
    execute_target: float | None = None,
    codec: Codec = FP32,
) -> Traffic:
    """Elements of one exchange of a method at every site.

    Args:
        holdings: of the placement; methods that place nothing ignore it.
        codec: of what crosses between holders.
        at_least_one, route_scope, execute_target: the router's options, which decide what a site
            that skips executes.
    """
    num_sites = holdings.num_sites
    several = num_sites > 1
    full = cyclic_holdings(shape, num_sites, num_sites)
    stored = {"placed": holdings, "all": full, "share": cyclic_holdings(shape, num_sites, 1)}[
        method.stores
    ]
    if method.crosses == "shards":
        stored = full
    mine = holdings if method.placed else stored
    everyone = _everyone(num_sites, shape.shared_total)
    shared = spread((everyone,), num_sites, codec=codec)
    experts = spread(stored.groups, num_sites, codec=codec)
    sent = _wire(shape.shared_total, stored, codec)
    received, hops, token_bytes = sent, 2 * (num_sites - 1), 0.0
    held = shape.shared_total + stored.elements
    own = mine.elements if mine.trained is None else mine.trained
    trained = shape.shared_total + own
    residents, executed = stored.residents, np.ones(num_sites)
    if method.skips and route_scope == "all":
        executed = _executed(shape, mine, at_least_one, execute_target)
    if method.crosses == "server":
        # Own share up, everything down, through a server that is no site.
        experts = several * np.full(num_sites, float(shape.expert_total))
        sent = several * (shape.shared_total + mine.elements).astype(np.float64)
        received = several * np.full(num_sites, float(shape.total))
        hops = 2 * several
    elif method.crosses == "shards":
        # Two gathers and a scatter against a ring's two passes; each site keeps a share.
        shared, experts, sent = 1.5 * shared, 1.5 * experts, 1.5 * sent
        received = sent
        held = trained = -(-held // num_sites)
    elif method.crosses == "tokens":
        # Dispatch and combine, forward and backward.
        per_layer = 4 * shape.top_k * (1 - 1 / num_sites) * shape.d_model * ACTIVATION_BYTES
        token_bytes = per_layer * shape.num_moe_layers
        hops += several * 4 * shape.num_moe_layers
    return Traffic(
        shared=shared,
        experts=experts,
        sent=sent,
        received=received,
        token_bytes=token_bytes,
        held=held,
        trained=trained,
        hops=hops,
        executed=executed,
        residents=residents,
    )


@lru_cache(maxsize=1024)
def _wire(shared_numel: int, stored: Holdings, codec: Codec) -> Floats:
    """Elements that each site sends in one sync of everything, [K]."""
    groups = (_everyone(stored.num_sites, shared_numel), *stored.groups)
    return spread(groups, stored.num_sites, wire=True, codec=codec)


@lru_cache(maxsize=1024)
def _executed(
    shape: ModelShape, placed: Holdings, at_least_one: bool, execute_target: float | None
) -> Floats:
    return executed_share(shape, placed.residents, at_least_one, execute_target)


def executed_share(
    shape: ModelShape, residents: Ints, at_least_one: bool, execute_target: float | None = None
) -> Floats:
    """Share of the top-k assignments that a site executes under balanced routing, [K].

    R/E, plus 1/k for every token none of whose choices is resident if `at_least_one` gives it the
    best resident expert: the chance of that is C(E-R, k) / C(E, k). Where experts are missing, a
    router that is steered to a target executes that share instead.
    """
    if not shape.num_experts:
        return np.ones(residents.shape[1])
    if execute_target is not None:
        steered = np.where(residents > 0, execute_target, 0.0)
        return np.where(residents < shape.num_experts, steered, 1.0).mean(axis=0)
    share = residents / shape.num_experts
    if at_least_one:
        none = np.ones(residents.shape)
        for i in range(shape.top_k):
            left = np.maximum(shape.num_experts - residents - i, 0)
            none = none * left / (shape.num_experts - i)
        share = share + np.where(residents > 0, none, 0) / shape.top_k
    return share.mean(axis=0)
