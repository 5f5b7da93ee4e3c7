"""What one question's sites do in a step: traffic, tokens, layouts and times, whatever H is."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        question=question,
        traffic=traffic,
        tokens=tokens,
        step_s=step_s,
        layouts=layouts,
        work=work,
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
