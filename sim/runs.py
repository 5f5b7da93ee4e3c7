"""Rounds of a real run, read from its `metrics.jsonl` and the `metrics.site<k>.jsonl` beside it.

The trainer writes one JSON object per line. Used here are those of kind `round`, one per site:
`round, site, train_s, sync_s, wire_bytes, payload_bytes, local_steps`. A site's `sync_s` includes
its wait for slower sites, so a link shows only where the records of all sites stand side by side.
Damaged lines are left out, and with them the rounds that are then not those of all sites. What a
step executes and a sync reduces comes from the run's `config.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    build_placement,
    load,
    plan_run,
    read_lines,
    say_line,
)

NUMBERS = ("round", "site", "train_s", "sync_s", "wire_bytes", "payload_bytes", "local_steps")
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round over all sites that reported it.

    Attributes:
        run: folder of the run.
        index: of the round.
        local_steps: steps of the round, H.
        num_syncs: syncs in the round: one per fragment (more in the run's last round), or one per
            step where gradients are averaged.
        train_s: time of the local steps at the slowest site.
        sync_s: time from there to the end of the sync; the wait for slower sites is not in it.
        wire_bytes, payload_bytes: of the site that sent most.
        step_flops: FLOPs of one step at the site that executes most, under balanced routing.
        planned_payload_bytes: what the run's config says that site reduces.
        missing_sites: sites of the config that left no record of the round here.
    """

    run: str
    index: int
    local_steps: int
    num_syncs: int = 1
    train_s: float
    sync_s: float
    wire_bytes: int
    payload_bytes: int
    step_flops: float
    planned_payload_bytes: int
    missing_sites: tuple[int, ...] = ()

    @property
    def round_s(self) -> float:
        return self.train_s + self.sync_s


def read_runs(folders: Iterable[str | Path]) -> list[Round]:
    """Rounds of several runs, in order.

    Raises:
        ConfigError: naming the folder, if it holds no rounds to fit a link from.
    """
    return [one for folder in dict.fromkeys(map(str, folders)) for one in read_run(folder)]


def read_run(folder: str | Path) -> list[Round]:
    """Rounds of one run; a round that was repeated after a resume counts once, as it ran last."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    records, damaged = _read(path)
    table: dict[int, dict[int, Record]] = {}
    for record in records:
        table.setdefault(int(record["round"]), {})[int(record["site"])] = record
    if not table:
        raise ConfigError(str(path), "", "has no round records")
    if len({site for sites in table.values() for site in sites}) > 1:
        rule = "is a proxy run, whose sites exchange in memory: it shows no link to calibrate"
        raise ConfigError("run", folder, rule)
    config = load(str(folder / "config.yaml"))
    if config.sync.overlap_steps:
        rule = "hides the syncs of this run behind local steps: it shows no link to calibrate"
        raise ConfigError(f"{folder} sync.overlap_steps", config.sync.overlap_steps, rule)
    for other in folder.glob("metrics.site*.jsonl"):
        records, torn = _read(other)
        damaged |= torn
        for record in records:
            index, site = int(record["round"]), int(record["site"])
            # A longer or larger run that was replaced here may have left its other sites' files.
            if index in table and site < config.num_sites:
                table[index][site] = record
    if damaged:
        everyone = {site for sites in table.values() for site in sites}
        table = {index: sites for index, sites in table.items() if sites.keys() == everyone}
        if not table:
            raise ConfigError(str(folder), "", "has no round with the records of all sites")
    if not any(record["wire_bytes"] for sites in table.values() for record in sites.values()):
        raise ConfigError(
            "run", str(folder), "sent no bytes between sites: it shows no link to calibrate"
        )
    return list(_rounds(str(folder), table, config))


def _rounds(run: str, table: dict[int, dict[int, Record]], config: Config) -> Iterator[Round]:
    """One round over its sites' records, in order."""
    plan = plan_run(config)
    payload = [traffic.payload for traffic in plan.traffic]
    added = [plan.added_at_end(site)[0] for site in range(len(payload))]
    flops = most_step_flops(config)
    for index, sites in sorted(table.items()):
        records = list(sites.values())
        local_steps = int(max(record["local_steps"] for record in records))
        train_s = max(record["train_s"] for record in records)
        end_s = max(record["train_s"] + record["sync_s"] for record in records)
        every = config.sync.average == "gradients"
        num_syncs = local_steps if every else config.sync.fragments
        planned = {s: payload[s] * (num_syncs if every else 1) for s in sites if s < len(payload)}
        if index + 1 == config.rounds:
            num_syncs += plan.syncs_at_end
            planned = {site: number + added[site] for site, number in planned.items()}
        yield Round(
            run=run,
            index=index,
            local_steps=local_steps,
            num_syncs=num_syncs,
            train_s=train_s,
            sync_s=end_s - train_s,
            wire_bytes=int(max(record["wire_bytes"] for record in records)),
            payload_bytes=int(max(record["payload_bytes"] for record in records)),
            step_flops=flops,
            planned_payload_bytes=max(planned.values()),
            missing_sites=tuple(s for s in range(len(payload)) if s not in sites),
        )


def most_step_flops(config: Config) -> float:
    """FLOPs of one step at the site that executes most, under balanced routing."""
    shape = shape_from_config(config, "run")
    executed = np.ones(1)
    if config.model.moe_layers and config.router.route_scope == "all":
        residents = table_holdings(shape, build_placement(config)).residents
        executed = executed_share(shape, residents, config.router.at_least_one)
    work = token_work(shape, config.data.seq_len)
    per_token = work.products + work.scores + work.experts * executed
    return float((np.array(config.tokens_per_step) * per_token).max())


def _read(path: Path) -> tuple[list[Record], bool]:
    """Round records of a file, each checked, and whether lines of it are damaged."""
    try:
        lines = read_lines(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError("run", path.parent, "has no metrics.jsonl") from None
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}") from None
    if lines.damaged:
        first, count = lines.damaged[0], len(lines.damaged)
        say_line(f"{path}: damaged lines left out: {count}, the first is line {first}")
    found = []
    for number, _, record in lines.objects:
        if record.get("kind") == "round":
            _check_record(record, f"{path}:{number}")
            found.append(record)
    return found, bool(lines.damaged)


def _check_record(record: Record, where: str) -> None:
    for name in NUMBERS:
        value = record.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= float(value or 0) < inf:
            raise ConfigError(f"{where} {name}", value, "must be a number of at least 0")
    for name in ("train_s", "sync_s", "local_steps"):
        if record[name] == 0:
            raise ConfigError(f"{where} {name}", 0, "must be above 0")
