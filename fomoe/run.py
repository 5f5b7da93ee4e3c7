"""Everything a run works with; the rounds, checkpoints and a resume read and change it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fomoe.config import Config
from fomoe.data.dataset import Data
from fomoe.evaluate import MergedEvaluation
from fomoe.logs import Logs
from fomoe.parking import Parking
from fomoe.planning import RunPlan
from fomoe.report import Progress
from fomoe.site import Site
from fomoe.summary import Counts, Totals
from fomoe.sync.links import Links
from fomoe.sync.sync import Sync
from fomoe.sync.transport import Transport
from fomoe.systems import System


@dataclass
class Run:
    """Everything a run works with; built once, then changed only by the rounds."""

    config: Config
    run_dir: Path
    plan: RunPlan
    transport: Transport
    data: Data
    system: System
    sites: dict[int, Site]
    sync: Sync
    progress: Progress
    totals: dict[int, Totals]
    probes: dict[int, torch.Tensor] = field(default_factory=dict)
    local_losses: dict[int, float] = field(default_factory=dict)
    merged: MergedEvaluation | None = None
    first_round: int = 0
    parkings: dict[int, Parking] = field(default_factory=dict)  # of sites that park while waiting
    counts_before: dict[int, Counts] = field(default_factory=dict)  # at the round's start
    log: Logs | None = None
    links: Links | None = None  # where they were measured

    def site_counts(self) -> dict[int, Counts]:
        """Bytes counted so far, of the sites of this process: those of all their ranks together."""
        return {
            site: sum_counts(
                [json.loads(own) for own in self.transport.inside.gather(_as_json(counts.state()))]
            )
            for site, counts in self.transport.counts.items()
        }

    def parkings_of(self, site: int) -> list[Parking]:
        return [self.parkings[site]] if site in self.parkings else []


def sum_counts(parts: list[Counts]) -> Counts:
    """Bytes by class of several ranks together."""
    total: dict[str, Counter[str]] = {"payload": Counter(), "wire": Counter()}
    for part in parts:
        for name, counts in part.items():
            total[name].update(counts)
    return {name: dict(counts) for name, counts in total.items()}


def _as_json(counts: Counts) -> bytes:
    return json.dumps(counts).encode()
