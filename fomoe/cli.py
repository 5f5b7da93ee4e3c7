"""The command line: the commands of training, and those of the cost model.

Heavy imports wait until they are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fomoe import __version__, finished
from fomoe.errors import ConfigError, FomoeError, say_line
from fomoe.hints import hint
from fomoe.launch import (
    Launch,
    check_ranks_per_site,
    divide_rank,
    launch_from_environment,
    launch_of_site,
    site_label,
)
from fomoe.study.command import add_study
from fomoe.sync.waiting import is_blocked

_EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Prints a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        message = message.replace(", section.option=value", "")  # argparse lists optional ones too
        self.exit(_EXIT_USAGE, f"fomoe: error: {message} (see {self.prog} --help)\n")


def run() -> NoReturn:
    """The entry point of the `fomoe` program: run `main` and end the process."""
    status = main()
    if status == _EXIT_INTERRUPTED or is_blocked():
        # Shutting torch down takes seconds on a busy machine, and hangs if a call is blocked.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (failed), 2 (wrong input) or 130 (interrupted)."""
    # torch's C++ side prints stack traces of refused connections; our own line is clearer.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    words = sys.argv[1:] if argv is None else list(argv)
    label = site_label
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        parser = build_parser(next((word for word in words if not word.startswith("-")), None))
        args, rest = parser.parse_known_args(words)
        label = partial(
            site_label, getattr(args, "ranks_per_site", (1,)), getattr(args, "site", None)
        )
        _take_overrides(args, rest)
        return args.run(args)
    except ConfigError as error:
        return _fail(error, _EXIT_USAGE, label)
    except FomoeError as error:
        return _fail(error, _EXIT_FAILED, label)
    except BrokenPipeError:
        # The reader of our output has ended, as `head` does; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", _EXIT_FAILED, label)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(f"out of memory: {error}", _EXIT_FAILED, label)
    except KeyboardInterrupt:
        text = "interrupted; checkpoints are kept, --resume continues"
        return _fail(text, _EXIT_INTERRUPTED, label)


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; `chosen` is the command that will run, whose flags it must have."""
    parser = _Parser(
        prog="fomoe",
        description="Pre-train one Mixture-of-Experts model across sites that each hold only some "
        "experts.",
    )
    parser.add_argument("--version", action="version", version=f"fomoe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_train(commands)
    _add_compare(commands)
    _add_merge(commands)
    add_study(commands)
    _add_report(commands)
    _add_options(commands)
    finished.add_commands(commands)
    # By name: the cost model imports from this package, not the other way round.
    import_module("fomoe_sim.cli").add_commands(commands, chosen)
    if chosen is not None and chosen not in commands.choices:
        parser.error(f"{chosen} is not a command; {hint(chosen, commands.choices)}")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="the experiment's YAML file, or the name of one that comes with the package",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.option=value",
        help="options to change; 'fomoe options' lists them all",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--overwrite",
        dest="mode",
        action="store_const",
        const="overwrite",
        default="new",
        help="replace a run that is in run.dir",
    )
    group.add_argument(
        "--next-free",
        dest="mode",
        action="store_const",
        const="next-free",
        help="use run.dir-2, -3, ... if a run is in run.dir",
    )
    group.add_argument(
        "--resume",
        dest="mode",
        action="store_const",
        const="resume",
        help="continue run.dir from the newest checkpoint that all sites can use; start at round 0 "
        "only where there is none to lose",
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train; under torchrun, one site per rank")
    _add_config(parser)
    parser.add_argument(
        "--ranks-per-site",
        type=_ranks,
        default=(1,),
        metavar="N[,N...]",
        help="processes of every site, or of each, under one torchrun over all of them (default "
        "1); inner.parallel says how they share the work",
    )
    parser.add_argument(
        "--site",
        type=int,
        metavar="K",
        help="this process is of site K, which has a torchrun of its own, or one process; with "
        "--meet (launch/site.sh gives both)",
    )
    parser.add_argument(
        "--meet", metavar="ADDRESS[:PORT]", help="where the sites join: an address of site 0"
    )
    parser.add_argument(
        "--resume-round",
        type=int,
        metavar="N",
        help="go back: continue from the checkpoint of round N and no other; those of later rounds "
        "are removed once every site has loaded it",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print who holds what and what it costs, and stop"
    )
    parser.add_argument("--json", action="store_true", help="print the (planned) summary as JSON")
    parser.add_argument("--interface", help="network interface between sites, such as eth0")
    parser.set_defaults(run=_train)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="run several methods on the same text")
    _add_config(parser)
    parser.add_argument(
        "--methods",
        required=True,
        metavar="NAME,NAME",
        help="such as ddp,diloco,fomoe; of adapters fedit "
        "and zero-pad stand for their two variants",
    )
    parser.add_argument(
        "--seeds", metavar="N,N", help="run every method with each seed; the table shows the spread"
    )
    parser.add_argument("--report", metavar="FILE", help="also write the page of 'fomoe report'")
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON")
    parser.set_defaults(run=_compare)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="draw runs into one self-contained HTML page")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument("--out", default="report.html", help="the page (default: report.html)")
    parser.add_argument("--figures", metavar="FOLDER", help="also write each figure as PNG and PDF")
    parser.set_defaults(run=_report)


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="write the whole model of a run's checkpoint")
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder")
    parser.add_argument("--round", type=int, help="rounds done (default: the newest complete)")
    parser.add_argument("--out", help="folder to write (default: RUN/merged)")
    parser.set_defaults(run=_merge)


def _add_options(commands: Any) -> None:
    parser = commands.add_parser("options", help="list the options of an experiment")
    parser.add_argument("section", nargs="?", default="", help="a section or an option")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print them as JSON")
    group.add_argument(
        "--write", metavar="FOLDER", help="write options.md and options.schema.json (all options)"
    )
    parser.set_defaults(run=_options)


# --------------------------------------------------------------------------------------- commands


def _train(args: argparse.Namespace) -> int:
    if args.resume_round is not None:
        if args.mode not in ("new", "resume"):
            rule = f"continues a run; it cannot be combined with --{args.mode}"
            raise ConfigError("--resume-round", args.resume_round, rule)
        if args.resume_round < 1:
            raise ConfigError("--resume-round", args.resume_round, "must be at least 1")
        args.mode = "resume"
    config = load(args.config, args.overrides)
    if args.dry_run:
        from fomoe.planning import plan_run, planned_summary, ranks_by_site
        from fomoe.ready import check_ready
        from fomoe.rules import check_ranks

        check_ranks_per_site(args.ranks_per_site, config.num_sites)
        ranks = ranks_by_site(config, args.ranks_per_site)
        for site, number in enumerate(ranks):
            check_ranks(config, number, site)
        check_ready(config, site=_launched_site(ranks))
        run = plan_run(config, ranks)
        if args.json:
            print(json.dumps(planned_summary(run)))
        else:
            from fomoe.report import print_dry_run

            print_dry_run(run)
        return 0
    launch = _launch_of(args, config.num_sites)
    from fomoe.training import train

    summary = train(
        config,
        mode=args.mode,
        resume_round=args.resume_round,
        device=args.device,
        interface=args.interface,
        launch=launch,
    )
    if launch.first:
        if args.json:
            print(json.dumps(summary))
        else:
            from fomoe.report import print_summary

            print_summary(summary, config)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from fomoe import comparison

    launch = _launch()
    if launch.distributed:
        rule = "must be 1 for compare, which trains all sites of a method in one process"
        raise ConfigError("WORLD_SIZE", launch.num_sites, rule)
    methods = comparison.read_methods(args.methods)
    seeds = comparison.read_seeds(args.seeds) if args.seeds is not None else []
    configs = comparison.settings(
        lambda method: load(args.config, args.overrides, method=method, suffix="-compare"),
        methods,
        seeds,
    )
    if args.report:
        _check_report(args.report)
    summaries = comparison.compare(configs, mode=args.mode, device=args.device, launch=launch)
    folders = [Path(summary["run_dir"]) for summary in summaries]
    if args.json:
        print(json.dumps(summaries))
    else:
        from fomoe.report import print_comparison

        print_comparison(summaries)
    if args.report:
        from fomoe.reportpage import write_report

        say_line(f"report: {write_report(folders, Path(args.report))[0]}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from fomoe.reportpage import write_report

    _check_report(args.out)
    images = Path(args.figures) if args.figures else None
    for path in write_report([Path(run) for run in args.runs], Path(args.out), images=images):
        print(path)
    return 0


def _check_report(out: str) -> None:
    """Refuse a page that could not be written, before anything is computed for it."""
    from fomoe.figures import need_matplotlib

    need_matplotlib("a report")
    if Path(out).is_dir():
        raise ConfigError("report", Path(out), "is a folder; name a file")
    if not Path(out).parent.is_dir():
        raise ConfigError(
            "report", Path(out), f"cannot be written: there is no folder {Path(out).parent}"
        )


def _merge(args: argparse.Namespace) -> int:
    from fomoe.merging import merge

    out = Path(args.out) if args.out else None
    path = merge(
        Path(args.run_dir),
        round_idx=args.round,
        out=out,
        say=say_line,
    )
    print(path)
    return 0


def _options(args: argparse.Namespace) -> int:
    from fomoe import catalogue

    if args.write is not None:
        if args.section:
            raise ConfigError("section", args.section, "cannot stand beside --write")
        for path in catalogue.write(Path(args.write)):
            print(path)
        return 0
    listed = catalogue.options(args.section)
    if args.json:
        print(catalogue.as_json(listed))
    else:
        catalogue.print_options(listed)
    return 0


# ---------------------------------------------------------------------------------------- helpers


def load(
    path: str, overrides: Sequence[str], *, method: str | None = None, suffix: str = ""
) -> Any:
    """Load a config; without `run.dir` the run goes to `runs/<name of the file><suffix>`."""
    from fomoe.load import load_config

    config = load_config(path, list(overrides), method=method)
    run_dir = config.run.dir or str(Path("runs") / f"{Path(path).stem}{suffix}")
    # Sources keep their `~`: sites may have different homes, but must have equal configs.
    at_home = os.path.expanduser(run_dir)
    if at_home.startswith("~"):
        raise ConfigError("run.dir", run_dir, "names a home that is not known (./~ is a folder ~)")
    if any("\ud800" <= letter <= "\udfff" for letter in at_home):
        raise ConfigError("run.dir", run_dir, "must be UTF-8: records and other sites name it")
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": at_home})})


def _ranks(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        rule = "must be a number of processes, or one for each site with commas between"
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return tuple(map(int, text.split(",")))


def _launched_site(ranks: Sequence[int]) -> int | None:
    """The site that this process would run; None in a proxy run.

    Args:
        ranks: of every site, how many it has.
    """
    rank = os.environ.get("RANK", "")
    site = divide_rank(int(rank), ranks)[0] if rank.isdecimal() else len(ranks)
    return site if site < len(ranks) else None


def _launch(num_sites: int | None = None, ranks: Sequence[int] = (1,)) -> Launch:
    """Read and check the launch environment; a warning is printed."""
    launch = launch_from_environment(num_sites=num_sites, ranks=ranks)
    if launch.warning:
        say_line(f"fomoe: warning: {launch.warning}")
    return launch


def _launch_of(args: argparse.Namespace, num_sites: int) -> Launch:
    """The launch that the arguments and the environment describe."""
    if (args.site is None) != (args.meet is None):
        name, other = ("--site", "--meet") if args.meet is None else ("--meet", "--site")
        raise ConfigError(name, getattr(args, name[2:]), f"needs {other}")
    if args.site is None:
        return _launch(num_sites, args.ranks_per_site)
    if args.ranks_per_site != (1,):
        rule = "is for one torchrun over all sites; with --site, torchrun's own number counts"
        raise ConfigError("--ranks-per-site", ",".join(map(str, args.ranks_per_site)), rule)
    return launch_of_site(args.site, args.meet, num_sites=num_sites)


def _take_overrides(args: argparse.Namespace, rest: list[str]) -> None:
    """argparse does not accept overrides after a flag; they are added here."""
    for word in rest:
        if word.startswith("-") or "=" not in word or not hasattr(args, "overrides"):
            raise ConfigError("argument", word, "is not known (see --help)")
        args.overrides.append(word)


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises a plain RuntimeError where the CPU's allocator fails."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: object, status: int, label: Callable[[], str]) -> int:
    line = re.sub(r"\s*[\r\n]\s*", " ", str(message).strip())  # names keep their spaces
    say_line(f"fomoe: error{label()}: {line}")
    return status
