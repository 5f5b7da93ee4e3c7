"""Calibration over shaped links: each site in a network namespace of its own; root, Linux only.

    python -m bench.links            # about 6 minutes; exit status 1 if a target is missed

Runs the trainer at several placements and local steps, fits some of the runs with `fomoe
calibrate`, and predicts the others: round time within 10 %, payload exact (docs/validation.md).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
TARGET = 0.10  # of the round time


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that are fitted and one that is predicted; a run is its overrides."""

    num_sites: int
    fitted: tuple[str, ...]
    held_out: str


EXPERIMENTS = (
    Experiment(
        num_sites=2,
        fitted=(
            "placement.replication_factor=2 local_steps=8",
            "placement.replication_factor=1 local_steps=16",
        ),
        held_out="placement.replication_factor=null placement.capacity=[8,4] local_steps=12",
    ),
    Experiment(
        num_sites=4,
        fitted=(
            "placement.replication_factor=4 local_steps=8",
            "placement.replication_factor=1 local_steps=16",
        ),
        held_out="placement.replication_factor=2 local_steps=12",
    ),
)


def main() -> int:
    """Run every experiment `--repeat` times and print one line each."""
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=__doc__)
    parser.add_argument("--rate", default="50mbit", help="of every link, both ways, as tc says it")
    parser.add_argument("--queue", default="50ms", help="longest wait in a link's queue")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--sites", type=int, choices=(2, 4), help="only this experiment")
    args = parser.parse_args()
    missed = 0
    for experiment in EXPERIMENTS:
        if args.sites not in (None, experiment.num_sites):
            continue
        with shaped_links(experiment.num_sites, args.rate, args.queue):
            for _ in range(args.repeat):
                with TemporaryDirectory() as folder:
                    missed += not run_experiment(experiment, Path(folder), args)
    return min(missed, 1)


def run_experiment(experiment: Experiment, folder: Path, args: argparse.Namespace) -> bool:
    """Train, fit, predict and print; whether round time and payload are within the target."""
    names = [*experiment.fitted, experiment.held_out]
    folders = [folder / str(index) for index in range(len(names))]
    for overrides, run_dir in zip(names, folders, strict=True):
        train(experiment.num_sites, overrides.split(), run_dir, args.rounds)
    *fitted, held_out = map(str, folders)
    rate = args.rate.replace("mbit", "Mbit").replace("gbit", "Gbit")
    words = [*fitted, "--hold-out", held_out, "--bandwidth", rate, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fomoe", "calibrate", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found = json.loads(done.stdout)
    print(
        f"{experiment.num_sites} sites; fitted {'; '.join(experiment.fitted)}; "
        f"held out {experiment.held_out}: round {found['round_error']:.1%}, "
        f"sync {found['sync_error']:.1%}, payload off by {found['payload_error_bytes']} bytes, "
        f"{found['link_efficiency']:.2f} of the link, {found['sync_fixed_s']:.2f} s per sync, "
        f"step {found['step_time_s']:.3f} s ({found['step_fixed_s']:.3f} fixed)",
        flush=True,
    )
    return bool(found["round_error"] <= TARGET and found["payload_error_bytes"] == 0)


def train(num_sites: int, overrides: list[str], run_dir: Path, rounds: int) -> None:
    """One process per site over the shaped links; its own output only if it fails."""
    options = [
        *overrides,
        f"num_sites={num_sites}",
        f"rounds={rounds}",
        f"run.dir={run_dir}",
        "run.eval_every=0",
        "run.checkpoint_every=0",
        "data.held_out_sequences=2",
    ]
    command = [sys.executable, "-m", "fomoe", "train", "configs/quickstart.yaml", *options]
    address = {"MASTER_ADDR": _address(0), "MASTER_PORT": "29500"}
    processes = []
    for site in range(num_sites):
        ranks = {"RANK": str(site), "WORLD_SIZE": str(num_sites), "LOCAL_RANK": "0"}
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", _namespace(site), *command, "--interface", "wan"],
                cwd=ROOT,
                env={**os.environ, **address, **ranks, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for site, process in enumerate(processes):
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"site {site} failed:\n{output}")


# ------------------------------------------------------------------------------------------- links


def _namespace(site: int) -> str:
    return f"fomoe-site{site}"


def _address(site: int) -> str:
    return f"10.213.0.{site + 1}"


def _call(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def shaped_links(num_sites: int, rate: str, queue: str) -> Iterator[None]:
    """Namespaces on one bridge, each by a pair of devices that is shaped in both directions."""
    try:
        _call("ip netns add fomoe-bridge")
        _call("ip -n fomoe-bridge link add bridge type bridge")
        _call("ip -n fomoe-bridge link set bridge up")
        for site in range(num_sites):
            name, far = _namespace(site), f"site{site}"
            _call(f"ip netns add {name}")
            _call(f"ip -n {name} link add wan type veth peer name {far} netns fomoe-bridge")
            _call(f"ip -n fomoe-bridge link set {far} master bridge up")
            _call(f"ip -n {name} address add {_address(site)}/24 dev wan")
            for namespace, device in ((name, "wan"), ("fomoe-bridge", far)):
                shape = f"root tbf rate {rate} burst 32kb latency {queue}"
                _call(f"tc -n {namespace} qdisc add dev {device} {shape}")
            _call(f"ip -n {name} link set wan up")
            _call(f"ip -n {name} link set lo up")
        yield
    finally:
        for name in ("fomoe-bridge", *map(_namespace, range(num_sites))):
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
