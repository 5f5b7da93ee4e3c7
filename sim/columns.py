"""The columns of an answer: bytes, memory, time, failures, money; arrays over a grid's points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe_sim.overlap import check_conservation
from fomoe_sim.question import OWN_RECOMPUTE, Question
from fomoe_sim.risk import HOUR, Risk, risk
from fomoe_sim.sites import (
    Answered,
    Grid,
    grid,
    host_parts,
    memory_columns,
    peak_flops,
    tightest_site,
    whole_bytes,
)
from fomoe_sim.traffic import Floats, Traffic
from fomoe_sim.trainer import can_train, read_data
from fomoe_sim.units import central
from fomoe_sim.work import token_work

Row = dict[str, Any]
REFERENCE_BITS = 32  # DDP and DiLoCo in the ratios send fp32, as the trainer does


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """What one exchange asks of the slowest link, [P].

    Attributes:
        transfer_s: time of the bytes alone at the effective rate.
        bits, rate_bps: that the link carries, and its effective rate.
        latency_s: messages in sequence and the fixed cost.
        where: the slowest link, in words.
    """

    transfer_s: Floats
    bits: Floats
    rate_bps: Floats
    latency_s: float
    where: list[str]


def columns_of(one: Grid, found: Answered, load: Load, times: Floats) -> dict[str, Any]:
    """All columns of one grid."""
    question, steps = one.question, one.local_steps
    counts = question.cluster.counts
    slowest = found.step_s.max(axis=1)  # [3]
    mean_step = float((found.step_s[1] * counts).sum() / counts.sum())
    round_s = times[1]
    every = question.method.every_step
    exchanges = steps if every else np.ones_like(steps)
    _check(exchanges * load.bits, load, round_s, steps, float(slowest[1]))
    utilisation = np.minimum(1.0, steps * mean_step / round_s)
    parts = np.minimum(one.fragments, steps)
    states = sum(
        (
            found.layouts[0].parts.get(n, 0.0)
            for n in ("parameters", "inner optimizer", "master weights")
        ),
        0.0,
    )
    # Sites that exchange in every step can save after any; the others after a round.
    safe_s = round_s / steps if every else round_s
    failing = risk(question, safe_s=safe_s, bandwidth=one.bandwidth, state_bytes=states)
    exposed = np.maximum(0.0, round_s - steps * slowest[1])
    own = question.cluster.bandwidth_bps
    columns: dict[str, Any] = {
        **_fixed(one, found),
        "local_steps": steps.astype(np.int64),
        "bits": one.bits,
        "fragments": one.fragments.astype(np.int64),
        "overlap_steps": one.overlap_steps.astype(np.int64),
        "bandwidth_bps": np.where(np.isnan(one.bandwidth), own, one.bandwidth),
        **_bytes(one, found, exchanges),
        **memory_columns(one, found),
        "step_time_s": float(slowest[1]),
        "sync_time_s": load.transfer_s / (1.0 if every else parts) + load.latency_s,
        "exposed_s_per_round": exposed,
        "round_time_s": round_s,
        "utilisation": utilisation,
        "tokens_per_s": question.batch_tokens * steps / round_s,
        "slowest_link": np.array(load.where, dtype=object),
    }
    columns |= _money(one, found, times, exchanges, utilisation, failing)
    columns["binds"] = _binds(found, exposed / round_s, utilisation, failing.goodput)
    return columns


def _check(bits: Floats, load: Load, round_s: Floats, steps: Floats, step_s: float) -> None:
    """Refuse a round in which the slowest link would carry more than it can."""
    over = bits / round_s - load.rate_bps * (1 + 1e-9)
    worst = int(over.argmax())
    if over[worst] > 0:
        check_conservation(
            bits=float(bits[worst]),
            bandwidth_bps=float(load.rate_bps[worst]),
            utilisation=float(steps[worst] * step_s / round_s[worst]),
            local_steps=float(steps[worst]),
            step_time_s=step_s,
        )


def _fixed(one: Grid, found: Answered) -> Row:
    question, traffic = one.question, found.traffic
    shape = question.shape
    whole = 1.0 if question.method.crosses == "tokens" else float(question.cluster.num_sites)
    placed = question.method.placed and shape.num_experts > 0
    replication = question.replication if placed else whole
    tightest = tightest_site(found)
    return {
        "model": shape.name,
        "method": question.label,
        "num_sites": question.cluster.num_sites,
        "accelerators": int(question.cluster.counts.sum()),
        "replication_factor": int(replication) if replication == int(replication) else replication,
        "residents": _residents(traffic),
        "recompute": str(found.layouts[tightest].degrees["recompute"]),
        "layout": found.layouts[tightest].words,
        "micro_batch": int(found.layouts[tightest].degrees["micro"]),
        "params_total": shape.total,
        "params_active": shape.active,
        "params_per_site": _mean(traffic.held),
        "executed_fraction": float(traffic.executed.mean()),
        "needs": np.array(_needs(one, found), dtype=object),
    }


def _residents(traffic: Traffic) -> str:
    """Experts per layer of every site, or one number where all hold as many."""
    most = traffic.residents.max(axis=0, initial=0).tolist()
    return str(most[0]) if len(set(most)) == 1 else ",".join(map(str, most))


def _needs(one: Grid, found: Answered) -> list[str]:
    """What `fomoe train` lacks for each point of a grid, or that it runs today."""
    question = one.question
    kinds = {str(layout.degrees["recompute"]) for layout in found.layouts}
    always = {
        "unequal_batches": len(set(found.tokens.tolist())) > 1,
        "accelerators": any(site.count > 1 for site in question.cluster.sites),
        "adam": question.adam != "fp32",
        "mixed": question.states != "fp32",
    }
    rest = can_train(*(name for name, used in always.items() if used))
    rest += [f"recomputation ({name})" for name in sorted(kinds - set(OWN_RECOMPUTE.values()))]
    rest += [] if question.method.trained_as else [f"method {question.method.name}"]
    used = np.stack([one.bits != 32, one.fragments > 1, one.overlap_steps > 0], axis=1)
    words: dict[tuple[bool, ...], str] = {}
    for row in map(tuple, np.unique(used, axis=0).tolist()):
        names = [n for n, here in zip(("bits", "fragments", "overlap"), row, strict=True) if here]
        gaps = [*question.shape.unsupported, *can_train(*names), *rest]
        words[row] = "; ".join(gaps) or "runs today"
    return [words[row] for row in map(tuple, used.tolist())]


def _mean(values: Any) -> int | float:
    """A mean over sites; whole means stay integers."""
    mean = float(values.mean())
    return int(mean) if mean.is_integer() else mean


def payload_bytes(found: Answered, bits: Floats) -> Floats:
    """Bytes reduced in one exchange per site, [P, K]."""
    traffic = found.traffic
    reduced = (traffic.shared + traffic.experts)[None, :] * bits[:, None] / 8
    return reduced + traffic.token_bytes * found.tokens


def _bytes(one: Grid, found: Answered, exchanges: Floats) -> dict[str, Any]:
    question, traffic = one.question, found.traffic
    width, tokens = one.bits / 8, float((traffic.token_bytes * found.tokens).mean())
    payload = exchanges * payload_bytes(found, one.bits).mean(axis=1)
    sent = exchanges * (width * float(traffic.sent.mean()) + tokens)
    received = exchanges * (width * float(traffic.received.mean()) + tokens)
    numel = question.shape.total * REFERENCE_BITS / 8
    several = question.cluster.num_sites > 1 and bool((payload > 0).all())
    none = np.full(len(one.bits), None, dtype=object)
    return {
        "payload_bytes_per_site_per_round": whole_bytes(payload),
        "wire_bytes_per_site_per_round": whole_bytes(sent),
        "received_bytes_per_site_per_round": whole_bytes(received),
        "ratio_vs_ddp": one.local_steps * numel / payload if several else none,
        "ratio_vs_diloco": numel / payload if several else none,
    }


# ------------------------------------------------------------------------------------------- money


def _money(
    one: Grid, found: Answered, times: Floats, exchanges: Floats, utilisation: Floats, failing: Risk
) -> dict[str, Any]:
    """Days, failures, USD and energy of the whole run; low and high take each range's ends."""
    question, sites = one.question, one.question.cluster.sites
    count = question.tokens / (question.batch_tokens * one.local_steps)  # rounds
    ideal = count * times[1] / HOUR
    hours = ideal / failing.goodput
    # A faster site (a high share of its peak) is the cheap end.
    ends = [count * times[end] / HOUR / failing.goodput for end in (2, 0)]
    fleet = [sum(site.count * site.price_per_hour[end] for site in sites) for end in (0, 1)]
    usual = sum(site.count * central(site.price_per_hour) for site in sites)
    egress = [count * exchanges * _egress(found, one.bits, end) for end in (0, 1)]
    compute = usual * hours
    typical = compute + (egress[0] + egress[1]) / 2
    power = question.pue * sum(site.count * site.accelerator.watts for site in sites)
    energy = power * hours / 1e6
    overhead = token_overhead(question) * question.token_overhead
    full = token_work(question.shape, question.seq_len).full
    share = float((found.work * found.tokens).sum() / found.tokens.sum()) / full
    failures = failing.failures_per_hour * hours
    return {
        "tokens": question.tokens,
        "rounds": count,
        "days_without_failures": ideal / 24,
        "goodput": failing.goodput,
        "days": hours / 24,
        "days_low": ends[0] / 24,
        "days_high": ends[1] / 24,
        "executed_flops": share,
        "days_at_equal_work": hours / 24 / share,
        "token_overhead": overhead,
        "days_at_equal_loss": hours / 24 * overhead,
        "cost_usd": typical,
        "cost_usd_low": fleet[0] * ends[0] + egress[0],
        "cost_usd_high": fleet[1] * ends[1] + egress[1],
        "egress_usd_high": egress[1],
        "idle_usd": np.maximum(0.0, compute * (1 - utilisation * failing.goodput)),
        "usd_per_1e6_tokens": typical / (question.tokens / 1e6),
        "energy_mwh": energy,
        "carbon_t": question.carbon * energy,
        "site_mtbf_hours": failing.mtbf_hours,
        "repair_hours": failing.repair_hours,
        "failures_per_run": failures,
        "lost_hours_per_failure": failing.lost_hours,
        "rejoin_bytes": int(failing.rejoin_bytes),
        "rejoin_time_s": failing.rejoin_s,
        "coverage_loss_probability": -np.expm1(-hours * failing.coverage_per_hour),
        "mfu": _mfu(found),
    }


def _egress(found: Answered, bits: Floats, end: int) -> Floats:
    """USD of one exchange's bytes over all sites."""
    sites = found.question.cluster.sites
    prices = np.array([site.egress_per_gb[end] for site in sites]) / 1e9
    if len(sites) == 1:
        return np.zeros(len(bits))
    elements = float((prices * found.traffic.sent).sum())
    return bits / 8 * elements + float((prices * found.traffic.token_bytes * found.tokens).sum())


def _mfu(found: Answered) -> float:
    """Executed model FLOPs over peak while the sites compute."""
    step_s = float(found.step_s[1].max())
    return float((found.work * found.tokens).sum() / step_s / peak_flops(found.question).sum())


def token_overhead(question: Question) -> float:
    """Factor on tokens for data-parallel's loss with K replicas that sync once a round."""
    if question.method.every_step or question.cluster.num_sites < 2:
        return 1.0
    law = read_data("published")["diloco_law"]
    size, replicas = max(law["smallest"], question.shape.active), question.cluster.num_sites
    loss = law["a"] * size ** law["alpha"] * replicas ** law["beta"]
    ratio = loss / (law["dp_a"] * size ** law["dp_alpha"])
    return float(max(1.0, ratio ** (1 / law["tokens_exponent"])))


def _binds(found: Answered, waiting: Floats, utilisation: Floats, goodput: Floats) -> Any:
    """What takes most of the run: compute, traffic inside the sites, the link, others, failures."""
    seconds = found.layouts[_slowest(found)].seconds
    inside = [seconds.get(n, 0.0) for n in ("tensor parallel", "experts' tokens")]
    names = ("products", "attention scores", "experts", "values between products")
    compute = sum(seconds[name] for name in names)
    hidden = max(0.0, seconds["shards"] - compute)
    busy = compute + sum(inside) + hidden + seconds["optimizer"]
    site_share = (sum(inside) + hidden) / busy if busy else 0.0
    given = found.question.mfu or found.question.step_time_s
    shares = np.stack(
        [
            goodput * utilisation * (1.0 if given else 1 - site_share),
            goodput * utilisation * (0.0 if given else site_share),
            goodput * waiting,
            goodput * np.maximum(0.0, 1 - utilisation - waiting),
            1 - goodput,
        ]
    )
    words = ("compute", "site traffic", "link", "slower sites", "failures")
    return np.array([words[index] for index in shares.argmax(axis=0)], dtype=object)


def _slowest(found: Answered) -> int:
    return int(found.step_s[1].argmax())


def details(found: Answered) -> Row:
    """What a row's means are means of, site by site, and where memory and time go."""
    question, traffic = found.question, found.traffic
    one = grid(question)
    exchanges = question.local_steps if question.method.every_step else 1
    width, tokens = question.bits / 8, traffic.token_bytes * found.tokens
    moved = {
        "payload": (traffic.shared + traffic.experts) * width + tokens,
        "wire": traffic.sent * width + tokens,
        "received": traffic.received * width + tokens,
    }
    tightest = tightest_site(found)
    inside = found.layouts[tightest].parts
    hosts = host_parts(found, tightest, one.bits, one.fragments)
    sites = question.cluster.sites
    return {
        **{
            f"{name}_bytes_per_site_per_round_by_site": whole_bytes(exchanges * amount).tolist()
            for name, amount in moved.items()
        },
        "params_per_site_by_site": traffic.held.tolist(),
        "tokens_per_step_by_site": found.tokens.tolist(),
        "step_time_s_by_site": found.step_s[1].tolist(),
        "layout_by_site": [layout_.words for layout_ in found.layouts],
        "memory_parts": {
            name: {"where": "accelerator", "bytes": round(size)} for name, size in inside.items()
        }
        | {
            name: {"where": "host", "bytes": round(float(v[0]))}
            for name, v in hosts.items()
            if v[0]
        },
        "step_parts": {
            name: value
            for name, value in found.layouts[_slowest(found)].seconds.items()
            if value and question.mfu is None and question.step_time_s is None
        },
        "prices": [list(site.price_per_hour) for site in sites],
    }
