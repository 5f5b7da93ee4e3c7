"""What one question's sites do in a step, whatever H is: traffic, layouts, times, and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from fomoe_sim import layout, memory
from fomoe_sim.layout import Layout
from fomoe_sim.question import Question
from fomoe_sim.time import SiteWork
from fomoe_sim.traffic import Floats, Traffic, method_traffic
from fomoe_sim.work import token_work


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
    base = {
        "local_steps": question.local_steps,
        "bits": question.bits,
        "fragments": question.fragments,
        "overlap_steps": question.overlap_steps,
        "bandwidth": np.nan,
    }
    found = {
        name: np.broadcast_to(np.asarray(value, float), (size,)).copy()
        for name, value in (base | axes).items()
    }
    return Grid(question=question, **found)


def vary(question: Question, **changes: Any) -> Question:
    """The question with some fields replaced."""
    return replace(question, **changes)


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


def answer(question: Question) -> Answered:
    """Traffic, tokens, layouts and step times of one question's sites."""
    traffic = method_traffic(
        question.shape, question.method, question.holdings, **dict(question.router)
    )
    cluster = question.cluster
    tokens = np.full(cluster.num_sites, question.batch_tokens / cluster.num_sites)
    layouts = _layouts(question, traffic, tokens)
    if question.split == "speed" and not cluster.equal and question.step_time_s is None:
        tokens, layouts = _by_speed(question, traffic, tokens, layouts)
    work = _work(question, traffic)
    step_s = np.array([[one.step_s[end] for one in layouts] for end in range(3)])
    if question.mfu is not None:
        # Model FLOPs utilisation counts the model's FLOPs once, whatever is computed again.
        step_s = np.tile(tokens * work / peak_flops(question) / question.mfu, (3, 1))
    if question.step_time_s is not None:
        step_s = np.tile(_measured(question, tokens, work), (3, 1))
    return Answered(
        question=question, traffic=traffic, tokens=tokens, step_s=step_s, layouts=layouts, work=work
    )


def peak_flops(question: Question) -> Floats:
    name = "peak_fp32_flops" if question.element_bytes == 4 else "peak_flops"
    sites = question.cluster.sites
    return np.array([site.count * getattr(site.accelerator, name) for site in sites])


def _work(question: Question, traffic: Traffic) -> Floats:
    """FLOPs of a token at each site, without recomputation, [K]."""
    token = token_work(question.shape, question.seq_len)
    return token.products + token.scores + token.experts * traffic.executed


def _measured(question: Question, tokens: Floats, work: Floats) -> Floats:
    """A measured step fixes the slowest site's speed; the FLOPs still say what others save."""
    peak = peak_flops(question)
    full = tokens.max() * token_work(question.shape, question.seq_len).full
    part = tokens * work / peak * peak.min() / (question.step_flops or full)
    assert question.step_time_s is not None
    return question.step_fixed_s + (question.step_time_s - question.step_fixed_s) * part


def _site_work(question: Question, traffic: Traffic, index: int, tokens: float) -> SiteWork:
    shape, site = question.shape, question.cluster.sites[index]
    held = float(traffic.held[index])
    shared = min(held, float(shape.shared_total))
    if question.method.crosses == "shards":
        shared = held * shape.shared_total / shape.total
    states = question.counted[index] if question.counted else None
    residents = traffic.residents[:, index]
    anchored = not question.method.every_step and question.cluster.num_sites > 1
    outer = memory.FLOAT32 * held * (2 + question.method.outer_vectors) if anchored else 0.0
    return SiteWork(
        shape=shape,
        device=site.accelerator,
        count=site.count,
        tokens=tokens,
        seq_len=question.seq_len,
        executed=round(float(traffic.executed[index]), 12),
        residents=float(residents.mean()) if residents.size else 0.0,
        experts=held - shared,
        shared=shared,
        trained=float(traffic.trained[index]),
        element_bytes=question.element_bytes,
        recompute=question.recompute,
        micro_batch=question.micro_batch,
        states=question.states,
        adam=question.adam,
        kernels=question.kernels,
        counted=((states.parameters, states.gradients, states.inner_optimizer) if states else None),
        outer_bytes=outer if question.outer_on == "accelerator" else 0.0,
        parallel=question.parallel,
    )


def _layouts(question: Question, traffic: Traffic, tokens: Floats) -> tuple[Layout, ...]:
    """One search for each kind of site; the others of the kind take its degrees."""
    works = [
        _site_work(question, traffic, index, float(amount)) for index, amount in enumerate(tokens)
    ]
    first: dict[tuple[Any, ...], Layout] = {}
    found: list[Layout | None] = [None] * len(works)
    # The site that holds and executes most is searched, so that its degrees fit all of its kind.
    for index in sorted(range(len(works)), key=lambda i: (-works[i].experts, -works[i].executed)):
        work = works[index]
        kind = (work.device, work.count, work.tokens)
        if kind not in first:
            first[kind] = layout.choose(work)
        found[index] = layout.at(work, first[kind])
    return tuple(one for one in found if one is not None)


def _by_speed(
    question: Question, traffic: Traffic, tokens: Floats, layouts: tuple[Layout, ...]
) -> tuple[Floats, tuple[Layout, ...]]:
    """Shares of the batch under which all sites end their steps together."""
    total, peak = tokens.sum(), peak_flops(question)
    for _ in range(4):
        step_s = np.array([one.step_s[1] for one in layouts])
        if question.mfu is not None:
            step_s = tokens * _work(question, traffic) / peak
        speed = tokens / step_s
        # Whole sequences, at least one for every site.
        wanted = np.maximum(1.0, np.round(total * speed / speed.sum() / question.seq_len))
        wanted[int(wanted.argmax())] += total / question.seq_len - wanted.sum()
        if (wanted * question.seq_len == tokens).all() or wanted.min() < 1:
            break
        tokens = wanted * question.seq_len
        layouts = _layouts(question, traffic, tokens)
    return tokens, layouts


# ------------------------------------------------------------------------------------------ memory


def tightest_site(found: Answered) -> int:
    """The site that is nearest to, or furthest beyond, its accelerators' memory."""
    sites = found.question.cluster.sites
    shares = [
        one.bytes / site.accelerator.memory_bytes
        for one, site in zip(found.layouts, sites, strict=True)
    ]
    return int(np.argmax(shares))


def host_parts(found: Answered, index: int, bits: Floats, fragments: Floats) -> dict[str, Floats]:
    """Bytes on a site's hosts (or disks) by part, [P]."""
    question, traffic = found.question, found.traffic
    states = question.counted[index] if question.counted else None
    several = question.cluster.num_sites > 1 and not question.method.every_step
    parts: dict[str, Floats] = {}
    if several and question.outer_on != "accelerator":
        parts = memory.outer_parts(
            held=float(traffic.held[index]),
            synced=float(traffic.shared[index] + traffic.experts[index]),
            bits=bits,
            fragments=fragments,
            outer_vectors=question.method.outer_vectors,
            counted=(states.anchor, states.outer_optimizer) if states else None,
        )
        if question.outer_on == "disk":
            # Buffers are worked on, so they stay in host memory even if the states are on disk.
            parts = {name: size for name, size in parts.items() if "buffer" in name}
    trained = float(traffic.trained[index])
    weights = memory.STATES[question.states][0] * float(traffic.held[index])
    copy = weights + (memory.ADAM[question.adam] + memory.STATES[question.states][2]) * trained
    return parts | {"checkpoint copy": np.full(len(bits), copy)}


def memory_columns(one: Grid, found: Answered) -> dict[str, Any]:
    """Whether every site fits, by how much, because of what."""
    question, size = one.question, len(one.bits)
    sites = question.cluster.sites
    hosts = np.zeros((size, len(sites)))
    seen: dict[tuple[float, ...], Floats] = {}
    for index in range(len(sites)):
        amounts = (
            found.traffic.held[index],
            found.traffic.shared[index],
            found.traffic.experts[index],
        )
        key = tuple(map(float, (*amounts, found.traffic.trained[index])))
        if key not in seen or question.counted:
            parts = host_parts(found, index, one.bits, one.fragments)
            seen[key] = sum(parts.values(), np.zeros(size))
        hosts[:, index] = seen[key]
    room = np.array([site.host_bytes for site in sites])
    lacking = (hosts - room).max(axis=1)
    tightest = tightest_site(found)
    used, limit = found.layouts[tightest].bytes, sites[tightest].accelerator.memory_bytes
    over = _over_capacity(found)
    inside = np.array([one.bytes for one in found.layouts]) * question.cluster.counts
    if over or used > limit:
        words: Any = over or _verdict(sites[tightest].name, found.layouts[tightest], limit)
        fits = np.zeros(size, bool)
    else:
        left = (
            f"{sites[tightest].name} fits with {(limit - used) / 1e9:.1f} GB per accelerator left"
        )
        worst = (hosts - room).argmax(axis=1)
        words = np.array(
            [
                left
                if short <= 0
                else f"{sites[k].name} does not fit: its hosts lack {short / 1e9:.1f} GB of "
                f"{room[k] / 1e9:.0f}, for anchor, outer state, sync buffers and a checkpoint"
                for short, k in zip(lacking.tolist(), worst.tolist(), strict=True)
            ],
            dtype=object,
        )
        fits = lacking <= 0
    return {
        "memory_bytes_per_site": whole_bytes(inside.mean() + hosts.mean(axis=1)),
        "memory_bytes_per_accelerator": ceil(used),
        "host_bytes_per_site": whole_bytes(hosts.max(axis=1)),
        "fits": fits,
        "memory_verdict": words,
    }


def _verdict(site: str, tightest: Layout, limit: float) -> str:
    name, size = max(tightest.parts.items(), key=lambda item: item[1])
    return (
        f"{site} does not fit: each accelerator lacks {(tightest.bytes - limit) / 1e9:.1f} GB of "
        f"{limit / 1e9:.0f}, most of it {name} ({size / 1e9:.1f} GB)"
    )


def _over_capacity(found: Answered) -> str:
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
