"""Rows (i): how much a row of a sweep costs beside one answer of the cost model."""

from __future__ import annotations

import contextlib
import io

from bench.layers import Row
from bench.machine import Machine
from bench.timing import side_by_side
from fomoe.cli import main

# H is an array within a scenario; each structure is a scenario of its own.
QUESTIONS = {
    "one answer": "--model kimi-k2",
    "sweep of local steps": (
        "--model deepseek-v3 --sweep replication=1..4..1 local_steps=1..2500..1"
    ),
    "sweep of structures": (
        "--model deepseek-v3 --sweep replication=1,2,4 sites=8..17..1 bits=4,8,32 "
        "fragments=1..11..1 local_steps=1..10..1"
    ),
}


def answer_rows(machine: Machine) -> list[Row]:
    """One answer, then each sweep; `rows_per_answer` of its rows cost as much as one answer."""
    counts: dict[str, int] = {}
    work = {
        name: lambda name=name, flags=flags: counts.update({name: ask(*flags.split())})
        for name, flags in QUESTIONS.items()
    }
    times = side_by_side(work, budget_s=machine.budget_s, clock=machine.clock)
    return [
        {
            "what": name,
            "rows": counts[name],
            "ms": timing.median * 1e3,
            "spread": timing.spread,
            "rows_per_answer": counts[name] * times["one answer"].over(timing),
        }
        for name, timing in times.items()
    ]


def ask(*flags: str) -> int:
    """Rows that `fomoe project` prints as CSV, its head left out."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(["project", *flags, "--csv"])
    assert status == 0
    return out.getvalue().count("\n") - 1
