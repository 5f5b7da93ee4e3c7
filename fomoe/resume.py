"""Saving a round, and continuing from the newest round that every site can use.

Each site checks its whole part before any state is changed, and the sites agree: a round is loaded
at all of them or at none. A newer round that is refused is reported, with the sites and reasons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe import checkpoint
from fomoe.config import Config
from fomoe.copies import coupling
from fomoe.errors import CheckpointError, ConfigError, say_line
from fomoe.fragments import streams
from fomoe.ranks import Ranks
from fomoe.remains import WAYS_OUT, by_site, choose_rounds, differences, look, parse_saved
from fomoe.run import Run
from fomoe.segments import Bucket
from fomoe.site import Site, learning_rate
from fomoe.state import RANKED, Layout, entry, misfit, not_finite, of_kind
from fomoe.summary import Totals
from fomoe.sync.exchange import agreed, check_sites, gather
from fomoe.sync.replicas import replica_hashes
from fomoe.sync.transport import Transport

_MOST = 2**63  # no count in a checkpoint reaches it


def resume(run: Run, asked: int | None, *, show: bool) -> None:
    """Load the newest round that all sites can use, or start at round 0 where nothing is lost.

    Args:
        asked: take this round and no other.
        show: print why this process's parts of newer rounds are refused.

    Raises:
        CheckpointError: at every site, if a run is there and cannot be continued.
    """
    config, fingerprints = run.config, run.data.fingerprints
    # The folder is locked and the data is known; what was found before the lock may have changed.
    remains = look(run.run_dir, config, run.transport, fingerprints)
    choice = choose_rounds(remains, asked)
    if choice.because:
        run.progress.say(choice.because)
        agreed(run.transport, lambda: remove_newer(run.run_dir, 0, _own_parts(run)))
        return
    agreed(run.transport, lambda: refuse_moved_parting(run, choice.rounds))

    def replicas(round_idx: int) -> Sequence[Bucket]:
        checked = config.sync.verify_replicas
        return run.plan.replicas(round_idx * config.local_steps) if checked else ()

    found = find_round(
        choice.rounds,
        run.run_dir,
        config,
        run.transport,
        fingerprints=fingerprints,
        expected={site: expected_state(run, site) for site in run.sites},
        replicas=replicas,
    )
    if found.round_idx > config.rounds:
        rule = f"is below the {found.round_idx} rounds that {run.run_dir} has done"
        raise ConfigError("rounds", config.rounds, rule)
    values = agreed(run.transport, lambda: load_round(run, found.round_idx))
    run.first_round = found.round_idx
    for line in refusals(found, run.transport):
        # Site 0 reports on all sites; every other process reports on its own to its own user.
        if run.transport.members[0] in run.transport.sites:
            run.progress.say(line)
        elif show:
            say_line(line)
    if change := horizon_change(values, config):
        run.progress.say(change)
    agreed(run.transport, lambda: remove_newer(run.run_dir, found.round_idx, _own_parts(run)))
    run.progress.resumed(found.round_idx)


def _own_parts(run: Run) -> Iterable[int]:
    """The sites whose parts this process removes: a site's first rank does it for all ranks."""
    return run.sites if run.transport.inside.rank == 0 else ()


def starts_anew(
    run_dir: Path,
    config: Config,
    fingerprints: dict[str, str],
    transport: Transport,
    asked: int | None,
) -> bool:
    """Whether a resume will start at round 0; the folder must be locked.

    Raises:
        CheckpointError: at every site, if a run is there and cannot be continued.
    """
    remains = look(run_dir, config, transport, fingerprints)
    return not choose_rounds(remains, asked).rounds


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one site's part must hold.

    Attributes:
        tensors, optional: tensors that must, and may, be there.
        steps_per_round: inner steps of a round.
        num_ranks: of every site.
        stream: the keys of the data stream's position.
    """

    tensors: Layout
    optional: Layout
    steps_per_round: int
    num_ranks: tuple[int, ...]
    stream: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest round that every site can load.

    Attributes:
        round_idx: rounds done.
        refused: newer rounds that were refused: what is wrong with them, by site.
    """

    round_idx: int
    refused: dict[int, dict[int, str]]


def find_round(
    rounds: Sequence[int],
    run_dir: Path,
    config: Config,
    transport: Transport,
    *,
    fingerprints: dict[str, str],
    expected: Mapping[int, Expected],
    replicas: Callable[[int], Sequence[Bucket]],
) -> Found:
    """The first of these rounds whose parts are whole, of this run and finite at all sites.

    Args:
        rounds: to try, newest first; the same at all sites.
        expected: by site of this process.
        replicas: buckets whose replicas must be equal at all their holders, by round.

    Raises:
        CheckpointError: at every site, if there is none; it says what is wrong at which site.
    """
    refused: dict[int, dict[int, str]] = {}
    for round_idx in rounds:
        equal = replicas(round_idx)
        inspect = partial(_inspect, run_dir, round_idx, config, fingerprints, expected, equal)
        messages = gather(transport, partial(_of_first_rank, transport.inside, inspect))
        answers = dict(zip(transport.members, map(json.loads, messages), strict=True))
        problems = {site: a["problem"] for site, a in answers.items() if a["problem"]}
        problems = problems or _differing(equal, {s: a["replicas"] for s, a in answers.items()})
        if not problems:
            return Found(round_idx=round_idx, refused=refused)
        refused[round_idx] = problems
    reasons = [f"round {r}: {by_site(problems)}" for r, problems in refused.items()]
    more = f"; and {len(reasons) - 3} older rounds" if len(reasons) > 3 else ""
    which = "the checkpoint" if len(reasons) == 1 else "no checkpoint"
    cannot = "cannot be used" if len(reasons) == 1 else "can be used"
    raise CheckpointError(
        f"run.dir {run_dir} cannot be resumed: {which} {cannot}: {'; '.join(reasons[:3])}{more}; "
        f"{WAYS_OUT}"
    )


def _of_first_rank(inside: Ranks, inspect: Callable[[int], dict[str, Any]], site: int) -> bytes:
    """What the first rank of a site finds, as JSON, at all of its ranks."""
    return inside.gather(json.dumps(inspect(site)).encode() if inside.rank == 0 else b"")[0]


def _inspect(
    run_dir: Path,
    round_idx: int,
    config: Config,
    fingerprints: dict[str, str],
    expected: Mapping[int, Expected],
    replicas: Sequence[Bucket],
    site: int,
) -> dict[str, Any]:
    """What is wrong with one site's part, or nothing, and the hashes of its replicas."""
    try:
        if problem := checkpoint.check_part(run_dir, round_idx, site):
            raise CheckpointError(problem)
        values = checkpoint.read_values(run_dir, round_idx, site)
        if differs := differences(values, config, fingerprints):
            raise CheckpointError(f"it is of another experiment: {differs}")
        if problem := wrong_value(values, round_idx, site, expected[site]):
            raise CheckpointError(f"site-{site}.json: {problem}")
        part = checkpoint.Part(run_dir, round_idx, site, checked=True)
        if problem := _wrong_tensors(part, expected[site]):
            raise CheckpointError(f"site-{site}.safetensors: {problem}")
        # What a sync gave every holder: the parameters of fragments move on between two of theirs.
        kind = "anchor" if streams(config) else "param"
        hashes = replica_hashes(
            replicas, site, lambda segment: part.read(entry(kind, segment.name))
        )
    except CheckpointError as error:
        return {"problem": str(error), "replicas": {}}
    return {"problem": "", "replicas": {str(i): digest.hex() for i, digest in hashes.items()}}


def _wrong_tensors(part: checkpoint.Part, expected: Expected) -> str:
    """The first tensor that a run cannot continue with; empty if all are right."""
    if problem := misfit(part.kept, expected.tensors, optional=expected.optional):
        return problem
    saved = part.values.get("ranks_by_site") or [part.num_ranks] * len(expected.num_ranks)
    if tuple(saved) != expected.num_ranks and of_kind(part.kept, "residual"):
        return (
            f"its residuals of sync.codec are those of {_of_sites(saved)} ranks per site, and go "
            f"on with as many only, not with {_of_sites(expected.num_ranks)}"
        )
    for name in part.kept:
        if not_finite({name: part.read(name)}):
            return f"{name} is not finite"
    return _wrong_random_state(part.read("rng"))


def _of_sites(counts: Sequence[int]) -> str:
    """Numbers of ranks by site, or the number that all have."""
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def wrong_value(values: dict[str, Any], round_idx: int, site: int, expected: Expected) -> str:
    """The first small value that a run cannot continue with; empty if all are right."""
    known = {"round": round_idx, "step_idx": round_idx * expected.steps_per_round, "site": site}
    for key, value in known.items():
        own = values.get(key, value if key == "site" else None)  # older parts name no site
        if type(own) is not int or own != value:
            return f"{key} is {own!r:.40}, not {value}"
    if not _are_counts(values.get("data"), expected.stream):
        return "data is not a position in the text"
    if not _are_counts(values.get("totals"), Totals().state(), whole=False):
        return "totals are not sums over rounds"
    if not values["totals"]["train_s"]:
        return "totals have no time of training"
    counts = values.get("counts")
    if not isinstance(counts, dict) or set(counts) != {"payload", "wire"}:
        return "counts are not bytes by class"
    if not all(isinstance(c, dict) and _are_counts(c, c) for c in counts.values()):
        return "counts are not bytes by class"
    ranks = values.get("ranks_by_site", list(expected.num_ranks))  # older parts do not name them
    if not _are_ranks(ranks, len(expected.num_ranks)):
        return f"ranks_by_site is {ranks!r:.40}"
    loss = values.get("val_loss_local", "missing")
    if loss is not None and type(loss) is not float:
        return f"val_loss_local is {loss!r:.40}"
    return ""


def _are_ranks(ranks: Any, sites: int) -> bool:
    """Whether they are numbers of ranks of so many sites."""
    known = isinstance(ranks, list) and len(ranks) == sites
    return known and all(type(number) is int and number > 0 for number in ranks)


def _are_counts(tree: Any, names: Iterable[str], *, whole: bool = True) -> bool:
    """Whether a mapping has exactly these names, and only counts of 0 or more."""
    return (
        isinstance(tree, dict)
        and set(tree) == set(names)
        and all(
            type(value) in (int, int if whole else float) and 0 <= value < _MOST
            for value in tree.values()
        )
    )


def _wrong_random_state(state: torch.Tensor) -> str:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        return f"rng is not a random state: {str(error).splitlines()[0]}"
    return ""


def _differing(replicas: Sequence[Bucket], hashes: dict[int, dict[str, str]]) -> dict[int, str]:
    """Sites whose replica of a bucket differs from that of its first holder."""
    for bucket in replicas:
        first, *others = bucket.holders
        for site in others:
            if hashes[site][str(bucket.index)] != hashes[first][str(bucket.index)]:
                name = bucket.segments[0].parameter
                return {site: f"its {name} is not that of site {first}: saved by another run"}
    return {}


def refusals(found: Found, transport: Transport) -> list[str]:
    """A line per refused round: on all sites at the first site, elsewhere on the process's own."""
    everyone = transport.members[0] in transport.sites
    lines = []
    for round_idx, problems in found.refused.items():
        own = {s: p for s, p in problems.items() if everyone or s in transport.sites}
        if own:
            lines.append(f"checkpoint of round {round_idx} refused: {by_site(own)}")
    return lines


def remove_newer(run_dir: Path, round_idx: int, sites: Iterable[int]) -> None:
    """Remove these sites' parts of rounds after this one, which the run will save again.

    Called only once every site has loaded this round. The newest are removed first, so that the
    parts that a crash leaves still belong to one history.

    Raises:
        CheckpointError: if one cannot be removed.
    """
    sites = list(sites)
    for newer in checkpoint.saved_rounds(run_dir):
        if newer > round_idx:
            try:
                checkpoint.remove_parts(run_dir, newer, sites)
            except OSError as error:
                reason = f"cannot be removed: {error.strerror or error}"
                raise CheckpointError(f"{error.filename} {reason}") from None


def refuse_moved_parting(run: Run, rounds: Sequence[int]) -> None:
    """Copies of experts that have parted cannot be tied again, nor the other way round.

    Args:
        rounds: that may be loaded, newest first.

    Raises:
        ConfigError: if the schedule's new horizon moves the parting over rounds that are done.
    """
    config = run.config
    for round_idx, site in product(rounds, run.sites):
        try:
            saved = parse_saved(checkpoint.read_values(run.run_dir, round_idx, site)["config"])
        except CheckpointError:
            continue
        syncs = [(done + 1) * config.local_steps for done in range(round_idx)]
        if saved and any(coupling(saved, steps) != coupling(config, steps) for steps in syncs):
            field, value = "inner.schedule_steps", config.inner.schedule_steps
            rule = (
                f"moves the round after which the copies part (placement.grow_at) over rounds that "
                f"are done; inner.schedule_steps={saved.schedule_horizon} keeps it"
            )
            raise ConfigError(*((field, value) if value else ("rounds", config.rounds)), rule)
        return


def horizon_change(values: dict[str, Any], config: Config) -> str:
    """Says how the learning rate jumps if the schedule's horizon has changed; otherwise empty."""
    saved, step = parse_saved(values["config"]), values["step_idx"]
    if saved is None:
        return ""
    old, new = saved.schedule_horizon, config.schedule_horizon
    before = learning_rate(saved.inner, step, old)
    now = learning_rate(config.inner, step, new)
    if before == now:
        return ""
    return (
        f"the learning rate's schedule ends after {new} steps, not after {old} as before: the next "
        f"step takes {now:.3g} instead of {before:.3g}; inner.schedule_steps={old} keeps the old "
        f"schedule"
    )


def expected_state(run: Run, site: int) -> Expected:
    """What a part of this site must hold; `probe` is present once its model was evaluated."""
    rng = torch.get_rng_state()
    config, moe_layers = run.config, len(run.config.model.moe_layers)
    first_batch = min(config.evaluation_batch_size, len(run.data.held_out)) * config.data.seq_len
    probe = (moe_layers, first_batch if moe_layers else 0, config.model.top_k)
    return Expected(
        tensors={
            **run.sites[site].state_layout(run.plan.segment_plan.segments_at(site)),
            **run.sync.state_layout(site),
            "rng": (tuple(rng.shape), rng.dtype),
        },
        optional={"probe": (probe, torch.int16)},
        steps_per_round=config.local_steps,
        num_ranks=run.plan.num_ranks,
        stream=tuple(run.sites[site].stream.state()),
    )


def save_round(run: Run, rounds_done: int) -> None:
    """Save every site's part of a checkpoint, then remove the oldest checkpoints.

    Raises:
        CheckpointError: if a part cannot be written at a site.
        SyncError: if a site's state is not finite; such a round is never saved.
    """
    check_sites(run.transport, lambda s: run.sites[s].divergence() or run.sync.divergence(s))

    inside = run.transport.inside

    def save(turn: bool) -> None:
        for site_idx, site in run.sites.items() if turn else ():
            tensors, values = site.state()
            tensors |= run.sync.state_of(site_idx)
            if inside.rank:
                tensors = {n: t for n, t in tensors.items() if n.partition("/")[0] in RANKED}
            else:
                tensors["rng"] = torch.get_rng_state()
            if site_idx in run.probes and not inside.rank:
                tensors["probe"] = run.probes[site_idx]
            values |= {
                "round": rounds_done,
                "site": site_idx,
                "config": run.config.model_dump(mode="json"),
                "fingerprints": run.data.fingerprints,
                "totals": run.totals[site_idx].state(),
                "counts": counts[site_idx],
                "val_loss_local": run.local_losses.get(site_idx),
                "ranks_by_site": list(run.plan.num_ranks),
            }
            checkpoint.save_part(
                run.run_dir,
                rounds_done,
                site_idx,
                tensors,
                values,
                rank=inside.rank,
                num_ranks=inside.size,
            )

    counts = run.site_counts()
    if max(run.plan.num_ranks) > 1:  # the first rank's manifest says that all have saved theirs
        for site_idx in _own_parts(run):
            checkpoint.remove_manifest(run.run_dir, rounds_done, site_idx)
        agreed(run.transport, lambda: None)
        agreed(run.transport, lambda: save(inside.rank > 0))
    agreed(run.transport, lambda: save(inside.rank == 0))
    keep = run.config.run.keep_checkpoints
    try:
        checkpoint.remove_old(run.run_dir, rounds_done, keep, _own_parts(run))
    except OSError as error:  # the round is saved: no reason to end the run
        run.progress.warn(f"{error.filename} cannot be removed: {error.strerror}")


def load_round(run: Run, round_idx: int) -> dict[str, Any]:
    """Load a round at this process's sites; returns the small values of the last site."""
    for site_idx, site in run.sites.items():
        # Every site has found its part whole.
        part = checkpoint.Part(run.run_dir, round_idx, site_idx, checked=True)
        tensors, values = _own_rows(part, site), part.values
        site.load_state(tensors, values)
        run.sync.load_state_of(site_idx, tensors)
        torch.set_rng_state(tensors["rng"])
        run.totals[site_idx].load_state(values["totals"])
        if run.transport.inside.rank == 0:  # they are those of all ranks
            run.transport.counts[site_idx].load_state(values["counts"])
        if "probe" in tensors:
            run.probes[site_idx] = tensors["probe"]
        if values["val_loss_local"] is not None:
            run.local_losses[site_idx] = values["val_loss_local"]
    return values


def _own_rows(part: checkpoint.Part, site: Site) -> dict[str, Tensor]:
    """The rows of every tensor of a part that this rank goes on with."""
    stored, own = ({s.name: s.cut for s in segments} for segments in (site.stored, site.segments))
    tensors = {}
    for name in part.kept:
        kind, _, rest = name.partition("/")
        segment = rest.partition("/")[2] if kind in ("inner", "outer") else rest
        cuts = stored if kind in ("param", "inner") else own
        if kind == "residual":
            tensors[name] = part.read_of_rank(name, site.ranks.rank)
        elif kind not in RANKED:
            tensors[name] = part.read(name)
        elif segment in cuts:
            tensors[name] = part.read(name, cuts[segment])
    return tensors
