"""Four sites are killed at random moments and resumed: every run ends as if nothing had happened.

A short form is part of the tests. The long one, which must end without a failure:

    python -m tests.kill_sites --kills 30
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from fomoe.checkpoint import saved_rounds
from fomoe.cli import main as fomoe

NUM_SITES, KEPT, MOST_KILLS = 4, 3, 6  # kills of one run
TIMES = {"train_s", "sync_s", "exchange_s", "utilisation", "mean_bytes_per_s", "peak_bytes_per_s"}
fork = multiprocessing.get_context("fork")
for name in ("fomoe.training", "torch._dynamo"):  # once, before the sites are forked
    import_module(name)


def write_config(folder: Path, rounds: int) -> Path:
    """A tiny model and a text of numbered words."""
    draw = random.Random(0)
    words = [f"{draw.choice(('one', 'two', 'three'))}{draw.randrange(99)}" for _ in range(9000)]
    (folder / "text.txt").write_text(
        "\n".join(" ".join(words[i : i + 9]) for i in range(0, 9000, 9))
    )
    tree = {
        "num_sites": NUM_SITES,
        "local_steps": 1,
        "rounds": rounds,
        "model": {
            "num_layers": 2,
            "d_model": 16,
            "num_heads": 2,
            "num_experts": 8,
            "expert_ffn_dim": 12,
        },
        "placement": {"replication_factor": 2},
        "inner": {"batch_size": 2, "lr": 0.01},
        "sync": {"timeout_s": 60.0},
        "data": {"source": str(folder / "text.txt"), "seq_len": 32, "held_out_sequences": 4},
        "run": {"keep_checkpoints": KEPT, "eval_merged_every": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Sites:
    """The sites of one run, each a process; they write to one folder, or each to its own."""

    def __init__(self, config: Path, folder: Path, *, shared: bool) -> None:
        self.config, self.folder = config, folder
        names = ["run" if shared else f"site-{site}/run" for site in range(NUM_SITES)]
        self.run_dirs = [folder / name for name in names]
        self.processes: list[Any] = []

    def start(self, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes = [
            fork.Process(target=self._main, args=(site, port, flags), daemon=True)
            for site in range(NUM_SITES)
        ]
        for process in self.processes:
            process.start()

    def _main(self, site: int, port: int, flags: tuple[str, ...]) -> None:
        torch.set_num_threads(1)
        log = os.open(self.folder / f"site-{site}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        launch = {"RANK": site, "WORLD_SIZE": NUM_SITES, "LOCAL_RANK": site}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (launch | address).items()}
        words = [str(self.config), f"run.dir={self.run_dirs[site]}", *flags]
        os._exit(fomoe(["train", *words, "--interface", "lo", "--device", "cpu"]))

    def ended(self, seconds: float) -> bool:
        """Whether all of them end by themselves in this time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return all(process.exitcode is not None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def problem(self) -> str:
        """What the sites that failed said; empty if none did."""
        logs = [(self.folder / f"site-{site}.log").read_text() for site in range(NUM_SITES)]
        return "; ".join(
            f"site {site} ended with {process.exitcode}: {log.strip()[-600:]}"
            for site, (process, log) in enumerate(zip(self.processes, logs, strict=True))
            if process.exitcode
        )

    def result(self) -> dict[str, Any]:
        """All that a run leaves which does not depend on time."""
        folders = sorted(set(self.run_dirs))
        rows = [
            {name: value for name, value in json.loads(line).items() if name not in TIMES}
            for folder in folders
            for path in sorted(folder.glob("metrics*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        summary = json.loads((self.run_dirs[0] / "summary.json").read_text())
        left = [
            path.name for folder in folders for path in folder.rglob("*") if path.suffix in LEFT
        ]
        return {
            "losses": [summary["val_loss_merged"], summary["val_loss_local"]],
            "tokens": summary["tokens"],
            "records": rows,
            # A kill after the last round may leave one more, which only a longer run would remove.
            "rounds": [saved_rounds(folder)[:KEPT] for folder in folders],
            "left behind": left,
        }


LEFT = (".tmp", ".lock")


def undisturbed(config: Path, folder: Path, *, shared: bool) -> tuple[dict[str, Any], float]:
    """What a run that nobody kills leaves, and the seconds it takes."""
    sites = Sites(config, folder, shared=shared)
    started = time.monotonic()
    sites.start()
    assert sites.ended(300), "hangs"
    assert not sites.problem(), sites.problem()
    return sites.result(), time.monotonic() - started


def kill_and_resume(
    config: Path, folder: Path, draw: random.Random, *, shared: bool, most: int, seconds: float
) -> tuple[dict[str, Any], int, str]:
    """One run that is killed now and then: what it leaves, the kills, and a problem if any."""
    sites, kills = Sites(config, folder, shared=shared), 0
    flags: list[str] = []
    while True:
        sites.start(*flags)
        flags = ["--resume"]
        if sites.ended(draw.uniform(0, seconds) if kills < most else 300):
            break
        sites.kill()
        if kills == most:
            return {}, kills, "hangs"
        kills += 1
    problem = sites.problem()
    return ({}, kills, problem) if problem else (sites.result(), kills, "")


def kill_many(folder: Path, kills: int, rounds: int, seed: int, *, shared: bool) -> int:
    """Runs until so many kills are done; returns how many runs ended wrong."""
    config = write_config(folder, rounds)
    expected, seconds = undisturbed(config, folder / "undisturbed", shared=shared)
    assert not expected["left behind"], expected["left behind"]
    draw, done, runs, wrong = random.Random(seed), 0, 0, 0
    while done < kills:
        most = min(MOST_KILLS, kills - done)
        where = folder / f"run-{runs}"
        found, count, problem = kill_and_resume(
            config, where, draw, shared=shared, most=most, seconds=seconds
        )
        runs, done = runs + 1, done + count
        if not problem and found != expected:
            problem = f"{[name for name in expected if found[name] != expected[name]]} differ"
        if problem:
            wrong += 1
            print(f"run {runs}, killed {count} times: {problem}", flush=True)
    kind = "one folder" if shared else "a folder per site"
    print(
        f"{kind}: {done} kills of all {NUM_SITES} sites in {runs} runs of {rounds} rounds "
        f"({seconds:.1f} s undisturbed); {runs - wrong} of {runs} runs ended with the undisturbed "
        f"losses and records",
        flush=True,
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="for each kind of folder")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    for shared in (True, False):
        with tempfile.TemporaryDirectory(prefix="fomoe-kills-") as folder:
            wrong += kill_many(Path(folder), args.kills, args.rounds, args.seed, shared=shared)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
