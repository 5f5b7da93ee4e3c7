"""Methods by name: baselines are settings of the same system, not code of their own (no torch)."""

from __future__ import annotations

from typing import Any, get_args

from fomoe.adapters.options import Aggregate
from fomoe.config import Config


def method_settings(config: Config) -> dict[str, Any]:
    """What a method's name sets: baselines are settings of the same system.

    The settings are absolute, so applying them to a resolved config changes nothing.
    """
    everywhere = {"placement": {"kind": "cyclic", "replication_factor": config.num_sites}}
    plain_mean = {
        "outer.optimizer": "SGD",
        "outer.lr": 1.0,
        "outer.momentum": 0.0,
        "outer.nesterov": False,
        "outer.options": {},
    }
    alone = {
        "num_sites": 1,
        "placement": {"kind": "cyclic", "replication_factor": 1},
        "sync.single_holder": "local",
        "inner.batch_size_by_site": None,
        # One site alone keeps the text that it would have had among the others, and is evaluated
        # on the held-out part of all of it.
        "data.num_shards": config.data.num_shards or config.num_sites,
    }
    ranks, num_clients = config.adapters.ranks or (1,), len(config.adapters.ranks)
    # The base is a model of its own, without experts that sites could hold.
    no_experts = {**everywhere, "model.ffn": "dense"}
    baseline = {**no_experts, **plain_mean, "adapters.nesting": "none"}
    settings: dict[str, dict[str, Any]] = {
        "fomoe": {},
        "diloco": everywhere,
        "photon": {**everywhere, **plain_mean},
        "ddp": {**everywhere, "sync.average": "gradients", "sync.codec": "fp32"},
        "spes": {"placement.store": "all", "router.route_scope": "all", **plain_mean},
        "resident-routing": {"router.route_scope": "resident"},
        "dense": {**everywhere, "model.ffn": "dense"},
        "diloco-half": {**everywhere, "model.expert_ffn_scale": 0.5},
        "single": alone,
        "copies": {"placement.kind": "copies"},
        "prelort": no_experts,
        "fedit-min": {
            **baseline,
            "adapters.aggregate": "segments",
            "adapters.ranks": [min(ranks)] * num_clients,
        },
        "fedit-max": {
            **baseline,
            "adapters.aggregate": "segments",
            "adapters.ranks": [max(ranks)] * num_clients,
        },
        **{name: {**baseline, "adapters.aggregate": name} for name in get_args(Aggregate)},
    }
    return settings[config.method]
