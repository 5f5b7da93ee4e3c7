"""Running a study: which runs are left, and their processes side by side (no torch)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fomoe
from fomoe.amounts import duration_text
from fomoe.config import Config
from fomoe.errors import CheckpointError, ConfigError, say_line
from fomoe.files import listing, write_text_atomically
from fomoe.load import build_config
from fomoe.records import read_run
from fomoe.study.plan import Study, StudyRun
from fomoe.study.results import Line, append_result, code_commit, newest, read_results, result_line
from fomoe.yamlfile import read_yaml

# recorded: has a line. complete: has ended, the line is missing. started: has checkpoints.
# unsaved: was stopped before its first one. other: the folder holds another experiment. new: none.
State = Literal["recorded", "complete", "started", "unsaved", "other", "new"]
_PAUSE_S = 0.05  # between looks at the processes
_PATIENCE_S = 30.0  # for a process that was asked to stop


def state_of(run: StudyRun, lines: Sequence[Line]) -> State:
    """What has been done of a run."""
    if newest(lines, run) is not None:
        return "recorded"
    names = listing(run.folder)
    if "config.yaml" in names:
        saved = _saved_config(run.folder / "config.yaml")
        if saved is None or saved.fingerprint() != run.config.fingerprint():
            return "other"
        if summary_of(run) is not None:
            return "complete"
    if listing(run.folder / "checkpoints"):
        return "started"
    return "unsaved" if names else "new"


def _saved_config(path: Path) -> Config | None:
    try:
        return build_config(read_yaml(path))
    except ConfigError:
        return None


def summary_of(run: StudyRun) -> dict[str, Any] | None:
    """The summary of a run that has ended, or None."""
    try:
        summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "val_loss_merged" in summary else None


def work_through(
    studies: Sequence[Study],
    runs: Sequence[StudyRun],
    *,
    slots: Sequence[int | None],
    device: str = "auto",
    overwrite: bool = False,
) -> list[StudyRun]:
    """Run whatever has no line yet, and add a line for each run that has ended.

    Args:
        runs: the runs of these studies that are asked for.
        slots: one entry per run at a time: the core that it is bound to, or None.
        device: passed to `fomoe train`.
        overwrite: replace folders that hold another experiment.

    Returns:
        The runs that failed.

    Raises:
        CheckpointError: if a folder holds another experiment and `overwrite` is false, before
            anything runs.
        KeyboardInterrupt: after all processes have ended.
    """
    files = {study.name: study.results for study in studies}
    lines = {study.name: read_results(study.results) for study in studies}
    states = {run.folder: state_of(run, lines[run.study]) for run in runs}
    for run in runs:
        if states[run.folder] == "other" and not overwrite:
            raise CheckpointError(
                f"run.dir {run.folder} holds a run of another config than {run.label}: "
                f"--overwrite replaces it, and every other one like it"
            )
    todo = []
    for run in runs:
        state = states[run.folder]
        done = state == "complete" and not _record(run, files[run.study])
        if state != "recorded" and not done:
            todo.append(run)
    say_line(f"{len(runs) - len(todo)} of {len(runs)} runs are done, {len(todo)} to do")
    return _Pool(todo, states, files, slots, device).work()


def _record(
    run: StudyRun, results: Path, *, wall_s: float | None = None, commit: str | None = None
) -> str:
    """Add the line of a run that has ended; returns what is wrong, or nothing."""
    summary = summary_of(run)
    if summary is None:
        return f"{run.folder} has no summary.json"
    try:
        line = result_line(run, summary, read_run(run.folder), wall_s=wall_s, commit=commit)
    except CheckpointError as error:
        return str(error)
    except (KeyError, TypeError) as error:
        return f"{run.folder}/summary.json is not complete: {error}"
    append_result(results, line)
    return ""


# ------------------------------------------------------------------------------------- processes


@dataclass
class _Child:
    """A run's process.

    Attributes:
        slot: its core, or None.
        whole: whether it began at round 0, so that its time is the run's.
        commit: of the code that it runs.
    """

    run: StudyRun
    process: subprocess.Popen[bytes]
    slot: int | None
    started: float
    whole: bool
    commit: str | None


class _Pool:
    """As many processes as there are slots, until every run has ended or a signal comes."""

    def __init__(
        self,
        todo: Iterable[StudyRun],
        states: dict[Path, State],
        files: dict[str, Path],
        slots: Sequence[int | None],
        device: str,
    ) -> None:
        self.waiting = deque(todo)
        self.total = len(self.waiting)
        self.states, self.files, self.device = states, files, device
        self.free = list(slots)
        self.alive: list[_Child] = []
        self.failed: list[StudyRun] = []
        self.ended = 0
        self.signals: list[int] = []

    def work(self) -> list[StudyRun]:
        # A signal only leaves a note: raised within Popen, it would lose sight of a new process.
        wanted = [s for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        before = {
            s: signal.signal(s, lambda number, _: self.signals.append(number)) for s in wanted
        }
        try:
            while (self.waiting or self.alive) and not self.signals:
                while self.waiting and self.free:
                    self._start(self.waiting.popleft(), self.free.pop(0))
                time.sleep(_PAUSE_S)
                self._collect()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signals:
            raise KeyboardInterrupt
        return self.failed

    def _start(self, run: StudyRun, slot: int | None) -> None:
        state = self.states[run.folder]
        mode = {"started": ["--resume"], "new": []}.get(state, ["--overwrite"])
        file, log = beside(run, ".yaml"), beside(run, ".log")
        write_text_atomically(file, run.config.to_yaml())
        words = ["train", str(file), "--device", self.device, *mode]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                process_group=0,  # Ctrl-C comes to this process alone, which ends the others
            )
        if slot is not None:
            with suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, {slot})
        whole, now = state != "started", time.monotonic()
        self.alive.append(_Child(run, process, slot, now, whole, code_commit()))

    def _collect(self) -> None:
        for child in [c for c in self.alive if c.process.poll() is not None]:
            self.alive.remove(child)
            self.free.append(child.slot)
            self.ended += 1
            wall_s = time.monotonic() - child.started
            run, status = child.run, child.process.returncode
            own = wall_s if child.whole else None
            file = self.files[run.study]
            problem = "" if status else _record(run, file, wall_s=own, commit=child.commit)
            if status or problem:
                self.failed.append(run)
                why = problem or f"status {status}: {_last_line(beside(run, '.log'))}"
                text = f"failed, {why}"
            else:
                summary = summary_of(run)
                assert summary is not None  # `_record` has read it
                text = f"merged {summary['val_loss_merged']:.4f}, {duration_text(wall_s)}"
            say_line(f"{self.ended}/{self.total} {run.label}: {text}")

    def _stop(self) -> None:
        """End the processes that are left: they finish or undo what they are writing."""
        if not self.alive:
            return
        for child in self.alive:
            child.process.terminate()
        end = time.monotonic() + _PATIENCE_S
        while any(c.process.poll() is None for c in self.alive):
            if len(self.signals) > 1 or time.monotonic() > end:
                for child in self.alive:
                    child.process.kill()
            time.sleep(_PAUSE_S)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROGRAM = [sys.executable, "-P", "-m", "fomoe"]  # -P: the code of this process, not the folder's


def beside(run: StudyRun, suffix: str) -> Path:
    """A file of a run that is not in its folder, which is the run's own."""
    return run.folder.with_name(run.folder.name + suffix)


def _environment() -> dict[str, str]:
    """One thread per run, and the package that this process runs."""
    package = str(Path(fomoe.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{lines[-1] if lines else 'nothing was printed'} ({log})"
