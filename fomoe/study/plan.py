"""A study's file: arms x grid x regimes x seeds, each of them one ordinary run (no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.hints import hint
from fomoe.load import build_config
from fomoe.options import IntTuple, Options, Text, TextTuple, option_names, parse_options
from fomoe.overrides import parse_override, set_option
from fomoe.yamlfile import read_yaml

_IS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*").fullmatch
_NAME_RULE = "must be a name of letters, digits and . _ + = - (it names a folder)"


class StudyFile(Options):
    """What stands in a study's file."""

    title: Text | None = None  # null: the name of the file
    question: Text | None = None  # the text under the title, in Markdown
    base: Text | None = None  # an experiment's file, seen from the folder of this one
    config: dict[str, Any] = Field(default_factory=dict)  # options of every run, over `base`
    needs: TextTuple = ()  # options that the command line must give
    seeds: IntTuple = (0, 1, 2)
    control: Text | None = None  # the arm that the others are compared with
    arms: dict[str, Any] = Field(default_factory=dict)  # name -> overrides, and a note
    grid: dict[str, Any] = Field(default_factory=dict)  # option -> values that every arm takes
    regimes: dict[str, Any] = Field(default_factory=dict)  # name -> overrides that every arm takes
    figure: Literal["flops", "bytes"] = "flops"  # merged loss over expert FLOPs, or bytes sent
    results: Text | None = None  # null: docs/results/<name of the file>.jsonl
    runs: Text = "runs/study"  # the folder of all studies' runs


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing that is compared.

    Attributes:
        name: the arm's name, with its point of the grid.
        family: the arm's name in the file.
        control: the arm at the same point of the grid that it is compared with.
    """

    name: str
    family: str
    control: str
    note: str
    overrides: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study.

    Attributes:
        regime: empty where the study has none.
        overrides: what the arm, the regime and the command line set, by dotted name.
        config: the whole experiment; `run.dir` is set.
    """

    study: str
    arm: str
    regime: str
    seed: int
    overrides: dict[str, Any]
    config: Config

    @property
    def label(self) -> str:
        return " ".join(
            [self.study, self.arm, *([self.regime] * bool(self.regime)), self.seed_text]
        )

    @property
    def seed_text(self) -> str:
        return f"seed {self.seed}"

    @property
    def folder(self) -> Path:
        assert self.config.run.dir is not None  # `load_study` sets it
        return Path(self.config.run.dir)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study that has been read and checked.

    Attributes:
        path: its file.
        more: the overrides of the command line.
        runs: every run, all arms of the first seed first, so that an early look compares arms.
        figure: what the figure shows the merged loss over.
        results: the file of results.
    """

    name: str
    path: Path
    more: tuple[str, ...]
    title: str
    question: str
    arms: tuple[Arm, ...]
    regimes: tuple[str, ...]
    runs: tuple[StudyRun, ...]
    figure: Literal["flops", "bytes"]
    results: Path


def load_study(path: str | Path, more: Sequence[str] = ()) -> Study:
    """Read a study's file and build the config of every run.

    Args:
        path: the YAML file.
        more: `section.option=value` for all runs. As in `fomoe compare`, what a method's name sets
            wins over them; options that the study itself sets are refused.

    Raises:
        ConfigError: one line naming the field, the value and the rule that it breaks.
    """
    path = Path(path)
    name = path.name.removesuffix(path.suffix)
    if not _IS_NAME(name):
        raise ConfigError("study", path, _NAME_RULE)
    tree = read_yaml(path)
    try:
        file = parse_options(tree, StudyFile)
        base = _base(file, path)
        arms = _arms(file)
        regimes = {"": {}} if not file.regimes else _sets(file.regimes, "regimes")
        _check_seeds(file.seeds)
    except ConfigError as error:
        raise _within(error, f"{path}:") from None
    extra = _extra(file, arms, regimes, more)
    runs = tuple(
        _run(name, file, arm, regime, seed, base=base, regimes=regimes, extra=extra, path=path)
        for seed, (regime, arm) in product(file.seeds, product(regimes, arms))
    )
    folders = [run.folder for run in runs]
    for run in runs:
        if folders.count(run.folder) > 1:
            raise ConfigError(f"{path}: arms", run.arm, f"has a run with the folder {run.folder}")
    return Study(
        name=name,
        path=path,
        more=tuple(more),
        title=file.title or name,
        question=file.question or "",
        arms=tuple(arms),
        regimes=tuple(regimes),
        runs=runs,
        figure=file.figure,
        results=Path(file.results or Path("docs", "results", f"{name}.jsonl")),
    )


def chosen_runs(
    studies: Sequence[Study], names: Sequence[str] | None, seeds: Sequence[int] | None = None
) -> list[StudyRun]:
    """The runs of some studies, of the named arms or of all.

    Args:
        names: a name in a study's file takes all points of its grid; None: all arms.
        seeds: None: all.

    Raises:
        ConfigError: if a name is no arm, or no study has a seed.
    """
    runs = [run for study in studies for run in study.runs]
    for seed in seeds or ():
        own = sorted({run.seed for run in runs})
        if seed not in own:
            rule = f"is no seed of the study, which has {', '.join(map(str, own))}"
            raise ConfigError("--seeds", seed, rule)
    runs = [run for run in runs if seeds is None or run.seed in seeds]
    if names is None:
        return runs
    arms = [arm for study in studies for arm in study.arms]
    known = sorted({arm.name for arm in arms} | {arm.family for arm in arms})
    for name in names:
        if name not in known:
            raise ConfigError("--only", name, f"is no arm; {hint(name, known)}")
    wanted = {arm.name for arm in arms if {arm.name, arm.family} & set(names)}
    return [run for run in runs if run.arm in wanted]


def _within(error: ConfigError, where: str) -> ConfigError:
    return ConfigError(f"{where} {error.field}", error.value, error.rule)


# -------------------------------------------------------------------------------- parts of the file


def _base(file: StudyFile, path: Path) -> dict[str, Any]:
    """The options that all runs share; those of `config` replace those of `base`."""
    tree = read_yaml(path.parent / file.base) if file.base else {}
    return _laid_over(tree, file.config)


def _laid_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(under)
    for name, value in over.items():
        below = tree.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _laid_over(below, value)
        tree[name] = value
    return tree


def _arms(file: StudyFile) -> list[Arm]:
    if not file.arms:
        raise ConfigError("arms", "", "must name at least one arm")
    if file.control is None:
        raise ConfigError("control", "null", "must name the arm that others are compared with")
    if file.control not in file.arms:
        raise ConfigError("control", file.control, f"is no arm; {hint(file.control, file.arms)}")
    notes, plain = {}, {}
    for name, given in file.arms.items():
        note = given.get("note") if isinstance(given, dict) else None
        if not isinstance(note, str | None):
            raise ConfigError(f"arms.{name}.note", note, "must be text")
        notes[name] = note or ""
        keys = {k: v for k, v in given.items() if k != "note"} if isinstance(given, dict) else given
        plain[name] = keys
    sets = _sets(plain, "arms")
    arms = []
    for point in _grid_points(file.grid):
        suffix = "".join(f"-{option}={_word(value)}" for option, value in point.items())
        for name, overrides in sets.items():
            for option in point:
                if clash := _overlap(option, overrides):
                    raise ConfigError(f"arms.{name}.{clash}", "", f"is set by the grid's {option}")
            arms.append(
                Arm(
                    name=name + suffix,
                    family=name,
                    control=file.control + suffix,
                    note=" ".join(notes[name].split()),
                    overrides=overrides | point,
                )
            )
    return arms


def _grid_points(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    _check_options(grid, "grid")
    for option, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{option}", values, "must be a list of values")
        words = [_word(value) for value in values]
        for value, word in zip(values, words, strict=True):
            if isinstance(value, list | dict) or not _IS_NAME(f"v{word}"):
                rule = "must be a number or a word, as it names a folder; make it an arm"
                raise ConfigError(f"grid.{option}", value, rule)
            if words.count(word) > 1:
                raise ConfigError(f"grid.{option}", value, "stands twice")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _word(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _sets(given: Mapping[str, Any], field: str) -> dict[str, dict[str, Any]]:
    """Named sets of overrides: a mapping of dotted names, or a list of `section.option=value`."""
    sets = {}
    for name, overrides in given.items():
        if not _IS_NAME(name):
            raise ConfigError(field, repr(name), _NAME_RULE)
        where = f"{field}.{name}"
        if isinstance(overrides, list):
            if wrong := [word for word in overrides if not isinstance(word, str)]:
                raise ConfigError(where, wrong[0], "must have the form section.option=value")
            try:
                overrides = dict(parse_override(word, Config) for word in overrides)
            except ConfigError as error:
                raise _within(error, f"{where}:") from None
        elif not isinstance(overrides, dict | None):
            raise ConfigError(where, overrides, "must be a mapping or a list of overrides")
        sets[name] = dict(overrides or {})
        _check_options(sets[name], where)
    return sets


def _check_options(names: Iterable[str], where: str) -> None:
    known = set(option_names(Config))
    for name in names:
        if name in ("seed", "run.dir"):
            raise ConfigError(f"{where}.{name}", "", "is set by the study for every run")
        if name not in known:
            section = next((option for option in known if option.startswith(f"{name}.")), None)
            rule = f"is a section; write {section}" if section else hint(name, known)
            raise ConfigError(f"{where}.{name}", "", rule if section else f"is no option; {rule}")


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if not seeds:
        raise ConfigError("seeds", [], "must list at least one seed")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ConfigError("seeds", seed, "stands twice")


def _extra(
    file: StudyFile,
    arms: Sequence[Arm],
    regimes: Mapping[str, dict[str, Any]],
    more: Sequence[str],
) -> dict[str, Any]:
    """The overrides of the command line; they may not change what the study compares."""
    extra: dict[str, Any] = {}
    taken = {"seed": "the study's seeds", "run.dir": "the study"}
    taken |= {option: f"arm {arm.family}" for arm in arms for option in arm.overrides}
    taken |= {option: f"regime {name}" for name, own in regimes.items() for option in own}
    for word in more:
        field, value = parse_override(word, Config)
        if clash := _overlap(field, taken):
            raise ConfigError(field, value, f"is set by {taken[clash]}")
        extra[field] = value
    for field in file.needs:
        if field not in extra:
            rule = f"must be given after the file, as in {field}=VALUE"
            raise ConfigError(field, "", rule)
    return extra


def _overlap(field: str, others: Iterable[str]) -> str | None:
    """The first of the others that is the same option, or a section of it, or below it."""
    for other in others:
        if f"{other}.".startswith(f"{field}.") or f"{field}.".startswith(f"{other}."):
            return other
    return None


def _run(
    study: str,
    file: StudyFile,
    arm: Arm,
    regime: str,
    seed: int,
    *,
    base: Mapping[str, Any],
    regimes: Mapping[str, dict[str, Any]],
    extra: dict[str, Any],
    path: Path,
) -> StudyRun:
    tree = deepcopy(dict(base))
    explicit: dict[str, Any] = {}
    folder = "-".join([arm.name, *([regime] * bool(regime)), f"seed{seed}"])
    own = {"seed": seed, "run.dir": str(Path(file.runs) / study / folder)}
    try:
        for field, value in (extra | regimes[regime] | own).items():
            set_option(tree, field, deepcopy(value))
        for field, value in arm.overrides.items():
            set_option(tree, field, deepcopy(value))
            set_option(explicit, field, deepcopy(value))
        config = build_config(tree, explicit=explicit)
    except ConfigError as error:
        where = f"{path}: arm {arm.name}" + (f", regime {regime}" if regime else "")
        raise _within(error, f"{where}:") from None
    return StudyRun(
        study=study,
        arm=arm.name,
        regime=regime,
        seed=seed,
        overrides=extra | regimes[regime] | arm.overrides,
        config=config,
    )
