"""What one question's sites do in a step, whatever H is: traffic, layouts, times, and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from fomoe_sim import layout, memory
from fomoe_sim.layout import Layout
from fomoe_sim.question import Question
from fomoe_sim.shape import token_work
from fomoe_sim.step import SiteWork
from fomoe_sim.traffic import Floats, Traffic, method_traffic
from fomoe_sim.trainer import FP32


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """One question at many points; arrays of equal length, [P].

    Attributes:
        bandwidth: of every site's own link, both ways, bit/s; NaN: the cluster's.
    """

    question: Question
    local_steps: Floats
    bits: Floats
    fragments: Floats
    overlap_steps: Floats
    bandwidth: Floats


def grid(question: Question, **axes: Any) -> Grid:
    """A grid of one question: axes are arrays of one length, the rest stays as it is asked."""
    size = max((np.size(values) for values in axes.values()), default=1)
    names = ("local_steps", "bits", "fragments", "overlap_steps")
    base = {name: getattr(question, name) for name in names} | {"bandwidth": np.nan}
    if "bits" in axes:
        question = replace(question, codec=FP32)
    found = {
        name: np.broadcast_to(np.asarray(value, float), (size,)).copy()
        for name, value in (base | axes).items()
    }
    return Grid(question=question, **found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """What does not depend on a grid's axes.

    Attributes:
        tokens: of a step per site, [K].
        step_s: of every site at the low, central and high share of peak, [3, K].
        layouts: of every site.
        work: FLOPs of the executed part of a token at each site, [K].
    """

    question: Question
    traffic: Traffic
    tokens: Floats
    step_s: Floats
    layouts: tuple[Layout, ...]
    work: Floats

    @property
    def tightest(self) -> int:
        """The site that is nearest to, or furthest beyond, its accelerators' memory."""
        pairs = zip(self.layouts, self.question.cluster.sites, strict=True)
        return int(np.argmax([one.bytes / s.accelerator.memory_bytes for one, s in pairs]))

    @property
    def slowest(self) -> Layout:
        """The layout of the site whose step takes longest."""
        return self.layouts[int(self.step_s[1].argmax())]


def answer(question: Question) -> Answered:
    """Traffic, tokens, layouts and step times of one question's sites.

    Raises:
        ConfigError: if a site's step is too small for its accelerators.
    """
    router = dict(question.router)
    traffic = method_traffic(
        question.shape, question.method, question.holdings, codec=question.codec, **router
    )
    cluster, mfu = question.cluster, question.ask.mfu
    tokens = np.full(cluster.num_sites, question.batch_tokens / cluster.num_sites)
    if question.shares is not None:
        tokens = question.batch_tokens * np.array(question.shares)
    token = token_work(question.shape, question.inside.seq_len)
    # FLOPs of a token at each site, without recomputation.
    work = token.products + token.scores + token.experts * traffic.executed
    layouts = _layouts(question, traffic, tokens)
    if question.split == "speed" and not cluster.equal and question.step_time_s is None:
        tokens, layouts = _by_speed(question, traffic, work, tokens, layouts)
    step_s = np.array([[one.step_s[end] for one in layouts] for end in range(3)])
    if mfu is not None:
        # Model FLOPs utilisation counts the model's FLOPs once, whatever is computed again.
        step_s = np.tile(tokens * work / peak_flops(question) / mfu, (3, 1))
    if question.step_time_s is not None:
        # A measured step fixes the slowest site's speed; the FLOPs still say what others save.
        peak = peak_flops(question)
        part = (
            tokens * work / peak * peak.min() / (question.step_flops or tokens.max() * token.full)
        )
        fixed = question.step_fixed_s
        step_s = np.tile(fixed + (question.step_time_s - fixed) * part, (3, 1))
    return Answered(
        question=question, traffic=traffic, tokens=tokens, step_s=step_s, layouts=layouts, work=work
    )


def peak_flops(question: Question) -> Floats:
    """FLOP/s of all accelerators of each site, [K]."""
    sites = question.cluster.sites
    return np.array([site.count * question.inside.peak(site.accelerator) for site in sites])


def _site_work(question: Question, traffic: Traffic, index: int, tokens: float) -> SiteWork:
    shape, site = question.shape, question.cluster.sites[index]
    held = float(traffic.held[index])
    shared = min(held, float(shape.shared_total))
    if question.method.crosses == "shards":
        shared = held * shape.shared_total / shape.total
    states = question.counted[index] if question.counted else None
    residents = traffic.residents[:, index]
    anchored = not question.method.every_step and question.cluster.num_sites > 1
    here = anchored and question.ask.outer_on == "accelerator"
    return SiteWork(
        shape=shape,
        device=site.accelerator,
        count=site.count,
        inside=question.inside,
        tokens=tokens,
        executed=round(float(traffic.executed[index]), 12),
        residents=float(residents.mean()) if residents.size else 0.0,
        experts=held - shared,
        shared=shared,
        trained=float(traffic.trained[index]),
        counted=(states.parameters, states.gradients, states.inner_optimizer) if states else None,
        outer_bytes=memory.FLOAT32 * held * (2 + question.method.outer_vectors) if here else 0.0,
    )


def _layouts(question: Question, traffic: Traffic, tokens: Floats) -> tuple[Layout, ...]:
    """One search for each kind of site; the others of the kind take its degrees."""
    works = [_site_work(question, traffic, i, float(amount)) for i, amount in enumerate(tokens)]
    first: dict[tuple[Any, ...], Layout] = {}
    # The site that holds and executes most is searched, so that its degrees fit all of its kind.
    for work in sorted(works, key=lambda work: (-work.experts, -work.executed)):
        kind = (work.device, work.count, work.tokens)
        if kind not in first:
            first[kind] = layout.choose(work)
    return tuple(layout.at(work, first[work.device, work.count, work.tokens]) for work in works)


def _by_speed(
    question: Question, traffic: Traffic, work: Floats, tokens: Floats, layouts: tuple[Layout, ...]
) -> tuple[Floats, tuple[Layout, ...]]:
    """Shares of the batch under which all sites end their steps together."""
    total, seq_len = tokens.sum(), question.inside.seq_len
    for _ in range(4):
        step_s = np.array([one.step_s[1] for one in layouts])
        if question.ask.mfu is not None:
            step_s = tokens * work / peak_flops(question)
        speed = tokens / step_s
        # Whole sequences, at least one for every site.
        wanted = np.maximum(1.0, np.round(total * speed / speed.sum() / seq_len))
        wanted[int(wanted.argmax())] += total / seq_len - wanted.sum()
        if (wanted * seq_len == tokens).all() or wanted.min() < 1:
            break
        tokens = wanted * seq_len
        layouts = _layouts(question, traffic, tokens)
    return tokens, layouts


# ------------------------------------------------------------------------------------------ memory


def host_parts(found: Answered, index: int, bits: Floats, fragments: Floats) -> dict[str, Floats]:
    """Bytes on a site's hosts (or disks) by part, [P]."""
    question, traffic, inside = found.question, found.traffic, found.question.inside
    states = question.counted[index] if question.counted else None
    held, trained = float(traffic.held[index]), float(traffic.trained[index])
    several = question.cluster.num_sites > 1 and not question.method.every_step
    parts: dict[str, Floats] = {}
    if several and question.ask.outer_on != "accelerator":
        synced = memory.FLOAT32 * float(traffic.shared[index] + traffic.experts[index])
        anchor = memory.FLOAT32 * held
        momentum, left_out = anchor * question.method.outer_vectors, synced
        if states:
            anchor, momentum = states.anchor, states.outer_optimizer
            left_out = states.residuals or synced
        parts = {
            "anchor": anchor + 0 * bits,
            "outer momentum": momentum + 0 * bits,
            "error feedback": np.where(bits < 32, left_out, 0.0),
            # The reduction works on a copy, so that a failed sync leaves the model as it was.
            "fragment buffer": synced / fragments,
            "codec buffers": np.where(bits < 32, 2 * bits / 32 * synced / fragments, 0.0),
        }
        if question.ask.outer_on == "disk":
            # Buffers are worked on, so they stay in host memory even if the states are on disk.
            parts = {name: size for name, size in parts.items() if "buffer" in name}
    weight, _, master = memory.STATES[inside.states]
    copy = weight * held + (memory.ADAM[inside.adam] + master) * trained
    return parts | {"checkpoint copy": np.full(len(bits), copy)}


def memory_columns(one: Grid, found: Answered) -> dict[str, Any]:
    """Whether every site fits, by how much, because of what."""
    size, sites, tightest = len(one.bits), one.question.cluster.sites, found.tightest
    hosts = np.zeros((size, len(sites)))
    for index in range(len(sites)):
        parts = host_parts(found, index, one.bits, one.fragments)
        hosts[:, index] = sum(parts.values(), np.zeros(size))
    room = np.array([site.host_bytes for site in sites])
    used, limit = found.layouts[tightest].bytes, sites[tightest].accelerator.memory_bytes
    inside = np.array([one.bytes for one in found.layouts]) * one.question.cluster.counts
    verdicts: Any = over_capacity(found)
    if not verdicts and used > limit:
        name, most = max(found.layouts[tightest].parts.items(), key=lambda item: item[1])
        verdicts = (
            f"{sites[tightest].name} does not fit: each accelerator lacks "
            f"{(used - limit) / 1e9:.1f} GB of {limit / 1e9:.0f}, most of it {name} "
            f"({most / 1e9:.1f} GB)"
        )
    fits = np.zeros(size, bool)
    if not verdicts:
        lacking, worst = (hosts - room).max(axis=1), (hosts - room).argmax(axis=1)
        fits = lacking <= 0
        left = f"{(limit - used) / 1e9:.1f} GB per accelerator left"
        words = [
            f"{sites[tightest].name} fits with {left}"
            if short <= 0
            else f"{sites[k].name} does not fit: its hosts lack {short / 1e9:.1f} GB of "
            f"{room[k] / 1e9:.0f}, for anchor, outer state, sync buffers and a checkpoint"
            for short, k in zip(lacking.tolist(), worst.tolist(), strict=True)
        ]
        verdicts = np.array(words, dtype=object)
    return {
        "memory_bytes_per_site": whole_bytes(inside.mean() + hosts.mean(axis=1)),
        "memory_bytes_per_accelerator": ceil(used),
        "host_bytes_per_site": whole_bytes(hosts.max(axis=1)),
        "fits": fits,
        "memory_verdict": verdicts,
    }


def over_capacity(found: Answered) -> str:
    """The first site that would store more experts of a layer than it states, in words."""
    capacities, residents = found.question.cluster.capacities, found.traffic.residents
    if capacities is None or found.question.method.crosses == "shards" or not residents.size:
        return ""
    most = residents.max(axis=0).tolist()
    for site, held, limit in zip(found.question.cluster.sites, most, capacities, strict=True):
        if held > limit:
            return f"{site.name} does not fit: it holds {held} experts per layer, capacity {limit}"
    return ""


def whole_bytes(amount: Floats) -> Any:
    """Bytes as integers, if they fit: half a byte of low-bit payload is sent as a whole one."""
    whole = np.ceil(amount - 1e-6)
    return whole.astype(np.int64) if np.max(whole) < 2**62 else whole
