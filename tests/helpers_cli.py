"""A tiny experiment on text that the test writes, and the command line in process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fomoe.checkpoint import Part
from fomoe.cli import main

# Names that are not there must fail at once, whether or not there is a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The launch environment is the tests' own, wherever they are started.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
    os.environ.pop(_name, None)

# Fields of a record of a round that are measured, not computed.
MEASURED = {
    "train_s",
    "sync_s",
    "utilisation",
    "exchange_s",
    "mean_bytes_per_s",
    "peak_bytes_per_s",
}

WORDS = ("site", "round", "expert", "token", "router", "anchor", "mean", "loss", "holder", "step")


def words(count: int, seed: int) -> str:
    """Lines of plain words; equal seeds give equal text."""
    draw = random.Random(seed)
    lines = []
    for start in range(0, count, 8):
        lines.append(" ".join(draw.choice(WORDS) for _ in range(min(8, count - start))))
    return f"text {seed}\n" + "\n".join(lines) + "\n"


def write_texts(folder: Path, *, count: int = 40, length: int = 60, first: int = 0) -> str:
    """Some small text files; returns the glob that names them. 32 files or more are not cut."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:04d}.txt").write_text(words(length, number))
    return str(folder / "*.txt")


def tiny_tree(folder: Path) -> dict[str, Any]:
    """Options of three sites with two layers of four experts, as they would stand in YAML."""
    return {
        "num_sites": 3,
        "local_steps": 2,
        "rounds": 2,
        "model": {
            "num_layers": 2,
            "d_model": 16,
            "num_heads": 2,
            "num_experts": 4,
            "top_k": 2,
            "expert_ffn_dim": 16,
            "shared_expert_ffn_dim": 8,
        },
        "placement": {"replication_factor": 2},
        "inner": {"lr": 0.01, "batch_size": 2, "schedule_steps": 8},
        "data": {
            "source": write_texts(folder / "texts"),
            "seq_len": 16,
            "held_out_sequences": 6,
            "held_out_fraction": 0.1,
        },
        "run": {"dir": str(folder / "run"), "keep_checkpoints": 9},
    }


def write_config(folder: Path) -> Path:
    """The tiny experiment as a file; tests change it by overrides."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(folder), sort_keys=False))
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def fomoe(*words: object) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def trained(*words: object) -> dict[str, Any]:
    """Run `fomoe train ... --json`, which must succeed; returns its summary."""
    outcome = fomoe("train", *words, "--json")
    assert outcome.status == 0, outcome.err
    return outcome.json


def load_part(run_dir: Path, round_idx: int, site: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the small values of a site's part."""
    part = Part(run_dir, round_idx, site)
    return {name: part.read(name) for name in part.kept}, part.values


def snapshot(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    """Records of metrics.jsonl, of one kind or all; every line must be strict JSON."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=_refuse) for line in lines]
    return [row for row in rows if not kind or row["kind"] == kind]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
