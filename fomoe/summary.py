"""The record of a round and the summary of a run.

docs/metrics.md lists every field.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fomoe import __version__
from fomoe.counting import RoundRouting
from fomoe.data.dataset import Data
from fomoe.evaluate import MergedEvaluation, routing_health
from fomoe.files import write_text_atomically
from fomoe.hostmemory import resident_peak_bytes
from fomoe.planning import RunPlan, planned_summary, spread
from fomoe.records import site_speed
from fomoe.sync.exchange import gather
from fomoe.sync.links import Links, links_record
from fomoe.sync.sync import Timed
from fomoe.sync.transport import Transport

Counts = dict[str, dict[str, int]]


@dataclass
class Totals:
    """Sums over one site's rounds; part of its checkpoint."""

    tokens: int = 0
    train_s: float = 0.0
    sync_s: float = 0.0
    selected: int = 0
    executed: int = 0
    skipped: int = 0
    unserved: int = 0

    def add(self, routing: RoundRouting, train_s: float, sync_s: float) -> None:
        self.tokens += routing.tokens
        self.train_s += train_s
        self.sync_s += sync_s
        self.selected += int(routing.selected_LE.sum())
        self.executed += int(routing.executed_LE.sum())
        self.skipped += int(routing.skipped_L.sum())
        self.unserved += int(routing.unserved_L.sum())

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def round_record(
    plan: RunPlan,
    site: int,
    round_idx: int,
    *,
    routing: RoundRouting,
    counts_before: Counts,
    counts_after: Counts,
    train_s: float,
    sync_s: float,
    timed: list[Timed],
    remote: bool,
    val_loss_local: float | None,
    probe_agreement: float | None,
    replica_hashes: dict[int, str],
) -> dict[str, Any]:
    """One site's record of a round."""
    payload = _difference(counts_before["payload"], counts_after["payload"])
    wire = _difference(counts_before["wire"], counts_after["wire"])
    selected = int(routing.selected_LE.sum())
    health = routing_health(routing.selected_LE, routing.skipped_L, routing.entropy_L)
    buckets = (*plan.segment_plan.buckets, *plan.families)
    held = {bucket.index for bucket in buckets if site in bucket.holders}
    return {
        "kind": "round",
        "round": round_idx,
        "site": site,
        "local_steps": plan.config.local_steps,
        "tokens": routing.tokens,
        "train_s": train_s,
        "sync_s": sync_s,
        "utilisation": _share(train_s, sync_s),
        "exchange_s": sum(one.seconds for one in timed),
        "wire_bytes_by_sync": [one.wire.get(site, 0) for one in timed],
        "mean_bytes_per_s": _model_bytes(wire) / max(train_s + sync_s, 1e-9),
        "peak_bytes_per_s": _peak(timed, site) if remote else None,
        "payload_bytes": _model_bytes(payload),
        "wire_bytes": _model_bytes(wire),
        "payload_bytes_by_class": payload,
        "wire_bytes_by_class": wire,
        "skipped_fraction": int(routing.skipped_L.sum()) / max(selected, 1),
        "executed_fraction": _executed(int(routing.executed_LE.sum()), selected),
        "unserved_fraction": int(routing.unserved_L.sum())
        / max(routing.tokens * len(routing.unserved_L), 1),
        "val_loss_local": val_loss_local,
        "probe_agreement": probe_agreement,
        "replica_hashes": {str(i): h[:16] for i, h in replica_hashes.items() if i in held},
        "layers": [
            {"layer": layer, **row}
            for layer, row in zip(plan.config.model.moe_layers, health, strict=True)
        ],
    }


def merged_record(merged: MergedEvaluation, round_idx: int) -> dict[str, Any]:
    """The record of an evaluation of the merged model."""
    return {
        "kind": "merged",
        "round": round_idx,
        "val_loss_merged": merged.loss,
        "load": merged.load_LE,
        **merged.more,
    }


def summarize(
    plan: RunPlan,
    transport: Transport,
    totals: dict[int, Totals],
    counts: dict[int, Counts],
    data: Data,
    local_losses: dict[int, float],
    merged: MergedEvaluation,
    run_dir: Path,
    links: Links | None = None,
) -> dict[str, Any]:
    """The summary over all sites; the first site writes `summary.json`.

    Args:
        counts: bytes of each site of this process, of all its ranks together.
        links: what was measured of them at the start, if anything was.
    """
    inside = transport.inside
    of_ranks = [json.loads(own) for own in inside.gather(json.dumps(process_peaks()).encode())]
    peaks = {name: max(own[name] for own in of_ranks) for name in of_ranks[0]}

    def message(site: int) -> bytes:
        own = {
            "totals": totals[site].state(),
            "counts": counts[site],
            "val_loss_local": local_losses.get(site),
            "peaks": peaks,
        }
        return json.dumps(own).encode()

    rows = [json.loads(row) for row in gather(transport, message)]
    config = plan.config
    summary = planned_summary(plan)
    for name in ("payload", "wire"):
        counted = [_model_bytes(row["counts"][name]) / config.rounds for row in rows]
        by_site = [int(x) if x.is_integer() else x for x in counted]
        summary |= spread(f"{name}_bytes_per_site_per_round", by_site)
        for kind in ("control", "evaluation"):
            values = [row["counts"][name].get(kind, 0) for row in rows]
            summary |= spread(f"{kind}_{name}_bytes_per_site", values)
    summary |= _measured(plan, rows, proxy=len(transport.sites) == len(rows) > 1)
    summary |= {
        "val_loss_merged": merged.loss,
        **merged.more,
        "val_loss_local": [row["val_loss_local"] for row in rows],
        "unigram_entropy": data.unigram_entropy,
        "text_sha256": _text_hash(data),
        **({} if links is None else {"links": links_record(plan, links)}),
        "run_dir": str(run_dir),
        "environment": environment(),
    }
    if transport.members[0] in transport.sites and inside.rank == 0:
        write_text_atomically(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _measured(plan: RunPlan, rows: list[dict[str, Any]], *, proxy: bool) -> dict[str, Any]:
    totals = [row["totals"] for row in rows]
    executed = [_executed(t["executed"], t["selected"]) for t in totals]
    layers = max(len(plan.config.model.moe_layers), 1)
    summary = {
        "tokens": sum(t["tokens"] for t in totals),
        "tokens_by_site": [t["tokens"] for t in totals],
        **spread("skipped_fraction", [t["skipped"] / max(t["selected"], 1) for t in totals]),
        **spread("executed_fraction", executed),
        **spread(
            "unserved_fraction", [t["unserved"] / max(t["tokens"] * layers, 1) for t in totals]
        ),
        **spread(
            "expert_flops_fraction", [x * plan.config.model.expert_ffn_scale for x in executed]
        ),
        **spread(
            "tokens_per_s", [site_speed(t["tokens"], t["train_s"], t["sync_s"]) for t in totals]
        ),
        **spread("train_s", [t["train_s"] for t in totals]),
        **spread("sync_s", [t["sync_s"] for t in totals]),
        **spread("utilisation", [_share(t["train_s"], t["sync_s"]) for t in totals]),
    }
    for name in rows[0]["peaks"]:
        by_site = [row["peaks"][name] for row in rows]
        # A proxy run has one process, whose peak covers all sites.
        summary |= {name: by_site[0]} if proxy else spread(name, by_site)
    return summary


def _text_hash(data: Data) -> str:
    """Of the training text's split and the held-out part: equal hashes, equal text."""
    parts = (data.fingerprints[name] for name in ("data split", "held-out part"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, for the reader of a record."""
    return {
        "fomoe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def process_peaks() -> dict[str, int]:
    """Largest memory of this process so far, on the host and on its accelerator, in bytes."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "peak_memory_bytes": resident_peak_bytes(),
        "peak_accelerator_memory_bytes": used,
    }


def _share(train_s: float, sync_s: float) -> float:
    """Share of local steps in the time of local steps and of waiting for syncs."""
    both = train_s + sync_s
    return train_s / both if both else 1.0


def _peak(timed: list[Timed], site: int) -> float:
    """Bytes per second of the reduction that used a site's link most, in its own time."""
    return max((one.wire.get(site, 0) / max(one.seconds, 1e-9) for one in timed), default=0.0)


def _executed(executed: int, selected: int) -> float:
    return executed / selected if selected else 1.0  # a dense model skips nothing


def _model_bytes(by_class: dict[str, int]) -> int:
    return by_class.get("shared", 0) + by_class.get("expert", 0)


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {kind: count - before.get(kind, 0) for kind, count in after.items()}
