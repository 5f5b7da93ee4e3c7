"""The tiny experiment as a study, and a program that stands in for its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from helpers_cli import tiny_tree

from fomoe.study import results


def study_tree(folder: Path) -> dict[str, Any]:
    """Two arms and two seeds of the tiny experiment."""
    config = tiny_tree(folder)
    del config["run"]["dir"]
    return {
        "title": "Tiny",
        "question": "Does it pay?",
        "config": config,
        "seeds": [0, 1],
        "control": "all",
        "arms": {
            "all": {"method": "diloco", "note": "every | expert"},
            "plain": ["router.at_least_one=false"],
        },
        "runs": str(folder / "runs"),
        "results": str(folder / "results.jsonl"),
    }


def write_study(folder: Path, name: str = "small.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(study_tree(folder) | changes, sort_keys=False))
    return path


def lines(folder: Path) -> list[dict[str, Any]]:
    return results.read_results(folder / "results.jsonl")


# Does what `fomoe train FILE --device auto [MODE]` does to the run's folder, without training.
STAND_IN = """
import json, os, pathlib, re, shutil, signal, sys, time
file, mode = pathlib.Path(sys.argv[2]), sys.argv[5:]
text = file.read_text()
run = pathlib.Path(re.search(r"  dir: (.*)", text)[1])
home = run.parent.parent.parent
run.mkdir(parents=True, exist_ok=True)
with (home / "calls").open("a") as calls:
    calls.write(" ".join([run.name, *mode]) + "\\n")
shutil.copy(file, run / "config.yaml")
if (home / "hang").exists() and (home / "hang").read_text() in run.name:
    signal.signal(signal.SIGTERM, lambda *_: ((run / "stopped").touch(), sys.exit(130)))
    (run / "hangs").touch()
    time.sleep(60)
end = time.monotonic() + 10
while (home / "pin").exists() and len(os.sched_getaffinity(0)) > 1:
    if time.monotonic() > end:
        sys.exit("is bound to no core")
    time.sleep(0.01)
if (home / "fail").exists() and (home / "fail").read_text() in run.name:
    print("fomoe: error: it broke", file=sys.stderr)
    sys.exit(1)
seed = int(re.search(r"^seed: (.*)", text, re.M)[1])
plain = "at_least_one: false" in text
(run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in [
    {"kind": "round", "round": 0, "site": 0, "wire_bytes": 500},
    {"kind": "merged", "round": 0, "val_loss_merged": 3.0},
    {"kind": "round", "round": 1, "site": 0, "wire_bytes": 500},
    {"kind": "round", "round": 2, "site": 0, "wire_bytes": 1000},
]))
(run / "summary.json").write_text(json.dumps({
    "val_loss_merged": 1.5 - 0.25 * plain + 0.5 * seed + 0.125 * seed * plain,
    "val_loss_local": [2.0, None, 3.0],
    "skipped_fraction": 0.5 * plain, "executed_fraction": 1 - 0.5 * plain,
    "expert_flops_fraction": 1 - 0.5 * plain,
    "memory_bytes_per_site": 2000 - 500 * plain,
    "payload_bytes_per_site_per_round": 1000 - 250 * plain,
    "params_total": 500, "tokens": 4096, "text_sha256": f"{seed}" * 64,
    "environment": {"torch": "2.0", "python": "3.12", "fomoe": "0.1", "accelerator": None},
}))
"""


def called(calls: Path) -> list[str]:
    """Calls since the last look."""
    words = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return sorted(words)
