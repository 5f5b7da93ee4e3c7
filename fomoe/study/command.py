"""The command `fomoe study`: what its words mean; the work is imported when it is needed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fomoe.errors import ConfigError, say_line
from fomoe.launch import launch_from_environment

_EXIT_FAILED, _EXIT_INTERRUPTED = 1, 130


def add_study(commands: Any) -> None:
    """Register the command; it sets `run`, called with the arguments."""
    parser = commands.add_parser(
        "study", help="run arms x seeds of a study's file, and write tables of their results"
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="STUDY.yaml",
        help="files of studies, and options of all their runs as section.option=value",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--cores", metavar="N,N", help="one run at a time on each of these cores, bound to it"
    )
    group.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--only", metavar="ARM,ARM", help="only these arms")
    parser.add_argument("--seeds", metavar="N,N", help="only these of the studies' seeds")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace runs of another config in the folders"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print the runs and what they cost, and stop"
    )
    what.add_argument(
        "--report", metavar="OUT.md", help="write tables of the results so far, and run nothing"
    )
    parser.set_defaults(run=_study, overrides=[])


def _study(args: argparse.Namespace) -> int:
    from fomoe.comparison import read_seeds
    from fomoe.study.plan import chosen_runs, load_study

    if launch_from_environment().distributed:
        rule = "sets up a distributed run; a study starts the processes of its runs itself"
        raise ConfigError("WORLD_SIZE", os.environ["WORLD_SIZE"], rule)
    files = [word for word in args.words if _is_file(word)]
    more = [word for word in args.words if not _is_file(word)] + args.overrides
    if not files:
        raise ConfigError("study", args.words[0], "is an override; a study's file must be named")
    slots = _slots(args.cores, args.jobs)
    studies = [load_study(file, more) for file in files]
    names = [study.name for study in studies]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("study", name, "stands twice")
    if args.report is not None:
        from fomoe.study.page import write_page

        write_page(Path(args.report), studies)
        print(args.report)
        return 0
    runs = chosen_runs(
        studies,
        None if args.only is None else args.only.split(","),
        None if args.seeds is None else read_seeds(args.seeds),
    )
    from fomoe.ready import check_ready

    for run in runs:
        check_ready(run.config)
    from fomoe.study.work import work_through

    if args.dry_run:
        from fomoe.study.preview import print_plan

        print_plan(studies, runs)
        return 0
    try:
        failed = work_through(
            studies, runs, slots=slots, device=args.device, overwrite=args.overwrite
        )
    except KeyboardInterrupt:
        say_line("fomoe: error: interrupted; the same command goes on from the checkpoints")
        return _EXIT_INTERRUPTED
    if failed:
        say_line(
            f"fomoe: error: {len(failed)} of {len(runs)} runs failed; the same command retries"
        )
    return _EXIT_FAILED if failed else 0


def _is_file(word: str) -> bool:
    return "=" not in word or word.endswith((".yaml", ".yml"))


def _slots(cores: str | None, jobs: int | None) -> list[int | None]:
    """One entry per run at a time: the core that it is bound to, or None."""
    if cores is None:
        if jobs is not None and jobs < 1:
            raise ConfigError("--jobs", jobs, "must be at least 1")
        return [None] * (jobs or 1)
    found: list[int | None] = []
    here = os.sched_getaffinity(0)
    for word in cores.split(","):
        if not word.isdecimal() or int(word) not in here:
            rule = f"is no core that this process may use: {', '.join(map(str, sorted(here)))}"
            raise ConfigError("--cores", word, rule)
        if int(word) in found:
            raise ConfigError("--cores", word, "stands twice")
        found.append(int(word))
    return found
