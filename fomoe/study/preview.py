"""What a study would run, and what each arm stores and sends (no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from fomoe.amounts import bytes_text
from fomoe.planning import plan_run, planned_summary
from fomoe.report import console
from fomoe.study.plan import Study, StudyRun
from fomoe.study.results import read_results
from fomoe.study.work import state_of


def print_plan(studies: Sequence[Study], runs: Sequence[StudyRun]) -> None:
    """A table per study: a row per arm and regime, from the runs' configs alone."""
    out = console(wide=True)
    for study in studies:
        own = [run for run in runs if run.study == study.name]
        lines = read_results(study.results)
        table = Table(
            *("arm", "regime", "method", "runs", "state per site", "payload per round", "tokens"),
            title=f"{study.title}: {len(own)} runs, results in {study.results}",
        )
        for first in own:
            if first.seed != own[0].seed:
                continue
            same = [r for r in own if (r.arm, r.regime) == (first.arm, first.regime)]
            states = Counter(state_of(run, lines) for run in same)
            planned = planned_summary(plan_run(first.config))
            table.add_row(
                first.arm,
                first.regime or "-",
                first.config.method,
                ", ".join(f"{count} {state}" for state, count in states.items()),
                bytes_text(planned["memory_bytes_per_site"]),
                bytes_text(planned["payload_bytes_per_site_per_round"]),
                f"{planned['tokens']:,}",
            )
        out.print(table)
