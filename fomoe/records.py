"""What runs have recorded, read from their folders, finished or not (no torch).

Runs that differ in their seed only are one group, whose figures show mean and range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fomoe.config import Config
from fomoe.errors import CheckpointError
from fomoe.jsonlines import read_lines
from fomoe.load import load_config

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """One run.

    Attributes:
        summary: None while the run is not finished.
        rounds: the records of the sites, per round in order.
        merged: loss of the merged model by round.
        evaluations: the whole records of these evaluations by round.
    """

    folder: Path
    config: Config
    summary: Record | None
    rounds: list[list[Record]]
    merged: dict[int, float]
    evaluations: dict[int, Record]

    @property
    def sites(self) -> list[int]:
        """Sites whose records are here."""
        return sorted({record["site"] for records in self.rounds for record in records})

    def tokens(self) -> list[float]:
        """Tokens of all sites together, after each round; a site without records had its share."""
        planned, found = self.config.tokens_per_step, []
        for records in self.rounds:
            here = sum(planned[record["site"]] for record in records)
            found.append(sum(record["tokens"] for record in records) * sum(planned) / here)
        return list(accumulate(found))

    def sent(self) -> list[float]:
        """Model bytes that a site has sent after each round, mean over sites."""
        return list(accumulate(m or 0.0 for m in self.mean(lambda r: r["wire_bytes"])))

    def mean(self, value: Callable[[Record], float | None]) -> list[float | None]:
        """Mean over the sites, per round; None where no site has a value."""
        found = []
        for records in self.rounds:
            values = [x for x in map(value, records) if x is not None]
            found.append(sum(values) / len(values) if values else None)
        return found

    def merged_losses(self) -> list[float | None]:
        """Per round; the last one is the summary's if the run is finished."""
        losses = [self.merged.get(index) for index in range(len(self.rounds))]
        if self.summary and losses and losses[-1] is None:
            losses[-1] = self.summary["val_loss_merged"]
        return losses


@dataclass(frozen=True)
class Group:
    """Runs that are drawn as one, because they differ in the seed only."""

    name: str
    runs: list[RunRecords]

    @property
    def first(self) -> RunRecords:
        return self.runs[0]


def site_speed(tokens: float, train_s: float, sync_s: float) -> float:
    """Tokens per second of one site: over its local steps and its sync, evaluation left out.

    Progress lines, summary and report all show this, as a mean over sites.
    """
    return tokens / max(train_s + sync_s, 1e-9)


def read_groups(folders: Iterable[Path]) -> list[Group]:
    """Read runs and group those that differ in their seed only.

    Raises:
        CheckpointError: if a folder holds no records of a run.
    """
    runs = [read_run(folder) for folder in folders]
    grouped: dict[str, list[RunRecords]] = {}
    for run in runs:
        grouped.setdefault(run.config.fingerprint(without=("run", "seed")), []).append(run)
    groups = list(grouped.values())
    names = short_names([group[0].folder for group in groups], several=[len(g) > 1 for g in groups])
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def read_run(folder: Path) -> RunRecords:
    """Read what a run has written so far.

    Raises:
        CheckpointError: naming the file that is missing or cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is not a run's folder: it has no config.yaml")
    rounds: dict[int, dict[int, Record]] = {}
    evaluations = {}
    for path in sorted(folder.glob("metrics*.jsonl")):
        try:
            records = [record for _, _, record in read_lines(path).objects]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        for record in records:
            if record.get("kind") == "round":
                rounds.setdefault(record["round"], {})[record["site"]] = record
            elif record.get("kind") == "merged":
                evaluations[record["round"]] = record
    if not rounds:
        raise CheckpointError(f"{folder} has no record of a round yet")
    return RunRecords(
        folder=folder,
        config=load_config(folder / "config.yaml"),
        summary=_summary(folder / "summary.json"),
        rounds=[list(by_site.values()) for _, by_site in sorted(rounds.items())],
        merged={index: record["val_loss_merged"] for index, record in evaluations.items()},
        evaluations=evaluations,
    )


def short_names(folders: list[Path], *, several: list[bool]) -> list[str]:
    """As many of a path's last parts as tell the folders apart; a group's has no seed."""
    paths = [folder.resolve() for folder in folders]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        names = [
            re.sub(r"-seed-?\d+$", "", name) if group else name
            for name, group in zip(names, several, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(names)]


def _summary(path: Path) -> Record | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError):
        raise CheckpointError(f"{path} cannot be read as a summary") from None
