"""Evaluation: each site's own model, the merged model, and how stable routing is.

The merged model (all experts, no skip) exists nowhere in a distributed run: sites pass hidden
states of their share of the held-out part through one layer at a time, and fetch that layer's
experts for as long as it runs.

Shapes: L MoE layers, E experts, T probe tokens, K top-k.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomoe.config import Config
from fomoe.copies import num_sets, set_of_site
from fomoe.gathering import gather_whole
from fomoe.model.experts import Expert, swiglu
from fomoe.planning import RunPlan
from fomoe.segments import Plan, Segment
from fomoe.site import Site
from fomoe.sync.exchange import Item, fetch, gather
from fomoe.sync.transport import Transport
from fomoe.textchoice import NUM_COUNTERS, choosable_experts


@dataclass(frozen=True, kw_only=True)
class LocalEvaluation:
    """One site's resident model on the held-out part.

    Attributes:
        loss: mean cross-entropy in nats.
        probe_LTK: top-k choices on the first batch, the fixed probe set.
    """

    loss: float
    probe_LTK: Tensor


@dataclass(frozen=True, kw_only=True)
class MergedEvaluation:
    """The merged model on the held-out part.

    Attributes:
        loss: mean cross-entropy in nats.
        load_LE: assignments per layer and expert.
        more: further figures of the record and the summary.
    """

    loss: float
    load_LE: list[list[int]]
    more: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def evaluate_local(site: Site, held_out: np.ndarray) -> LocalEvaluation:
    """Evaluate one site's model, skipping absent experts as in training."""
    site.model.eval()
    ranks, batches = site.ranks, _batches(site.config, held_out)
    losses, probe = {}, torch.empty(0, 0, site.config.model.top_k, dtype=torch.int16)
    for turn in range(0, len(batches), ranks.size):
        # Ranks that share parameters run equally often; one without a batch runs the last again.
        index = min(turn + ranks.rank, len(batches) - 1)
        tokens = torch.from_numpy(batches[index]).to(site.device)
        with site.autocast:
            output = site.model(tokens[:, :-1], tokens[:, 1:])
        losses[index] = float(output.loss) * len(batches[index])
        if index == 0 and output.routings:
            chosen = [routing.selected_TK for routing in output.routings.values()]
            probe = torch.stack(chosen).to("cpu", torch.int16)
    own = json.dumps([list(losses.items()), probe.tolist()]).encode()
    parts = [json.loads(part) for part in ranks.gather(own)] if ranks.size > 1 else []
    for others, _ in parts:
        losses |= {index: loss for index, loss in others}
    if parts and parts[0][1]:
        probe = torch.tensor(parts[0][1], dtype=torch.int16)
    total = sum(losses[index] for index in range(len(batches)))
    return LocalEvaluation(loss=total / len(held_out), probe_LTK=probe)


def topk_agreement(before_LTK: Tensor, after_LTK: Tensor) -> float:
    """Mean share of each token's top-k that was in its top-k before; 1 if nothing moved."""
    if not after_LTK.numel():
        return 1.0
    same = (before_LTK.unsqueeze(-1) == after_LTK.unsqueeze(-2)).any(-2)
    return float(same.float().mean())


@torch.no_grad()
def evaluate_merged(
    plan: RunPlan,
    sites: Mapping[int, Site],
    transport: Transport,
    held_out: np.ndarray,
) -> MergedEvaluation:
    """Evaluate all experts together, right after a sync; every rank of every site takes a share of
    the batches.

    Args:
        plan: the experiment: where each expert's tensors are found.
        sites: the sites of this process.
    """
    config, inside = plan.config, transport.inside
    batches = _batches(config, held_out)
    share, padding = _share(len(batches), transport)
    of_site = plan.of_site(transport.sites[0])
    # By rank of this site, and by lane of this rank: the rows that it has of every expert.
    segments = [_expert_segments(own.segment_plan) for own in of_site]
    lanes = [_expert_segments(lane) for lane in of_site[inside.rank].lanes.values()]
    whole, router_rows = _expert_segments(plan.segment_plan), _router_segments(plan.segment_plan)

    def experts_of(layer: int) -> tuple[dict[int, Expert], Tensor | None]:
        of_layer = [own.get(layer, []) for own in segments]
        parts: dict[str, list[Tensor]] = {}
        for lane, own in zip(transport.lanes, lanes, strict=True):
            for name, rows in _fetch_segments(sites, lane, own.get(layer, [])).items():
                parts.setdefault(name, []).append(rows)
        tensors = {n: p[0] if len(p) == 1 else torch.cat(p) for n, p in parts.items()}
        if inside.size > 1:
            tensors = gather_whole(inside, of_layer, lambda segment: tensors[segment.name])
        device = next(iter(sites.values())).device
        experts = _by_expert(config, tensors, whole[layer], device)
        scattered = router_rows.get(layer)  # with copies, which one rank of a site trains
        return experts, _fetch_rows(sites, transport, scattered) if scattered else None

    def run() -> tuple[dict[int, float], dict[int, list[list[int]]]]:
        return _run_layers(
            config,
            {index: sites[site] for index, site in {**share, **padding}.items()},
            batches,
            experts_of,
            gather_text_counts(config, sites, transport) if num_sets(config) > 1 else None,
        )

    # A site of several ranks is the only one of its process.
    losses, loads = run() if inside.size == 1 else next(iter(sites.values())).model.within(run)
    return _combine(transport, share, losses, loads, [len(batch) for batch in batches])


def _share(count: int, transport: Transport) -> tuple[dict[int, int], dict[int, int]]:
    """Batches that run in this process, and the site of each; and batches that run for nothing.

    Ranks that share parameters have to run equally often, so one that has fewer batches than its
    siblings runs some again, under indices from the end.
    """
    members, inside = transport.members, transport.inside
    share: dict[int, int] = {}
    padding: dict[int, int] = {}
    for site in transport.sites:
        own = [index for index in range(count) if members[index % len(members)] == site]
        mine = own[inside.rank :: inside.size]
        share |= dict.fromkeys(mine, site)
        missing = -(-len(own) // inside.size) - len(mine)
        padding |= dict.fromkeys(range(-missing, 0), site)
    return dict(sorted(share.items())), padding


@torch.no_grad()
def evaluate_stored(
    site: Site, plan: Plan, read: Callable[[str], Tensor], held_out: np.ndarray
) -> MergedEvaluation:
    """Evaluate all experts together, with the shared parameters of one site.

    Args:
        plan: names the experts' tensors.
        read: an expert's tensor by name, on any device.
    """
    batches = _batches(site.config, held_out)
    segments = _expert_segments(plan)
    losses, loads = _run_layers(
        site.config,
        dict.fromkeys(range(len(batches)), site),
        batches,
        lambda layer: (
            _by_expert(
                site.config,
                {s.name: read(s.name) for s in segments[layer]},
                segments[layer],
                site.device,
            ),
            None,
        ),
    )
    return _sum_up([[i, losses[i], loads[i]] for i in losses], [len(batch) for batch in batches])


def _run_layers(
    config: Config,
    share: Mapping[int, Site],
    batches: list[np.ndarray],
    experts_of: Callable[[int], tuple[dict[int, Expert], Tensor | None]],
    counts_GN: Tensor | None = None,
) -> tuple[dict[int, float], dict[int, list[list[int]]]]:
    """Loss, and assignments per layer and expert, of the batches that run here, by index.

    Args:
        share: whose shared parameters run a batch, by its index.
        experts_of: all experts of an MoE layer, and their router's rows where no site has all of
            them; called once per layer.
        counts_GN: n-grams of every set of copies; None without copies.
    """
    hidden: dict[int, Tensor] = {}
    scopes: dict[int, Tensor | None] = {}
    loads: dict[int, list[list[int]]] = {index: [] for index in share}
    for index, site in share.items():
        site.model.eval()
        with site.autocast:
            tokens = torch.from_numpy(batches[index]).to(site.device)
            hidden[index] = site.model.embed(tokens[:, :-1])
        scopes[index] = None
        if counts_GN is not None:
            scopes[index] = choosable_experts(config, counts_GN, tokens[:, :-1])
    for layer in range(config.model.num_layers):
        experts, router_ED = None, None
        if layer in config.model.moe_layers:
            experts, router_ED = experts_of(layer)
        for index, site in share.items():
            with site.autocast:
                hidden[index], _, stats = site.model.run_layer(
                    layer, hidden[index], experts, scope_TE=scopes[index], router_ED=router_ED
                )
            if stats is not None:
                loads[index].append(stats.selected_E.tolist())
    losses = {}
    for index, site in share.items():
        targets = torch.from_numpy(batches[index][:, 1:]).to(site.device)
        with site.autocast:
            losses[index] = float(site.model.loss(hidden[index], targets))
    return losses, loads


def gather_text_counts(config: Config, sites: Mapping[int, Site], transport: Transport) -> Tensor:
    """n-grams counted at the sites of each set of copies, int64 [G, N], at every site."""

    def message(site: int) -> bytes:
        counts_N = sites[site].text_counts_N
        assert counts_N is not None
        return counts_N.numpy().tobytes()

    counts_GN = torch.zeros(num_sets(config), NUM_COUNTERS, dtype=torch.int64)
    for site, received in enumerate(gather(transport, message)):
        own_N = torch.frombuffer(bytearray(received), dtype=torch.int64)
        counts_GN[set_of_site(config, site)] += own_N
    return counts_GN


def _combine(
    transport: Transport,
    share: dict[int, int],
    losses: dict[int, float],
    loads: dict[int, list[list[int]]],
    sizes: list[int],
) -> MergedEvaluation:
    """Send every site's results to every site, and add them in the order of the batches."""

    def message(site: int) -> bytes:
        own = [index for index, owner in share.items() if owner == site]
        return json.dumps([[index, losses[index], loads[index]] for index in own]).encode()

    def of_ranks(site: int) -> bytes:
        parts = transport.inside.gather(message(site))
        return json.dumps([row for part in parts for row in json.loads(part)]).encode()

    rows = sorted(row for part in gather(transport, of_ranks) for row in json.loads(part))
    return _sum_up(rows, sizes)


def _sum_up(rows: list[Any], sizes: list[int]) -> MergedEvaluation:
    """From index, loss and assignments of every batch, and its number of sequences."""
    loss = sum(size * row[1] for size, row in zip(sizes, rows, strict=True)) / sum(sizes)
    load_LE = np.sum([row[2] for row in rows], axis=0).astype(int).tolist()
    return MergedEvaluation(loss=loss, load_LE=load_LE)


def _expert_segments(plan: Plan) -> dict[int, list[Segment]]:
    """Segments of routed experts by layer, in the order of expert ids."""
    by_layer: dict[int, list[Segment]] = {}
    for bucket in plan.buckets:
        for segment in bucket.segments:
            if segment.is_expert:
                assert segment.layer is not None
                by_layer.setdefault(segment.layer, []).append(segment)
    for segments in by_layer.values():
        segments.sort(key=lambda s: (s.expert, s.name))
    return by_layer


def _router_segments(plan: Plan) -> dict[int, list[Segment]]:
    """Router rows by layer, in their order, where no site has all of them."""
    by_layer: dict[int, list[Segment]] = {}
    for bucket in plan.buckets:
        if not bucket.is_expert and len(bucket.holders) < plan.num_sites:
            for segment in bucket.segments:
                assert segment.layer is not None
                by_layer.setdefault(segment.layer, []).append(segment)
    for segments in by_layer.values():
        segments.sort(key=lambda s: s.start)
    return by_layer


def _fetch_segments(
    sites: Mapping[int, Site], transport: Transport, segments: list[Segment]
) -> dict[str, Tensor]:
    """Some segments by name, on the sites' device; local ones are not copied."""
    device = next(iter(sites.values())).device
    by_name = {segment.name: segment for segment in segments}
    items = [Item(s.name, s.shape, s.holders) for s in segments]
    tensors = fetch(transport, items, lambda site, name: sites[site].view(by_name[name]))
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _fetch_rows(sites: Mapping[int, Site], transport: Transport, segments: list[Segment]) -> Tensor:
    """All router rows of one layer, [E, D]."""
    tensors = _fetch_segments(sites, transport, segments)
    return torch.cat([tensors[segment.name] for segment in segments])


def _by_expert(
    config: Config, tensors: Mapping[str, Tensor], segments: list[Segment], device: torch.device
) -> dict[int, Expert]:
    """All experts of a layer as functions, from their tensors by name."""
    experts: dict[int, Expert] = {}
    for expert in range(config.model.num_experts):
        own = {s.parameter.rpartition(".")[2]: s.name for s in segments if s.expert == expert}
        gate_up, down = (tensors[own[part]] for part in ("gate_up", "down"))
        experts[expert] = partial(swiglu, gate_up=gate_up, down=down)
    return experts


def _batches(config: Config, held_out: np.ndarray) -> list[np.ndarray]:
    size = config.evaluation_batch_size
    return [held_out[i : i + size] for i in range(0, len(held_out), size)]


def routing_health(selected_LE: Tensor, skipped_L: Tensor, entropy_L: Tensor) -> list[dict]:
    """Health of each MoE layer's routing, from counts of selected assignments.

    Returns per layer: `load` (share per expert), `max_vio` (largest load over the mean, minus 1;
    2408.15664), `dead_expert_fraction` (experts that no token chose), `entropy` (nats) and
    `skipped_fraction`.
    """
    health = []
    for selected_E, skipped, entropy in zip(selected_LE, skipped_L, entropy_L, strict=True):
        load_E = selected_E / selected_E.sum().clamp_min(1)
        health.append(
            {
                "load": [round(x, 6) for x in load_E.tolist()],
                "max_vio": float(load_E.max() * len(load_E) - 1),
                "dead_expert_fraction": float((selected_E == 0).float().mean()),
                "entropy": float(entropy),
                "skipped_fraction": float(skipped / selected_E.sum().clamp_min(1)),
            }
        )
    return health
