"""The results of about fifty commands, recorded before a change of structure and compared after it.

`python -m tests.answers record FILE` runs the commands and writes their results;
`python -m tests.answers compare FILE` runs them again and lists the differences: counts must be
equal, losses may differ by 1e-6. Replica hashes are compared too, but only listed: another order of
additions changes them and nothing else. Both must run on one kind of CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from helpers_cli import Outcome, fomoe, records, write_config

from fomoe.config import METHODS

TOLERANCE = 1e-6
# Times and memory sizes vary from run to run.
_UNSTEADY = ("_s", "_s_by_site", "tokens_per_s", "peak_memory", "run_dir")

FOMOE: tuple[str, ...] = ()
DRY: dict[str, tuple[str, ...]] = {
    "fomoe": FOMOE,
    "r 1": ("placement.replication_factor=1",),
    "capacity": ("placement.capacity=[4,3,1]", "placement.replication_factor=null"),
    "capacity with r": ("placement.capacity=[4,3,1]",),
    "common": (
        "placement.kind=common",
        "placement.num_common=2",
        "placement.replication_factor=null",
    ),
    "table": (
        "placement.kind=table",
        "placement.replication_factor=null",
        "placement.table=[[0],[2,0],[1,2],[0,1,2]]",
    ),
    "router rows": ("sync.router_rows=holders",),
    "local": ("placement.replication_factor=1", "sync.single_holder=local"),
    **{method: (f"method={method}",) for method in METHODS if method not in ("fomoe", "copies")},
    "copies": ("method=copies", "placement.replication_factor=1", "model.num_experts=6"),
}
TRAIN: dict[str, tuple[str, ...]] = {
    **{name: words for name, words in DRY.items() if name != "capacity with r"},
    "adam outside": ("outer.optimizer=Adam", "outer.lr=0.01"),
    "tokens": ("sync.weight=tokens", "placement.replication_factor=1"),
    "uniform": ("sync.weight=uniform",),
    "bias": ("router.balance=both",),
    "target": ("router.execute_target=0.65", "router.at_least_one=false"),
    "sigmoid": ("router.score=sigmoid", "router.gate_norm=none", "router.skip_scale=inverse"),
    "one dense layer": ("model.num_dense_layers=1", "model.qk_norm=full"),
    "tied, grouped": ("model.tie_embeddings=true", "model.num_kv_heads=1", "inner.optimizer=sgd"),
    "grouped_mm": ("model.experts.backend=grouped_mm",),
    "recompute": ("model.recompute=experts", "inner.accumulation_steps=2"),
    "spes, router rows": ("method=spes", "sync.router_rows=holders"),
}
DISTRIBUTED: dict[str, tuple[str, ...]] = {
    "fomoe": ("router.balance=both",),
    "r 1, rows": ("placement.replication_factor=1", "sync.router_rows=holders"),
    "spes": ("method=spes",),
    "ddp": ("method=ddp",),
}


def answers(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and answer of every command; all of them run below `folder`."""
    config = write_config(folder)
    for name, words in DRY.items():
        yield f"dry run: {name}", _of(fomoe("train", config, *words, "--dry-run", "--json"))
    for name, words in TRAIN.items():
        yield f"train: {name}", _train(config, words, folder / "run")
    yield "resume", _resume(config, folder / "run")
    for name, words in DISTRIBUTED.items():
        yield f"distributed: {name}", _distributed(config, words, folder / "run")
    yield (
        "compare",
        _of(fomoe("compare", config, "--methods", "diloco,fomoe,single", "--json", "--overwrite")),
    )


def _of(outcome: Outcome) -> Any:
    """The JSON that a command printed, or its status and error."""
    if outcome.status:
        return {"status": outcome.status, "error": outcome.err}
    return _steady(outcome.json)


def _train(config: Path, words: tuple[str, ...], run_dir: Path) -> Any:
    shutil.rmtree(run_dir, ignore_errors=True)
    summary = _of(fomoe("train", config, *words, "--json"))
    return {"summary": summary, "records": _steady(records(run_dir)), **_merged(run_dir)}


def _resume(config: Path, run_dir: Path) -> Any:
    """Two rounds, then two more from their checkpoint."""
    shutil.rmtree(run_dir, ignore_errors=True)
    fomoe("train", config, "rounds=2", "--json")
    summary = _of(fomoe("train", config, "rounds=4", "--resume", "--json"))
    return {"summary": summary, "records": _steady(records(run_dir)), **_merged(run_dir)}


def _distributed(config: Path, words: tuple[str, ...], run_dir: Path) -> Any:
    shutil.rmtree(run_dir, ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sites = [
        subprocess.Popen(
            [sys.executable, "-m", "fomoe", "train", str(config), *words, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(site), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": str(port), "LOCAL_RANK": str(site), "OMP_NUM_THREADS": "1"},
        )
        for site in range(3)
    ]
    printed = [site.communicate()[0] for site in sites]
    answer = {"summary": _steady(json.loads(printed[0])), **_merged(run_dir)}
    for path in sorted(run_dir.glob("metrics*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        answer[path.name] = _steady(rows)
    return answer


def _merged(run_dir: Path) -> dict[str, Any]:
    """Names, shapes and sums of the merged model's tensors."""
    from safetensors.torch import load_file

    if fomoe("merge", run_dir).status:
        return {"merged": None}
    tensors = load_file(run_dir / "merged" / "model.safetensors")
    return {
        "merged": {
            name: {"shape": list(tensor.shape), "norm": float(tensor.double().norm())}
            for name, tensor in sorted(tensors.items())
        }
    }


def _steady(answer: Any) -> Any:
    """An answer without what a clock or the allocator decides."""
    if isinstance(answer, dict):
        return {
            key: _steady(value)
            for key, value in answer.items()
            if not key.endswith(_UNSTEADY) and not key.startswith(_UNSTEADY[2:])
        }
    return [_steady(item) for item in answer] if isinstance(answer, list) else answer


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Every place where two answers differ by more than rounding."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if key in before and key in after:
                yield from differences(before[key], after[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}: {'gone' if key in before else 'new'}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif isinstance(before, float) and isinstance(after, float):
        if abs(before - after) > TOLERANCE * max(1.0, abs(before)):
            yield f"{where}: {before!r} -> {after!r}"
    elif before != after:
        yield f"{where}: {str(before)[:80]} -> {str(after)[:80]}"


def main() -> int:
    command, file = sys.argv[1], Path(sys.argv[2]).resolve()
    home = Path(tempfile.gettempdir()) / "fomoe-answers"  # fixed: messages name paths
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    os.environ["PYTHONPATH"] = str(Path.cwd())
    os.chdir(home)
    found = dict(answers(home))
    if command == "record":
        file.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} commands")
        return 0
    before = json.loads(file.read_text())
    rows = list(differences(before, json.loads(json.dumps(found))))
    hashes = [row for row in rows if "/replica_hashes/" in row]
    wrong = [row for row in rows if row not in hashes]
    print("\n".join(wrong))
    print(f"{len(found)} commands, {len(wrong)} differences, {len(hashes)} other replica hashes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
