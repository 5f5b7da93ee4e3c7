"""Bytes that each method sends and receives, per site, in closed form.

Payload is what is reduced (a bucket with one holder costs nothing), sent and received are what a
site's link carries, for a ring, a star or a tree. The trainer counts with `fomoe.segments`; the
closed forms here are that same arithmetic over arrays of buckets, and a test holds the two equal to
the byte. Elements are exact integers; bytes are elements x bits / 8.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from fomoe.placement import Placement
from fomoe_sim.shape import ModelShape

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

METHODS = ("fomoe", "diloco", "photon", "streaming", "spes", "ddp", "fsdp", "ep")
EVERY_STEP = ("ddp", "fsdp", "ep")  # they communicate in every step, not once a round
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

    @cached_property
    def synced(self) -> Ints:
        """Routed-expert elements that each site reduces with another one, [K]."""
        return spread(self.groups, self.num_sites, "payload")


@lru_cache(maxsize=4096)
def cyclic_holdings(shape: ModelShape, num_sites: int, replication_factor: int) -> Holdings:
    """Holdings of `fomoe.placement.cyclic` without its table.

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


def spread(groups: tuple[tuple[Ints, Ints], ...], num_sites: int, what: str) -> Ints:
    """Elements per site of one sync: `payload`, or what a `ring`, `star` or `tree` sends.

    Every topology sends and receives equally many elements at each site. The ring is
    `fomoe.segments.wire_elements`; the hub of a star and the root of a tree are the first holder.
    """
    total = np.zeros(num_sites, np.int64)
    for members, numel in groups:
        num_holders = members.shape[1]
        if num_holders > 1:
            np.add.at(total, members, _elements(numel[:, None], num_holders, what))
    return total


def _bytes(elements: Ints, width: float) -> Floats:
    return np.asarray(elements * width, np.float64)


def _elements(numel: Ints, num_holders: int, what: str) -> Ints:
    """Elements at each position, [B, n]."""
    position = np.arange(num_holders)[None, :]
    if what == "payload":
        return numel + 0 * position
    if what == "ring":
        own = numel // num_holders + (position < numel % num_holders)
        return (numel - own) + own * (num_holders - 1)
    if what == "star":
        return numel * np.where(position == 0, num_holders - 1, 1)
    assert what == "tree", what
    children = (2 * position + 1 < num_holders).astype(np.int64) + (2 * position + 2 < num_holders)
    return numel * ((position > 0) + children)


def hops(topology: str, num_holders: int) -> int:
    """One-way messages that follow each other in one sync over n holders."""
    if num_holders < 2:
        return 0
    depth = num_holders.bit_length() - 1  # of a heap: the last holder's distance from the first
    return {"ring": 2 * (num_holders - 1), "star": 2, "tree": 2 * depth}[topology]


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What each site moves in one exchange: a step for DDP, FSDP and EP, a round for the others.

    Attributes:
        every_step: whether an exchange happens in every step.
        payload, sent, received: bytes per site, [K].
        payload_shared, payload_expert: the payload by class, [K]; EP's all-to-all is expert.
        held, trained: parameters that each site stores and trains, [K].
        hops: one-way messages in sequence per exchange.
        executed: share of the top-k assignments that each site runs, [K].
        residents: experts per MoE layer and site, [L_moe, K].
    """

    every_step: bool
    payload_shared: Floats
    payload_expert: Floats
    sent: Floats
    received: Floats
    held: Ints
    trained: Ints
    hops: int
    executed: Floats
    residents: Ints

    @property
    def payload(self) -> Floats:
        return self.payload_shared + self.payload_expert


def method_traffic(
    shape: ModelShape,
    method: str,
    holdings: Holdings,
    *,
    bits: float = 32,
    topology: str = "ring",
    tokens_per_step: int = 0,
    at_least_one: bool = True,
    route_scope: str = "all",
    execute_target: float | None = None,
) -> Traffic:
    """Bytes of one exchange of a method at every site.

    Args:
        holdings: of FoMoE's placement; SPES trains by it, the other methods ignore it.
        bits: per element on the wire.
        tokens_per_step: of one site; EP's all-to-all depends on it.
        at_least_one, route_scope, execute_target: the router's options, which decide what FoMoE
            executes.
    """
    num_sites, width = holdings.num_sites, bits / 8
    full = cyclic_holdings(shape, num_sites, num_sites)
    placed = holdings if method in ("fomoe", "spes") else full
    shared_group = _everyone(num_sites, shape.shared_total)
    shared = _bytes(spread((shared_group,), num_sites, "payload"), width)
    expert = _bytes(placed.synced, width)
    wire = _bytes(_wire(shape.shared_total, placed, topology), width)
    held = shape.shared_total + placed.elements
    own = placed.elements if placed.trained is None else placed.trained
    trained = shape.shared_total + own
    executed = np.ones(num_sites)
    common = {"hops": hops(topology, num_sites), "residents": placed.residents}
    if method == "fomoe" and route_scope == "all":
        executed = _executed(shape, placed, at_least_one, execute_target)
    if method == "spes":
        return _spes(shape, placed, width, executed)
    if method == "ep":
        return _expert_parallel(shape, num_sites, width, topology, tokens_per_step)
    factor = 1.5 if method == "fsdp" else 1.0  # two gathers and a scatter against a ring's two
    return Traffic(
        every_step=method in EVERY_STEP,
        payload_shared=factor * shared,
        payload_expert=factor * expert,
        sent=factor * wire,
        received=factor * wire,
        held=-(-held // num_sites) if method == "fsdp" else held,
        trained=-(-held // num_sites) if method == "fsdp" else trained,
        executed=executed,
        **common,  # type: ignore[arg-type]
    )


@lru_cache(maxsize=1024)
def _wire(shared_numel: int, placed: Holdings, topology: str) -> Ints:
    """Elements that each site sends in one sync of everything, [K]."""
    groups = (_everyone(placed.num_sites, shared_numel), *placed.groups)
    return spread(groups, placed.num_sites, topology)


def _everyone(num_sites: int, numel: int) -> tuple[Ints, Ints]:
    return np.arange(num_sites)[None, :], np.array([numel], np.int64)


def _spes(shape: ModelShape, placed: Holdings, width: float, executed: Floats) -> Traffic:
    """Own share up, everything down, through a server that is no site (arXiv 2602.11543)."""
    num_sites = placed.num_sites
    several = float(num_sites > 1)
    ones = np.ones(num_sites)
    trained = shape.shared_total + placed.elements
    full = cyclic_holdings(shape, num_sites, num_sites)
    return Traffic(
        every_step=False,
        payload_shared=several * width * shape.shared_total * ones,
        payload_expert=several * width * shape.expert_total * ones,
        sent=_bytes(trained, several * width),
        received=several * width * shape.total * ones,
        held=shape.shared_total + full.elements,
        trained=trained,
        hops=2 * (num_sites > 1),
        executed=executed,
        residents=full.residents,
    )


def _expert_parallel(
    shape: ModelShape, num_sites: int, width: float, topology: str, tokens: int
) -> Traffic:
    """Each expert on one site, tokens travel to it; shared gradients are averaged every step.

    Dispatch and combine, forward and backward: 4 k (1 - 1/K) d b bytes per token and MoE layer.
    """
    own = cyclic_holdings(shape, num_sites, 1)
    shared_group = _everyone(num_sites, shape.shared_total)
    ones = np.ones(num_sites)
    per_token = 4 * shape.top_k * (1 - 1 / num_sites) * shape.d_model * ACTIVATION_BYTES
    moved = per_token * shape.num_moe_layers * tokens * ones
    wire = _bytes(spread((shared_group,), num_sites, topology), width) + moved
    held = shape.shared_total + own.elements
    several = num_sites > 1
    return Traffic(
        every_step=True,
        payload_shared=_bytes(spread((shared_group,), num_sites, "payload"), width),
        payload_expert=moved,
        sent=wire,
        received=wire,
        held=held,
        trained=held,
        hops=hops(topology, num_sites) + several * 4 * shape.num_moe_layers,
        executed=ones,
        residents=own.residents,
    )


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
