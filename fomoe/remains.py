"""What is left of a run at every site, and whether a resume may continue from it.

The check writes nothing and comes before anything is made, so a resume that is refused leaves every
byte as it was. A run that exists but cannot be used is not the same as none: training starts at
round 0 only if nothing can be lost by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fomoe import checkpoint
from fomoe.config import Config
from fomoe.errors import CheckpointError, ConfigError
from fomoe.metrics import metrics_path
from fomoe.overrides import flatten
from fomoe.sync.exchange import agreed, gather
from fomoe.sync.transport import Transport
from fomoe.yamlfile import read_yaml

_MAY_CHANGE = ("rounds", "inner.schedule_steps", "inner.parallel")  # beside run.*
WAYS_OUT = "--overwrite replaces the run, --next-free takes a new folder"


# ------------------------------------------------------------------------------ what is left of it


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What one site finds of a run in its folder.

    Attributes:
        folder: the site's run folder.
        rounds: rounds for which any file of its part exists, newest first.
        finished: those of them that were saved to the end (they have a manifest).
        same: whether anything readable belongs to the present experiment.
        differs: how the saved experiment differs, if nothing readable belongs to this one.
        has_records: whether there is a file of records.
        recorded: rounds in that file; read only if the site has fewer than two checkpoints.
        first_due: the round of the first checkpoint, by the run's config.yaml; 0 without one.
        ended: whether the run has ended.
        trace: whether there is anything of a run.
    """

    folder: str
    rounds: list[int]
    finished: list[int]
    same: bool
    differs: str
    has_records: bool
    recorded: int
    first_due: int
    ended: bool
    trace: bool


def look(
    run_dir: Path,
    config: Config,
    transport: Transport,
    fingerprints: dict[str, str] | None = None,
) -> dict[int, Remains]:
    """What every site finds of a run, by site; the same at all sites.

    Args:
        fingerprints: of the present data; None: not known yet, and not compared.

    Raises:
        CheckpointError: if a site's folder cannot be read.
    """

    def look_here() -> dict[int, Remains]:
        # Read once: the sites of a proxy run share one folder.
        if run_dir.exists() and not run_dir.is_dir():
            raise CheckpointError(f"run.dir {run_dir} is a file, not a folder")
        saved, recorded = _read_config_yaml(run_dir / "config.yaml"), dict[Path, int]()
        return {
            site: _look(run_dir, config, site, fingerprints, saved, recorded)
            for site in transport.sites
        }

    own = agreed(transport, look_here)
    messages = gather(transport, lambda site: json.dumps(asdict(own[site])).encode())
    found = (Remains(**json.loads(message)) for message in messages)
    return dict(zip(transport.members, found, strict=True))


def _look(
    run_dir: Path,
    config: Config,
    site: int,
    fingerprints: dict[str, str] | None,
    saved: dict[str, Any] | None,
    recorded: dict[Path, int],
) -> Remains:
    saved_rounds = checkpoint.saved_rounds(run_dir)
    rounds = [r for r in saved_rounds if checkpoint.has_part(run_dir, r, site)]
    differing = []
    for round_idx in rounds:
        try:
            values = checkpoint.read_values(run_dir, round_idx, site)
        except CheckpointError:
            continue
        differing.append(differences(values, config, fingerprints))
    if not differing and saved is not None:
        differing.append(differences({"config": saved}, config, None))
    # A distributed run keeps one file of records per site, a proxy run one for all.
    files = [p for p in {metrics_path(run_dir, site), metrics_path(run_dir, 0)} if p.exists()]
    if len(rounds) < 2:  # with two, one was whole once, and records do not matter
        recorded |= {path: _recorded_rounds(path) for path in files if path not in recorded}
    own = [run_dir / name for name in ("config.yaml", "summary.json")]
    return Remains(
        folder=str(run_dir),
        rounds=rounds,
        finished=[r for r in rounds if checkpoint.has_manifest(run_dir, r, site)],
        same="" in differing,
        differs="" if "" in differing or not differing else differing[0],
        has_records=bool(files),
        recorded=max((recorded.get(path, 0) for path in files), default=0),
        first_due=_first_due(saved) if saved is not None else 0,
        ended=own[1].exists(),
        trace=bool(rounds or files or any(path.exists() for path in own)),
    )


def _read_config_yaml(path: Path) -> dict[str, Any] | None:
    """The options of a run's config.yaml, or None if there is none that can be read."""
    try:
        return read_yaml(path) or None
    except (ConfigError, RecursionError):
        return None


def _recorded_rounds(path: Path) -> int:
    """One more than the newest round of a file of records; damaged lines are skipped."""
    newest = 0
    with path.open("rb") as file:
        for line in file:
            try:
                newest = max(newest, int(json.loads(line)["round"]) + 1)
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
                continue
    return newest


def _first_due(saved: dict[str, Any]) -> int:
    config = parse_saved(saved)
    if config is None:
        return 0
    return min(config.run.checkpoint_every or config.rounds, config.rounds)


def parse_saved(tree: dict[str, Any]) -> Config | None:
    """A saved config, with defaults for options that it lacks; None if it is damaged."""
    try:
        return Config.model_validate(tree)
    except (ValidationError, RecursionError):
        return None


def differences(values: dict[str, Any], config: Config, fingerprints: dict[str, str] | None) -> str:
    """How a saved experiment differs from the present one, in one line; empty if it does not.

    Args:
        values: the small values of a checkpoint's part: `config`, and `fingerprints` of the data.
        fingerprints: of the present data; None: not compared.
    """
    parsed = parse_saved(values["config"])
    try:
        saved = flatten(parsed.model_dump(mode="json") if parsed else values["config"])
    except RecursionError:
        return "its config is not readable"
    now = flatten(config.model_dump(mode="json"))
    differ = [
        f"{name} (was {_short(saved.get(name))}, now {_short(now.get(name))})"
        for name in {**now, **saved}
        if saved.get(name) != now.get(name)
        and name not in _MAY_CHANGE
        and not name.startswith("run.")
    ]
    if fingerprints is not None:
        kept = values.get("fingerprints")
        kept = kept if isinstance(kept, dict) else {}
        differ += [name for name, own in fingerprints.items() if kept.get(name) != own]
    more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
    return ", ".join(differ[:6]) + more


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


# ------------------------------------------------------------------------------------ may it start


@dataclass(frozen=True)
class Choice:
    """Rounds to try, newest first; if none, `because` says why to start at round 0."""

    rounds: list[int] = field(default_factory=list)
    because: str = ""


def check_resumable(config: Config, transport: Transport, asked: int | None) -> None:
    """Refuse a run that cannot be continued, before anything is made, built or written.

    Args:
        asked: the round that `--resume-round` names, or None.

    Raises:
        CheckpointError: at every site, naming what is missing or differs at which site.
    """
    assert config.run.dir is not None  # the command line gives one
    choose_rounds(look(Path(config.run.dir), config, transport), asked)


def choose_rounds(remains: dict[int, Remains], asked: int | None) -> Choice:
    """The rounds to try, or the reason to start at round 0.

    Raises:
        CheckpointError: naming what is missing or differs at which site.
    """
    folder = next(iter(remains.values())).folder
    other = {site: own.differs for site, own in remains.items() if own.differs}
    if other:
        raise CheckpointError(
            f"run.dir {folder} is of another experiment: {by_site(other)}; only "
            f"{', '.join(_MAY_CHANGE)} and run.* may change on --resume; {WAYS_OUT}"
        )
    rounds = sorted({r for own in remains.values() for r in own.rounds}, reverse=True)
    if asked is not None:
        if asked not in rounds:
            others = f"only {_list(rounds)}" if rounds else "none at all"
            raise CheckpointError(f"{folder} has no checkpoint of round {asked}, {others}")
        return Choice([asked])
    if not any(own.trace for own in remains.values()):
        return Choice(because=f"{folder} holds no run; starting at round 0")
    because = _nothing_to_lose(remains)
    if because:
        return Choice(because=f"{folder}: {because}; starting at round 0")
    if not any(all(r in own.rounds for own in remains.values()) for r in rounds):
        held = {site: _held(own, folder) for site, own in remains.items()}
        missing = "no site holds a checkpoint" if not rounds else "no checkpoint is at all sites"
        raise CheckpointError(
            f"run.dir {folder} holds a run that cannot be resumed: {missing}: {by_site(held)}; "
            f"{WAYS_OUT}"
        )
    return Choice(rounds)


def _nothing_to_lose(remains: dict[int, Remains]) -> str:
    """Why a run of this very experiment can start again; empty if its checkpoints are missing.

    A run that was stopped before or while its first checkpoint was saved has no round to go back
    to. Its config says when that checkpoint was due, and its records that it ran no further.
    """
    sites = list(remains.values())
    first = max(own.first_due for own in sites)
    recorded = max(own.recorded for own in sites)
    if not first or not any(own.same for own in sites) or any(own.ended for own in sites):
        return ""
    if recorded > first:
        return ""
    if not any(own.rounds for own in sites):
        return "the run was stopped before its first checkpoint"
    cut = all(
        set(own.rounds) <= {first} and own.has_records and own.recorded >= first - 1
        for own in sites
    )
    if cut and not all(own.finished for own in sites):
        return "the run was stopped while its first checkpoint was saved"
    return ""


def _held(own: Remains, folder: str) -> str:
    where = "" if own.folder == folder else f" in {own.folder}"
    if own.rounds:
        return f"has rounds {_list(own.rounds)}{where}"
    if own.trace:
        ended = " of a run that has ended" if own.ended else f" of {own.recorded} rounds"
        return f"has records{ended if own.has_records or own.ended else ''}, no checkpoint{where}"
    return f"nothing of a run is in {own.folder}"


def by_site(texts: dict[int, str]) -> str:
    """`site 0: ...; sites 1, 2: ...`, equal texts once."""
    sites: dict[str, list[int]] = {}
    for site, text in texts.items():
        sites.setdefault(text, []).append(site)
    lines = [f"site{'s' * (len(own) > 1)} {_list(own)}: {text}" for text, own in sites.items()]
    more = sum(map(len, list(sites.values())[4:]))
    return "; ".join(lines[:4]) + (f"; and {more} more sites" if more else "")


def _list(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + more
