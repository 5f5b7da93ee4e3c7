"""The file of results: one line of JSON per finished run, kept under version control (no torch)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import fomoe
from fomoe.config import Config
from fomoe.errors import CheckpointError, say_line
from fomoe.files import not_written
from fomoe.jsonlines import read_lines
from fomoe.options import declared_options, section_kinds
from fomoe.records import RunRecords
from fomoe.study.plan import StudyRun

Line = dict[str, Any]
# What a line takes from the run's summary.json.
_TAKEN = (
    *("val_loss_merged", "skipped_fraction", "executed_fraction", "expert_flops_fraction"),
    *("memory_bytes_per_site", "payload_bytes_per_site_per_round", "params_total", "tokens"),
)
# And of a run with adapters.
_TAKEN_OF_ADAPTERS = (
    *("val_loss_by_rank", "val_loss_by_client", "passes_per_step", "energy"),
    "product_error",
)


def read_results(path: Path) -> list[Line]:
    """Every line that can be read; a file that is not there has none.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = read_lines(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if lines.damaged:
        say_line(f"{path}: damaged lines left out: {', '.join(map(str, lines.damaged))}")
    return [line for _, _, line in lines.objects]


def append_result(path: Path, line: Line) -> None:
    """Add a line in one piece; several processes may add lines at once.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            # A line that a full disk or a kill cut short is ended, so that this one stays whole.
            start = "" if file.read(1) in (b"", b"\n") else "\n"
            file.write(f"{start}{json.dumps(line)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(path, error) from error


def result_line(
    run: StudyRun,
    summary: Mapping[str, Any],
    records: RunRecords,
    *,
    wall_s: float | None = None,
    commit: str | None = None,
) -> Line:
    """The line of a finished run.

    Args:
        summary: the content of the run's summary.json.
        records: of its rounds, for the curve: bytes that a site has sent, and the merged loss.
        wall_s: seconds of its process; None if it was resumed, or ran before.
        commit: of the code when its process started; None if not known.

    Raises:
        KeyError: if the summary lacks a value.
    """
    local = [loss for loss in summary["val_loss_local"] if loss is not None]
    curve = zip(records.sent(), records.merged_losses(), strict=True)
    environment = summary["environment"]
    has_adapters = run.config.adapters.base is not None
    return {
        "study": run.study,
        "arm": run.arm,
        "regime": run.regime or None,
        "seed": run.seed,
        "overrides": run.overrides,
        **{name: summary[name] for name in _TAKEN},
        **({name: summary.get(name) for name in _TAKEN_OF_ADAPTERS} if has_adapters else {}),
        "val_loss_local": sum(local) / len(local) if local else None,
        "curve": [[sent, loss] for sent, loss in curve if loss is not None],
        "wall_s": None if wall_s is None else round(wall_s, 1),
        "text_sha256": summary.get("text_sha256"),
        **{name: environment.get(name) for name in ("torch", "python", "fomoe", "accelerator")},
        "commit": commit,
        "config": run.config.model_dump(mode="json", exclude={"run"}),
    }


def newest(lines: Sequence[Line], run: StudyRun) -> Line | None:
    """The last line of this run with an equal config; None if there is none."""
    place = (run.study, run.arm, run.regime or None, run.seed)
    for line in reversed(lines):
        own = tuple(line.get(name) for name in ("study", "arm", "regime", "seed"))
        if own == place and same_experiment(line, run.config):
            return line
    return None


def same_experiment(line: Line, config: Config) -> bool:
    """Whether a line's config is this one, apart from `run`.

    An option that is newer than the line has its default there, as in a checkpoint that is
    resumed. One that exists no more counts only if the line's overrides set it.
    """
    tree, overrides = line.get("config"), line.get("overrides")
    if not isinstance(tree, dict) or not isinstance(overrides, dict):
        return False
    unknown: list[str] = []
    tree = _known(tree, Config, "", unknown)
    if any(name in overrides for name in unknown):
        return False
    try:
        return Config.model_validate(tree).fingerprint() == config.fingerprint()
    except (ValidationError, RecursionError):
        return False


def _known(tree: Mapping[str, Any], section: Any, prefix: str, unknown: list[str]) -> Line:
    """A tree without the options that do not exist; `unknown` receives their names."""
    options, known = declared_options(section), {}
    for name, value in tree.items():
        if name not in options:
            unknown.append(f"{prefix}{name}")
        elif section_kinds(options[name]) and isinstance(value, dict):
            known[name] = _known(value, options[name], f"{prefix}{name}.", unknown)
        else:
            known[name] = value
    return known


def code_commit() -> str | None:
    """The commit of the code that runs, with `+` if it was changed since; None if not known."""
    package = Path(fomoe.__file__).parent
    found = _git(package, "rev-parse", "--short=12", "HEAD")
    tracked = found and _git(package, "ls-files", "__init__.py")
    if not tracked:  # an installed package that lies in some other repository
        return None
    return f"{found}+" if _git(package, "status", "--porcelain", "--", ".") else found


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
