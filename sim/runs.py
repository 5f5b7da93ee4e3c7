"""Rounds of a real run, read from its `metrics.jsonl` and the `metrics.site<k>.jsonl` beside it.

The trainer writes one JSON object per line. Used here are those of kind `round`, one per site:
`round, site, train_s, sync_s, wire_bytes, payload_bytes, local_steps`. A site's `sync_s` includes
its wait for slower sites, so a link shows only where the records of all sites stand side by side.
Damaged lines are left out, and with them the rounds that are then not those of all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_sim.shape import shape_from_config, token_work
from fomoe_sim.traffic import executed_share, table_holdings
from fomoe_sim.trainer import (
    Config,
    ConfigError,
    Lines,
    Placement,
    build_placement,
    counted,
    load,
    read_lines,
)

Say = Callable[[str], None]
NUMBERS = ("round", "site", "train_s", "sync_s", "wire_bytes", "payload_bytes", "local_steps")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round over all sites that reported it.

    Attributes:
        run: folder of the run.
        index: of the round.
        local_steps: steps of the round, H.
        num_syncs: syncs in the round: one, or one per step where gradients are averaged.
        train_s: time of the local steps at the slowest site.
        sync_s: time from there to the end of the sync; the wait for slower sites is not in it.
        wire_bytes, payload_bytes: of the site that sent most.
        step_flops: FLOPs of one step at the site that executes most, from the run's config under
            balanced routing; None without a config.
        missing_sites: sites of the config that left no record of the round here.
        planned_payload_bytes: what the run's config says that site reduces; None without a config.
    """

    run: str
    index: int
    local_steps: int
    num_syncs: int
    train_s: float
    sync_s: float
    wire_bytes: int
    payload_bytes: int
    step_flops: float | None = None
    missing_sites: tuple[int, ...] = ()
    planned_payload_bytes: int | None = None

    @property
    def round_s(self) -> float:
        return self.train_s + self.sync_s


def read_runs(folders: Iterable[str | Path], say: Say = lambda line: None) -> list[Round]:
    """Rounds of several runs, in order.

    Args:
        folders: of the runs.
        say: told of each file with damaged lines, in one line.

    Raises:
        ConfigError: naming the folder, if it holds no rounds to fit a link from.
    """
    names = dict.fromkeys(map(str, folders))
    return [round_ for folder in names for round_ in read_run(folder, say)]


def read_run(folder: str | Path, say: Say = lambda line: None) -> list[Round]:
    """Rounds of one run; a round that was repeated after a resume counts once, as it ran last."""
    folder = Path(folder)
    config_path = folder / "config.yaml"
    config = load(str(config_path)) if config_path.exists() else None
    path = folder / "metrics.jsonl"
    table: dict[int, dict[int, dict[str, Any]]] = {}
    lines = _read(path, say)
    damaged = bool(lines.damaged)
    for record in _round_records(lines, path):
        table.setdefault(int(record["round"]), {})[int(record["site"])] = record
    if not table:
        raise ConfigError(str(path), "", "has no round records")
    if len({site for sites in table.values() for site in sites}) > 1:
        rule = "is a proxy run, whose sites exchange in memory: it shows no link to calibrate"
        raise ConfigError("run", str(folder), rule)
    for path in folder.glob("metrics.site*.jsonl"):
        lines = _read(path, say)
        damaged |= bool(lines.damaged)
        for record in _round_records(lines, path):
            index, site = int(record["round"]), int(record["site"])
            # A longer or larger run that was replaced here may have left its other sites' files.
            if index in table and (config is None or site < config.num_sites):
                table[index][site] = record
    if damaged:
        everyone = {site for sites in table.values() for site in sites}
        table = {index: sites for index, sites in table.items() if sites.keys() == everyone}
        if not table:
            raise ConfigError(str(path.parent), "", "has no round with the records of all sites")
    if not any(record["wire_bytes"] for sites in table.values() for record in sites.values()):
        rule = "sent no bytes between sites: it shows no link to calibrate"
        raise ConfigError("run", str(folder), rule)
    known = None
    if config:
        placement = build_placement(config)
        known = Known(
            payload=dict(enumerate(counted(config).payload)),
            step_flops=most_step_flops(config, placement),
            every_step=config.sync.average == "gradients",
        )
    return [_merge(str(folder), index, table[index], known) for index in sorted(table)]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a run's config alone says of one sync: see `Round`.

    Attributes:
        payload: bytes at every site.
        step_flops: of one step at the site that executes most.
        every_step: whether the sites sync after every step.
    """

    payload: dict[int, int]
    step_flops: float
    every_step: bool


def most_step_flops(config: Config, placement: Placement) -> float:
    """FLOPs of one step at the site that executes most, under balanced routing."""
    shape = shape_from_config(config, "run")
    executed = np.ones(1)
    if config.model.moe_layers and config.router.route_scope == "all":
        residents = table_holdings(shape, placement).residents
        executed = executed_share(shape, residents, config.router.at_least_one)
    work = token_work(shape, config.data.seq_len)
    per_token = work.products + work.scores + work.experts * executed.max()
    return float(config.tokens_per_step * per_token)


def _round_records(lines: Lines, path: Path) -> Iterable[dict[str, Any]]:
    for number, _, record in lines.objects:
        if record.get("kind") == "round":
            _check_record(record, f"{path}:{number}")
            yield record


def _read(path: Path, say: Say) -> Lines:
    try:
        lines = read_lines(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError("run", str(path.parent), "has no metrics.jsonl") from None
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}") from None
    if lines.damaged:
        first, count = lines.damaged[0], len(lines.damaged)
        say(f"{path}: damaged lines left out: {count}, the first is line {first}")
    return lines


def _check_record(record: dict[str, Any], where: str) -> None:
    for name in NUMBERS:
        value = record.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= float(value or 0) < inf:
            raise ConfigError(f"{where} {name}", value, "must be a number of at least 0")
    for name in ("train_s", "sync_s", "local_steps"):
        if record[name] == 0:
            raise ConfigError(f"{where} {name}", 0, "must be above 0")


def _merge(run: str, index: int, sites: dict[int, dict[str, Any]], known: Known | None) -> Round:
    records = list(sites.values())
    local_steps = int(max(record["local_steps"] for record in records))
    train_s = max(record["train_s"] for record in records)
    end_s = max(record["train_s"] + record["sync_s"] for record in records)
    wire_bytes = int(max(record["wire_bytes"] for record in records))
    num_syncs = local_steps if known and known.every_step else 1
    missing = tuple(s for s in known.payload if s not in sites) if known else ()
    planned = num_syncs * max(known.payload.get(s, 0) for s in sites) if known else None
    return Round(
        run=run,
        index=index,
        local_steps=local_steps,
        num_syncs=num_syncs,
        train_s=train_s,
        sync_s=end_s - train_s,
        wire_bytes=wire_bytes,
        payload_bytes=int(max(record["payload_bytes"] for record in records)),
        step_flops=known.step_flops if known else None,
        missing_sites=missing,
        planned_payload_bytes=planned,
    )
