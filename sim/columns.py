"""The columns of an answer: bytes, memory, time, failures, money; arrays over a grid's points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fomoe_sim.question import OWN_RECOMPUTE, Question
from fomoe_sim.risk import HOUR, Risk, risk
from fomoe_sim.shape import token_work
from fomoe_sim.sites import (
    Answered,
    Grid,
    grid,
    host_parts,
    memory_columns,
    peak_flops,
    whole_bytes,
)
from fomoe_sim.traffic import Floats
from fomoe_sim.trainer import can_train, codec_of, read_data
from fomoe_sim.units import central

REFERENCE_BYTES = 4  # DDP and DiLoCo in the ratios send fp32, as the trainer does
STATES = ("parameters", "inner optimizer", "master weights")  # that a checkpoint copies


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
    """All columns of one grid; `times` are rounds at both ends and the middle, [3, P]."""
    question, steps = one.question, one.local_steps
    counts, own = question.cluster.counts, question.cluster.bandwidth_bps
    step_s = float(found.step_s[1].max())
    mean_step = float((found.step_s[1] * counts).sum() / counts.sum())
    round_s = times[1]
    every = question.method.every_step
    exchanges = steps if every else np.ones_like(steps)
    carried = exchanges * load.bits / round_s
    assert (carried <= load.rate_bps * (1 + 1e-9)).all(), "a link carries more than it can"
    utilisation = np.minimum(1.0, steps * mean_step / round_s)
    exposed = np.maximum(0.0, round_s - steps * step_s)
    parts = 1.0 if every else np.minimum(one.fragments, steps)
    states = sum(found.layouts[0].parts.get(name, 0.0) for name in STATES)
    # Sites that exchange in every step can save after any; the others after a round.
    safe_s = round_s / steps if every else round_s
    failing = risk(question, safe_s=safe_s, bandwidth=one.bandwidth, state_bytes=states)
    return {
        **_fixed(one, found),
        "local_steps": steps.astype(np.int64),
        "bits": one.bits,
        "fragments": one.fragments.astype(np.int64),
        "overlap_steps": one.overlap_steps.astype(np.int64),
        "bandwidth_bps": np.where(np.isnan(one.bandwidth), own, one.bandwidth),
        **_bytes(one, found, exchanges),
        **memory_columns(one, found),
        "step_time_s": step_s,
        "sync_time_s": load.transfer_s / parts + load.latency_s,
        "exposed_s_per_round": exposed,
        "round_time_s": round_s,
        "utilisation": utilisation,
        "tokens_per_s": question.batch_tokens * steps / round_s,
        "slowest_link": np.array(load.where, dtype=object),
        **_money(one, found, times, exchanges, utilisation, failing),
        "binds": _binds(found, exposed / round_s, utilisation, failing.goodput),
    }


def _fixed(one: Grid, found: Answered) -> dict[str, Any]:
    question, traffic, shape = one.question, found.traffic, one.question.shape
    replication = question.replication
    if not (question.method.placed and shape.num_experts):
        replication = 1.0 if question.method.crosses == "tokens" else question.cluster.num_sites
    tightest = found.layouts[found.tightest]
    return {
        "model": shape.name,
        "method": question.label,
        "num_sites": question.cluster.num_sites,
        "accelerators": int(question.cluster.counts.sum()),
        "replication_factor": _whole(replication),
        "residents": _residents(traffic.residents.max(axis=0, initial=0).tolist()),
        "recompute": str(tightest.degrees["recompute"]),
        "layout": tightest.words,
        "micro_batch": int(tightest.degrees["micro"]),
        "params_total": shape.total,
        "params_active": shape.active,
        "params_per_site": _whole(traffic.held.mean()),
        "executed_fraction": float(traffic.executed.mean()),
        "needs": np.array(_needs(one, found), dtype=object),
    }


def _residents(most: list[int]) -> str:
    """Experts per layer of every site, or one number where all hold as many."""
    return str(most[0]) if len(set(most)) == 1 else ",".join(map(str, most))


def _whole(value: Any) -> int | float:
    """A mean over sites; whole means are integers."""
    return int(value) if float(value).is_integer() else float(value)


def _needs(one: Grid, found: Answered) -> list[str]:
    """What `fomoe train` lacks for each point of a grid, or that it runs today."""
    question, inside = one.question, one.question.inside
    kinds = {str(layout.degrees["recompute"]) for layout in found.layouts}
    counts = sorted({site.count for site in question.cluster.sites})
    always = {
        "unequal_batches": len(set(found.tokens.tolist())) > 1,
        "accelerators": counts[-1] > 1,
        "unequal_accelerators": len(counts) > 1,
        "averaged_gradients": counts[-1] > 1
        and question.method.every_step
        and question.cluster.num_sites > 1,
        "uneven_rows": any(
            rows % count
            for count in counts
            for rows in (question.shape.d_model, 2 * question.shape.expert_ffn)
        )
        and bool(question.shape.num_experts),
        "adam": inside.adam != "fp32",
        "mixed": inside.states != "fp32",
        "fp8": inside.precision == "fp8",
    }
    rest = can_train(*(name for name, used in always.items() if used))
    rest += [f"the layout {words}" for words in sorted(_untrained_layouts(found))]
    rest += [f"recomputation ({name})" for name in sorted(kinds - set(OWN_RECOMPUTE.values()))]
    rest += [] if question.method.trained_as else [f"method {question.method.name}"]
    every = question.method.every_step  # gradients cross in fp32
    trained = [32.0] if every else [b for b in np.unique(one.bits).tolist() if codec_of(b)]
    low = ~np.isin(one.bits, trained)
    used = np.stack([low, one.fragments > 1, one.overlap_steps > 0], axis=1)
    words: dict[tuple[bool, ...], str] = {}
    for row in map(tuple, np.unique(used, axis=0).tolist()):
        names = [n for n, here in zip(("bits", "fragments", "overlap"), row, strict=True) if here]
        gaps = [*question.shape.unsupported, *can_train(*names), *rest]
        words[row] = "; ".join(gaps) or "runs today"
    return [words[row] for row in map(tuple, used.tolist())]


def _untrained_layouts(found: Answered) -> set[str]:
    """Layouts other than the trainer's: states sharded over all accelerators of a site."""
    return {
        layout.words
        for layout in found.layouts
        if any(layout.degrees[name] != 1 for name in ("tp", "pp", "cp", "ep"))
        or (
            layout.degrees["dp"] != 1
            and (layout.degrees["zero"], layout.degrees["shard"]) != (3, layout.degrees["dp"])
        )
    }


def _bytes(one: Grid, found: Answered, exchanges: Floats) -> dict[str, Any]:
    question, traffic = one.question, found.traffic
    width, tokens = one.bits[:, None] / 8, traffic.token_bytes * found.tokens
    payload, sent, received = (
        exchanges * (elements * width + tokens).mean(axis=1)
        for elements in (traffic.shared + traffic.experts, traffic.sent, traffic.received)
    )
    numel = question.shape.total * REFERENCE_BYTES
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
    question, ask, sites = one.question, one.question.ask, one.question.cluster.sites
    count = question.tokens / (question.batch_tokens * one.local_steps)  # rounds
    ideal = count * times[1] / HOUR
    hours = ideal / failing.goodput
    # A faster site (a high share of its peak) is the cheap end.
    ends = [count * times[end] / HOUR / failing.goodput for end in (2, 0)]
    fleet = [sum(site.count * site.price_per_hour[end] for site in sites) for end in (0, 1)]
    egress = [count * exchanges * _egress(found, one.bits, end) for end in (0, 1)]
    compute = sum(site.count * central(site.price_per_hour) for site in sites) * hours
    power = ask.pue * sum(site.count * site.accelerator.watts for site in sites)
    energy = power * hours / 1e6
    overhead = token_overhead(question) * ask.token_overhead
    full = token_work(question.shape, question.inside.seq_len).full
    flops = float((found.work * found.tokens).sum())
    share = flops / found.tokens.sum() / full
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
        "cost_usd": compute + (egress[0] + egress[1]) / 2,
        "cost_usd_low": fleet[0] * ends[0] + egress[0],
        "cost_usd_high": fleet[1] * ends[1] + egress[1],
        "egress_usd_high": egress[1],
        "idle_usd": np.maximum(0.0, compute * (1 - utilisation * failing.goodput)),
        "energy_mwh": energy,
        "carbon_t": ask.carbon * energy,
        "failures_per_run": failing.failures_per_hour * hours,
        "lost_hours_per_failure": failing.lost_hours,
        "rejoin_bytes": int(failing.rejoin_bytes),
        "rejoin_time_s": failing.rejoin_s,
        "coverage_loss_probability": -np.expm1(-hours * failing.coverage_per_hour),
        "mfu": flops / float(found.step_s[1].max()) / float(peak_flops(question).sum()),
    }


def _egress(found: Answered, bits: Floats, end: int) -> Floats:
    """USD of one exchange's bytes over all sites."""
    sites, traffic = found.question.cluster.sites, found.traffic
    if len(sites) == 1:
        return np.zeros(len(bits))
    prices = np.array([site.egress_per_gb[end] for site in sites]) / 1e9
    tokens = float((prices * traffic.token_bytes * found.tokens).sum())
    return bits / 8 * float((prices * traffic.sent).sum()) + tokens


def token_overhead(question: Question) -> float:
    """Factor on tokens for data-parallel's loss with K replicas that sync once a round."""
    if question.method.every_step or question.cluster.num_sites < 2:
        return 1.0
    law = read_data("published")["diloco_law"]
    ratio = loss_ratio(law, question.shape.active, question.cluster.num_sites)
    return float(max(1.0, ratio ** (1 / law["tokens_exponent"])))


def loss_ratio(law: dict[str, Any], params: float, replicas: int) -> float:
    """Loss of DiLoCo over that of data-parallel at equal tokens, by its published scaling law."""
    size = max(law["smallest"], params)
    loss = law["a"] * size ** law["alpha"] * replicas ** law["beta"]
    return float(loss / (law["dp_a"] * size ** law["dp_alpha"]))


def _binds(found: Answered, waiting: Floats, utilisation: Floats, goodput: Floats) -> Any:
    """What takes most of the run: compute, traffic inside the sites, the link, others, failures."""
    seconds = found.slowest.seconds
    names = ("products", "attention scores", "experts", "values between products")
    compute = sum(seconds[name] for name in names)
    inside = seconds["tensor parallel"] + seconds["experts' tokens"]
    inside += max(0.0, seconds["shards"] - compute)
    busy = compute + inside + seconds["optimizer"]
    given = found.question.ask.mfu or found.question.step_time_s
    share = inside / busy if busy and not given else 0.0
    working = goodput * utilisation
    shares = {
        "compute": working * (1 - share),
        "site traffic": working * share,
        "link": goodput * waiting,
        "slower sites": goodput * np.maximum(0.0, 1 - utilisation - waiting),
        "failures": 1 - goodput,
    }
    return np.array(list(shares), dtype=object)[np.stack(list(shares.values())).argmax(axis=0)]


# ------------------------------------------------------------------------------------- one answer


def details(found: Answered) -> dict[str, Any]:
    """What a row's means are means of, site by site, and where memory and time go."""
    question, traffic = found.question, found.traffic
    one = grid(question)
    exchanges = question.local_steps if question.method.every_step else 1
    width, tokens = question.bits / 8, traffic.token_bytes * found.tokens
    moved = {"payload": traffic.shared + traffic.experts, "wire": traffic.sent}
    inside = found.layouts[found.tightest].parts
    hosts = host_parts(found, found.tightest, one.bits, one.fragments)
    predicted = question.ask.mfu is None and question.step_time_s is None
    return {
        **{
            f"{name}_bytes_per_site_per_round_by_site": whole_bytes(
                exchanges * (elements * width + tokens)
            ).tolist()
            for name, elements in moved.items()
        },
        "params_per_site_by_site": traffic.held.tolist(),
        "tokens_per_step_by_site": found.tokens.tolist(),
        "step_time_s_by_site": found.step_s[1].tolist(),
        "layout_by_site": [layout_.words for layout_ in found.layouts],
        "memory_parts": {
            name: {"where": where, "bytes": round(float(np.max(size)))}
            for where, parts in (("accelerator", inside), ("host", hosts))
            for name, size in parts.items()
            if np.any(size)
        },
        "step_parts": {n: v for n, v in found.slowest.seconds.items() if v and predicted},
    }
