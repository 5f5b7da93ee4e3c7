"""Many processes in one folder: sites that save and prune, readers beside them, runs that claim it.

A short form is part of the tests. The long one, which must end without a failure:

    python -m tests.stress_folder --rounds 500 --times 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fomoe import checkpoint
from fomoe.config import Config
from fomoe.errors import CheckpointError
from fomoe.files import listing, write_text_atomically
from fomoe.load import build_config
from fomoe.merging import merge
from fomoe.planning import plan_run
from fomoe.rundir import claim_run_dir
from fomoe.runlock import FolderInUseError, lock_folder
from fomoe.shapes import parameter_specs
from fomoe.sync.transport import InMemoryTransport

NUM_SITES = 4
fork = multiprocessing.get_context("fork")
failed = fork.Event()  # in one of the processes: nobody waits for it any longer


def tiny() -> Config:
    return build_config(
        {
            "num_sites": NUM_SITES,
            "model": {
                "num_layers": 1,
                "d_model": 8,
                "num_heads": 1,
                "num_experts": 4,
                "expert_ffn_dim": 8,
            },
            "placement": {"replication_factor": 2},
        }
    )


def together(works: list[Callable[[], Counter[str]]]) -> tuple[Counter[str], list[str]]:
    """Each work in a process of its own: the sum of their counts, and every failure's traceback."""
    answers = fork.SimpleQueue()
    failed.clear()

    def main(work: Callable[[], Counter[str]]) -> None:
        try:
            answers.put((work(), ""))
        except BaseException:
            failed.set()
            answers.put((Counter(), traceback.format_exc()))

    processes = [fork.Process(target=main, args=(work,), daemon=True) for work in works]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return sum((counts for counts, _ in found), Counter()), [text for _, text in found if text]


# ------------------------------------------------------------------------------- save, prune, read


def save_and_prune(
    run_dir: Path, rounds: int, site: int, *, wait: Callable[[], Any], keep: int = 3
) -> Counter[str]:
    """What a site of a run does with its folder; `wait` is where all sites have saved a round."""
    torch.set_num_threads(1)
    config = tiny()
    values = {"config": config.model_dump(mode="json"), "fingerprints": {}}
    shapes = {spec.name: spec.shape for spec in parameter_specs(config)}
    held = {
        segment.parameter
        for bucket in plan_run(config).segment_plan.buckets
        if site in bucket.holders
        for segment in bucket.segments
    }
    for round_idx in range(1, rounds + 1):
        tensors = {f"param/{n}": torch.full(shapes[n], float(round_idx)) for n in held}
        checkpoint.save_part(run_dir, round_idx, site, tensors, values)
        wait()
        checkpoint.remove_old(run_dir, round_idx, keep, [site])
        write_text_atomically(run_dir / "config.yaml", config.to_yaml())
    return Counter(saved=rounds)


def read_beside(run_dir: Path, out: Path, rounds: int) -> Counter[str]:
    """Merge again and again until the last round is there: a whole round, or one line."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    newest = 0
    while newest < rounds and not failed.is_set():
        newest = max(checkpoint.saved_rounds(run_dir), default=0)
        for site in range(NUM_SITES):
            checkpoint.check_part(run_dir, newest, site)
        try:
            path = merge(run_dir, out=out)
        except CheckpointError:
            counts["refused in a line"] += 1
        else:
            # The other reader may have written the file anew: it is of one round all the same.
            found = {float(x) for tensor in load_file(path).values() for x in tensor.unique()}
            assert len(found) == 1, f"merged of the rounds {found}"
            counts["merged"] += 1
    return counts


def stress_saves(folder: Path, rounds: int, *, shared: bool) -> tuple[Counter[str], list[str]]:
    """Four sites in one folder or in their own, in step as in a run, and readers beside them."""
    barrier = fork.Barrier(NUM_SITES)

    def site_work(site: int) -> Callable[[], Counter[str]]:
        run_dir = folder / ("run" if shared else f"run-{site}")
        return lambda: save_and_prune(run_dir, rounds, site, wait=lambda: barrier.wait(60))

    readers = [lambda: read_beside(folder / "run", folder / "merged", rounds)] * 2 * shared
    counts, failures = together([*map(site_work, range(NUM_SITES)), *readers])
    for run_dir in folder.glob("run*"):
        kept = checkpoint.saved_rounds(run_dir)
        if kept != sorted(range(max(1, rounds - 2), rounds + 1), reverse=True):
            failures.append(f"{run_dir} keeps the rounds {kept}")
        if left := [str(path) for path in run_dir.rglob("*.tmp")]:
            failures.append(f"temporary files are left: {left}")
    return counts, failures


def stress_drift(folder: Path, rounds: int) -> tuple[Counter[str], list[str]]:
    """Four sites in one folder that never wait for each other."""
    works = [
        lambda site=site: save_and_prune(folder / "run", rounds, site, wait=lambda: None, keep=2)
        for site in range(NUM_SITES)
    ]
    return together(works)


# -------------------------------------------------------------------------------------------- claim


def stress_claims(folder: Path, rounds: int) -> tuple[Counter[str], list[str]]:
    """Three runs of two processes each want one folder: never are two runs in at once."""
    inside = fork.Array("i", 3)

    def claim(run: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        for attempt in range(rounds):
            try:
                lock = lock_folder(folder / "run", f"run {run}", patience_s=0.01 * (attempt % 3))
            except FolderInUseError:
                counts["refused"] += 1
                continue
            with inside.get_lock():
                inside[run] += 1
                assert [bool(count) for count in inside].count(True) == 1, list(inside)
            time.sleep(0.001)
            with inside.get_lock():
                inside[run] -= 1
            lock.release()
            counts["claimed"] += 1
        return counts

    counts, failures = together([lambda run=run: claim(run) for run in (0, 1, 2)] * 2)
    if names := listing(folder / "run"):
        failures.append(f"left: {names}")
    return counts, failures


def stress_next_free(folder: Path, rounds: int) -> tuple[Counter[str], list[str]]:
    """Runs that take the next free folder at once: no two take the same."""
    barrier = fork.Barrier(NUM_SITES)
    config = tiny()
    settings = config.run.model_copy(update={"dir": str(folder / "run")})
    config = config.model_copy(update={"run": settings})

    def take() -> Counter[str]:
        for _ in range(rounds):
            barrier.wait(60)
            with claim_run_dir(config, InMemoryTransport([0]), "next-free") as (_, lock):
                lock.began = True
                time.sleep(0.01)  # a run reads its data before it writes
                with (lock.run_dir / "config.yaml").open("x") as file:
                    file.write("taken")
                barrier.wait(60)
        return Counter(folders=rounds)

    counts, failures = together([take] * NUM_SITES)
    if len(list(folder.iterdir())) != rounds * NUM_SITES:
        failures.append(f"{len(list(folder.iterdir()))} folders were taken")
    return counts, failures


# ---------------------------------------------------------------------------------------- all of it

STRESSES: dict[str, Callable[[Path, int], tuple[Counter[str], list[str]]]] = {
    "save, prune and merge in one folder": lambda f, n: stress_saves(f, n, shared=True),
    "save and prune, a folder per site": lambda f, n: stress_saves(f, n, shared=False),
    "save and prune without waiting": stress_drift,
    "three runs claim a folder": stress_claims,
    "four runs take the next free folder": lambda f, n: stress_next_free(f, max(2, n // 25)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    total = 0
    for number in range(1, args.times + 1):
        for name, stress in STRESSES.items():
            folder = Path(tempfile.mkdtemp(prefix="fomoe-stress-"))
            started = time.monotonic()
            counts, failures = stress(folder, args.rounds)
            shutil.rmtree(folder)
            counted = ", ".join(f"{value} {word}" for word, value in sorted(counts.items()))
            seconds = time.monotonic() - started
            print(f"{number}. {name}: {counted}; {len(failures)} failures ({seconds:.0f} s)")
            print(*failures, sep="\n", end="", flush=True)
            total += len(failures)
    print(f"{total} failures")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
