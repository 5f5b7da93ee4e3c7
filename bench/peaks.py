"""Rows (h): peaks of whole training processes, torch's products beside oneDNN's.

What a process holds depends on its allocator and kernels, and grows until every kernel has been
built; so it is measured at the end of short trainings, each in a fresh process, in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

import fomoe.training
from bench.layers import Row
from bench.machine import Machine
from fomoe.hostmemory import resident_peak_bytes
from fomoe.load import build_config
from fomoe.model.matmul import has_onednn

# One site that holds all experts; rows of an expert differ at every step.
SHAPES: dict[str, dict[str, Any]] = {
    "5 layers, d128 f128 E16 top-2, 8 x 256 tokens": {
        "num_layers": 5,
        "d_model": 128,
        "expert_ffn_dim": 128,
        "num_experts": 16,
        "top_k": 2,
    },
    "2 layers, d192 f320 E64 top-4, 8 x 256 tokens": {
        "num_layers": 2,
        "d_model": 192,
        "expert_ffn_dim": 320,
        "num_experts": 64,
        "top_k": 4,
    },
}
ROUNDS, STEPS = 5, 8  # a peak grows for about 30 steps
TURNS = 3


def peak_rows(machine: Machine) -> list[Row]:
    """One row per shape and products; on CPU only, where the host's memory is what counts."""
    if machine.device.type != "cpu":
        return []
    rows = []
    kinds = ("torch", "onednn") if has_onednn() else ("torch",)
    for name, model in SHAPES.items():
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(TURNS):
            for kind in kinds:
                found[kind].append(train_apart(options(model, kind), machine.clock))
        for kind, own in found.items():
            turns = list(zip(own, found["torch"], strict=True))
            rows.append(
                {
                    "what": name,
                    "products": kind,
                    "peak_mb": median(turn["peak_bytes"] for turn in own) / 1e6,
                    "over_torch": median(a["peak_bytes"] / b["peak_bytes"] for a, b in turns),
                    "step_ms": median(turn["step_s"] for turn in own) * 1e3,
                    "step_over_torch": median(a["step_s"] / b["step_s"] for a, b in turns),
                }
            )
    return rows


def options(model: Mapping[str, Any], products: str) -> dict[str, Any]:
    """The experiment of a shape; bytes of Python's own source text, so that routing is a text's."""
    return {
        "num_sites": 1,
        "local_steps": STEPS,
        "rounds": ROUNDS,
        "placement": {"replication_factor": 1},
        "model": {"num_heads": 4, "matmul": products, **model},
        "inner": {"batch_size": 8},
        "data": {
            "source": "python-stdlib",
            "tokenizer": "byte",
            "seq_len": 256,
            "held_out_sequences": 2,
        },
        "run": {"eval_every": 0, "checkpoint_every": 0},
    }


def train_apart(experiment: dict[str, Any], clock: str) -> dict[str, float]:
    """`train_here` in a process of its own, with as many threads as this one."""
    threads = torch.get_num_threads()
    command = [sys.executable, "-m", "bench.peaks", json.dumps(experiment), clock, str(threads)]
    child = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    return json.loads(child.stdout)


def train_here(experiment: dict[str, Any], clock: str) -> dict[str, float]:
    """Train; returns the process's peak above what it held before, and the seconds of a step."""
    if clock == "cpu":  # the trainer's records then hold this process's CPU time
        fomoe.training.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    before = resident_peak_bytes()
    with TemporaryDirectory() as folder:
        run = {**experiment["run"], "dir": f"{folder}/run"}
        config = build_config({**experiment, "run": run})
        fomoe.training.train(config, device="cpu", show=False)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [record for record in map(json.loads, lines) if record["kind"] == "round"]
    return {
        "peak_bytes": resident_peak_bytes() - before,
        # The first round builds kernels.
        "step_s": median(r["train_s"] for r in rounds[1:]) / config.local_steps,
    }


def main(arguments: list[str]) -> None:
    experiment, clock, threads = arguments
    torch.set_num_threads(int(threads))
    print(json.dumps(train_here(json.loads(experiment), clock)))


if __name__ == "__main__":
    main(sys.argv[1:])
