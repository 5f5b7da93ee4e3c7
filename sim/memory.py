"""Memory of a site and of each of its accelerators, part by part, and whether it fits.

Inside a site everything that training keeps is sharded over the accelerators (FSDP); activations
are per accelerator. The states of a config are those that `fomoe.memory.site_memory` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from fomoe_sim.activations import FLOAT32, activations_per_token, dispatch_per_token
from fomoe_sim.scenario import Scenario
from fomoe_sim.shape import ModelShape

# Bytes per element: parameters, gradients, Adam moments, master weights. `fp32` is what the trainer
# keeps; `mixed` is bf16 weights with fp32 accumulation and master copy (arXiv 1710.03740).
STATES = {"fp32": (4, 4, 8, 0), "mixed": (2, 4, 8, 4)}


class MemoryPart(NamedTuple):
    """One part of a site's memory: bytes of the whole site, and of its fullest accelerator."""

    name: str
    where: str  # accelerator, host or disk
    site_bytes: float
    accelerator_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SiteMemory:
    """All parts of one site's memory.

    Attributes:
        parts: in the order of the table.
        capacity_bytes: of one accelerator.
        host_capacity_bytes: of the site's hosts.
    """

    parts: tuple[MemoryPart, ...]
    capacity_bytes: float
    host_capacity_bytes: float

    def total(self, where: str) -> float:
        """Bytes of the whole site in one place."""
        return sum(part.site_bytes for part in self.parts if part.where == where)

    @cached_property
    def site_bytes(self) -> float:
        return sum(part.site_bytes for part in self.parts)

    @cached_property
    def per_accelerator(self) -> float:
        return sum(part.accelerator_bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.missing_accelerator <= 0 and self.missing_host <= 0

    @property
    def missing_accelerator(self) -> float:
        """Bytes that each accelerator lacks; negative is room left."""
        return self.per_accelerator - self.capacity_bytes

    @cached_property
    def missing_host(self) -> float:
        return self.total("host") - self.host_capacity_bytes

    def verdict(self, site: str) -> str:
        """Fits or not, by how much, because of what, of a site of that name."""
        if self.missing_accelerator > 0:
            worst = max(self.parts, key=lambda part: part.accelerator_bytes)
            return (
                f"{site} does not fit: each accelerator lacks "
                f"{self.missing_accelerator / 1e9:.1f} GB of {self.capacity_bytes / 1e9:.0f}, most "
                f"of it {worst.name} ({worst.accelerator_bytes / 1e9:.1f} GB)"
            )
        if self.missing_host > 0:
            on_host = [part for part in self.parts if part.where == "host"]
            worst = max(on_host, key=lambda part: part.site_bytes)
            return (
                f"{site} does not fit: its hosts lack {self.missing_host / 1e9:.1f} GB of "
                f"{self.host_capacity_bytes / 1e9:.0f}, most of it {worst.name} "
                f"({worst.site_bytes / 1e9:.1f} GB)"
            )
        return f"{site} fits with {-self.missing_accelerator / 1e9:.1f} GB per accelerator left"


def site_memories(scenario: Scenario) -> list[SiteMemory]:
    """Memory of every site; equal sites share one object."""
    traffic = scenario.traffic
    amounts = zip(
        traffic.held.tolist(),
        traffic.trained.tolist(),
        traffic.payload.tolist(),
        traffic.residents.max(axis=0, initial=0).tolist(),
        traffic.executed.tolist(),
        strict=True,
    )
    seen: dict[tuple[object, ...], SiteMemory] = {}
    result = []
    for index, (site, own) in enumerate(zip(scenario.cluster.sites, amounts, strict=True)):
        key = (site.accelerator.name, site.count, site.host_bytes, *own)
        if key not in seen:
            seen[key] = _site_memory(scenario, index)
        result.append(seen[key])
    return result


def _site_memory(scenario: Scenario, index: int) -> SiteMemory:
    site = scenario.cluster.sites[index]
    parts = [
        *_states(scenario, index),
        *_sync_parts(scenario, index),
        *_working(scenario, index),
    ]
    allocated = sum(part.accelerator_bytes for part in parts)
    slack = scenario.slack * allocated
    parts.append(
        MemoryPart(
            name="allocator slack",
            where="accelerator",
            site_bytes=slack * site.count,
            accelerator_bytes=slack,
        )
    )
    return SiteMemory(
        parts=tuple(part for part in parts if part.site_bytes),
        capacity_bytes=site.accelerator.memory_bytes,
        host_capacity_bytes=site.host_bytes,
    )


def _states(scenario: Scenario, index: int) -> list[MemoryPart]:
    """What training keeps between steps, sharded over the site's accelerators."""
    count = scenario.cluster.sites[index].count
    if scenario.trainer_states is not None:
        exact = scenario.trainer_states[index]
        known = ("parameters", exact.parameters), ("gradients", exact.gradients)
        named = (*known, ("inner optimizer", exact.inner_optimizer))
        return [_sharded(name, size, count) for name, size in named]
    held = int(scenario.traffic.held[index])
    trained = int(scenario.traffic.trained[index])
    parameter, gradient, optimizer, master = STATES[scenario.states]
    sizes = (
        ("parameters", parameter * held),
        ("gradients", gradient * trained),
        ("inner optimizer", optimizer * trained),
        ("master weights", master * trained),
    )
    return [_sharded(name, size, count) for name, size in sizes]


def _sharded(name: str, size: float, count: int) -> MemoryPart:
    return MemoryPart(
        name=name, where="accelerator", site_bytes=size, accelerator_bytes=size / count
    )


def _sync_parts(scenario: Scenario, index: int) -> list[MemoryPart]:
    """Anchor, outer state, error feedback and the buffers of one fragment's sync."""
    if scenario.traffic.every_step or scenario.cluster.num_sites < 2:
        return []
    held = int(scenario.traffic.held[index])
    width = scenario.bits / 8
    synced = float(scenario.traffic.payload[index]) / width
    fragment = synced / scenario.fragments
    anchor, momentum = FLOAT32 * held, FLOAT32 * held * scenario.outer_vectors
    if scenario.trainer_states is not None:
        exact = scenario.trainer_states[index]
        anchor, momentum = exact.anchor, exact.outer_optimizer
    sizes: list[tuple[str, float]] = [
        ("anchor", anchor),
        ("outer momentum", momentum),
        ("error feedback", FLOAT32 * synced if scenario.bits < 16 else 0),
        # The reduction works on a copy, so that a failed sync leaves the model as it was.
        ("fragment buffer", FLOAT32 * fragment),
        ("codec buffers", 2 * width * fragment if scenario.bits < 32 else 0),
    ]
    count = scenario.cluster.sites[index].count
    if scenario.outer_on == "accelerator":
        return [_sharded(name, size, count) for name, size in sizes]
    return [
        # Buffers are worked on, so they stay in host memory even if the states are on disk.
        MemoryPart(
            name=name, where="host" if "buffer" in name else scenario.outer_on, site_bytes=size
        )
        for name, size in sizes
    ]


def _working(scenario: Scenario, index: int) -> list[MemoryPart]:
    """What one micro-batch needs on every accelerator."""
    return _working_parts(
        scenario.shape,
        count=scenario.cluster.sites[index].count,
        tokens=scenario.micro_batch * scenario.seq_len,
        executed=scenario.shape.top_k * float(scenario.traffic.executed[index]),
        residents=int(scenario.traffic.residents[:, index].max(initial=0)),
        element_bytes=scenario.compute_bytes,
        recompute=scenario.recompute,
    )


@lru_cache(maxsize=4096)
def _working_parts(
    shape: ModelShape,
    *,
    count: int,
    tokens: int,
    executed: float,
    residents: int,
    element_bytes: int,
    recompute: str,
) -> list[MemoryPart]:
    per_token = activations_per_token(
        shape, executed=executed, element_bytes=element_bytes, recompute=recompute
    )
    dispatch = dispatch_per_token(
        shape, executed=executed, element_bytes=element_bytes, recompute=recompute
    )
    # Logits in compute precision, their fp32 copy for the loss and its gradient.
    logits = shape.vocab_size * (element_bytes + 2 * FLOAT32)
    sizes = [
        ("activations", tokens * per_token),
        ("MoE dispatch", tokens * dispatch),
        ("logits", tokens * logits),
    ]
    if count > 1:
        # FSDP gathers the layer in use and prefetches the next one.
        layer = max(shape.layer_shared) + residents * shape.expert_numel
        sizes.append(("gathered layers", 2 * element_bytes * layer))
    return [
        MemoryPart(name=name, where="accelerator", site_bytes=size * count, accelerator_bytes=size)
        for name, size in sizes
    ]


def capacity_verdict(scenario: Scenario) -> str | None:
    """The first site that would store more experts of a layer than its stated capacity, in words.

    FSDP is exempt: its sites store shards of all experts.
    """
    capacities = scenario.cluster.capacities
    residents = scenario.traffic.residents
    if capacities is None or scenario.method == "fsdp" or not residents.size:
        return None
    for site, held, limit in zip(
        scenario.cluster.sites, residents.max(axis=0).tolist(), capacities, strict=True
    ):
        if held > limit:
            return f"{site.name} does not fit: it holds {held} experts per layer, capacity {limit}"
    return None


def verdict(scenario: Scenario, memories: list[SiteMemory]) -> tuple[bool, str]:
    """Whether all sites fit, and the words of the first that does not, or of the tightest."""
    over = capacity_verdict(scenario)
    if over is not None:
        return False, over
    bad = next((i for i, memory in enumerate(memories) if not memory.fits), None)
    shown = memories.index(most_loaded(memories)) if bad is None else bad
    return bad is None, memories[shown].verdict(scenario.cluster.sites[shown].name)


def most_loaded(memories: list[SiteMemory]) -> SiteMemory:
    """The site that is nearest to, or furthest beyond, its limit."""
    return max(memories, key=lambda memory: memory.per_accelerator / memory.capacity_bytes)


def site_totals(memories: list[SiteMemory]) -> np.ndarray:
    """Bytes of each whole site, [K]."""
    return np.array([memory.site_bytes for memory in memories])
