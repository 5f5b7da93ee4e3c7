"""Accelerators only: the 54M proxy with 4 sites on one device, waiting sites parked or not.

What parking costs is the difference of the rounds' times; what it saves, of the peaks.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from bench.layers import Row
from bench.machine import Machine
from fomoe.config import Config
from fomoe.load import load_config
from fomoe.training import train

CONFIG = Path(__file__).parent.parent / "configs" / "proxy_54m.yaml"
# Bytes instead of a tokenizer that is trained first; the shapes stay those of the config.
OVERRIDES = ("rounds=4", "data.tokenizer=byte", "run.eval_every=0", "run.checkpoint_every=0")


def proxy_rows(machine: Machine) -> list[Row]:
    """One row unparked and one parked; none without an accelerator, which has nothing to park."""
    if machine.device.type != "cuda":
        return []
    rows = [
        proxy_row(machine, load_config(CONFIG, (*OVERRIDES, f"run.park={park}")))
        for park in ("never", "always")
    ]
    for row in rows:
        row["over_unparked"] = row["round_s"] / rows[0]["round_s"]
    return rows


def proxy_row(machine: Machine, config: Config) -> Row:
    """Run a config and read its rounds; the first one, which builds kernels, does not count."""
    cuda = machine.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"dir": folder + "/run"})
        train(config.model_copy(update={"run": run}), device=machine.device.type, show=False)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [r for r in map(json.loads, lines) if r["kind"] == "round" and r["round"] > 0]
    by_round: dict[int, float] = {}
    for record in rounds:  # the sites take turns on one device
        by_round[record["round"]] = by_round.get(record["round"], 0.0) + record["train_s"]
    return {
        "what": f"proxy_54m, {config.num_sites} sites, run.park={config.run.park}",
        "round_s": median(by_round.values()),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "over_unparked": 1.0,
    }
