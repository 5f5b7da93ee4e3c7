"""A plan as a config that `fomoe train` accepts, or the names of what the trainer lacks."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fomoe.config import Config, build_config
from fomoe.errors import ConfigError
from fomoe.options import option_names
from fomoe_sim.question import RECOMPUTE as READ_RECOMPUTE
from fomoe_sim.scenario import Scenario
from fomoe_sim.traffic import cyclic_holdings

RECOMPUTE = {ours: option for option, ours in READ_RECOMPUTE.items()}
TRAINED = ("fomoe", "diloco", "photon", "ddp", "spes")


def missing_features(scenario: Scenario) -> list[str]:
    """What the trainer would need and does not have; empty if it can run the plan."""
    gaps = list(scenario.shape.unsupported)
    known = set(option_names(Config))
    wanted = {
        "low-bit sync (sync.bits)": (scenario.bits != 32, "sync.bits"),
        "fragments (sync.fragments)": (scenario.fragments > 1, "sync.fragments"),
        "overlap (sync.overlap_steps)": (scenario.overlap_steps > 0, "sync.overlap_steps"),
    }
    gaps += [name for name, (used, option) in wanted.items() if used and option not in known]
    if scenario.recompute not in RECOMPUTE:
        gaps.append(f"recomputation ({scenario.recompute})")
    if any(site.count > 1 for site in scenario.cluster.sites):
        gaps.append("several accelerators per site")
    if scenario.method not in TRAINED:
        gaps.append(f"method {scenario.method}")
    return gaps


def config_tree(scenario: Scenario) -> dict[str, Any]:
    """Nested options of the plan, as a YAML experiment has them."""
    shape, cluster = scenario.shape, scenario.cluster
    attention = shape.attention
    sequences = max(1, round(scenario.tokens_per_step / scenario.seq_len))
    micro = min(sequences, scenario.micro_batch)
    accumulate = max(1, round(sequences / micro))
    per_round = cluster.num_sites * scenario.local_steps * micro * accumulate * scenario.seq_len
    tree: dict[str, Any] = {
        "method": scenario.method,
        "num_sites": cluster.num_sites,
        "local_steps": scenario.local_steps,
        "rounds": max(1, ceil(scenario.tokens / per_round)),
        "model": {
            "vocab_size": shape.vocab_size,
            "num_layers": shape.num_layers,
            "d_model": shape.d_model,
            "num_heads": attention.heads,
            "num_kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "qk_norm": attention.qk_norm,
            "tie_embeddings": shape.tied,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "expert_ffn_dim": shape.expert_ffn,
            "shared_expert_ffn_dim": shape.shared_ffn,
            "num_dense_layers": shape.num_dense_layers,
            "recompute": RECOMPUTE[scenario.recompute],
        },
        "inner": {"batch_size": micro, "accumulation_steps": accumulate},
        "data": {"seq_len": scenario.seq_len},
    }
    if shape.num_dense_layers:
        tree["model"]["dense_ffn_dim"] = shape.dense_ffn
    if not shape.num_experts:
        # Without routed experts the trainer's dense FFN has the active width.
        tree["model"] |= {"ffn": "dense", "num_experts": 1, "top_k": 1}
        tree["model"]["expert_ffn_dim"] = shape.dense_ffn
    if scenario.method in ("fomoe", "spes"):
        tree["placement"] = _placement(scenario)
    return tree


def _placement(scenario: Scenario) -> dict[str, Any]:
    counts, replication = scenario.holdings.residents, scenario.replication_factor
    if replication == int(replication):
        even = cyclic_holdings(scenario.shape, scenario.cluster.num_sites, int(replication))
        if np.array_equal(even.residents, counts):
            return {"kind": "cyclic", "replication_factor": int(replication)}
    return {"kind": "cyclic", "capacity": [int(n) for n in counts[0]]}


def write_config(path: str | Path, scenario: Scenario) -> None:
    """Write a plan as a config, checked by the trainer's own loader.

    Raises:
        ConfigError: naming the missing features, or the rule that the config breaks.
    """
    gaps = missing_features(scenario)
    if gaps:
        rule = f"is not written: fomoe train lacks {'; '.join(gaps)}"
        raise ConfigError("--out", str(path), rule)
    tree = config_tree(scenario)
    build_config(tree)
    head = (
        f"# Written by fomoe plan for {scenario.shape.name} on {scenario.cluster.name}.\n"
        "# data.source and data.tokenizer are the defaults: name your own text.\n"
    )
    try:
        text = head + yaml.safe_dump(tree, sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", str(path), f"cannot be written: {error.strerror}") from None
