"""The whole model from a checkpoint's parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fomoe.checkpoint import has_manifest, load_part, read_values, round_folder, saved_rounds
from fomoe.config import Config
from fomoe.errors import CheckpointError
from fomoe.files import listing, write_atomically, write_text_atomically
from fomoe.planning import plan_run
from fomoe.remains import differences, parse_saved
from fomoe.segments import Plan, Segment
from fomoe.state import Layout, entry, misfit, of_kind
from fomoe.sync.sync import replica_hashes

_ATTEMPTS = 20


def merge(
    run_dir: Path,
    *,
    round_idx: int | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write every parameter of the merged model, each taken from one of its holders.

    Args:
        run_dir: a run's folder, with the parts of all sites.
        round_idx: rounds done; by default the newest that is complete.
        out: folder to write; by default `<run_dir>/merged`.
        say: called with a line that says which round is merged, or why a newer one is refused.

    Returns:
        The `model.safetensors` that was written, with `config.yaml` beside it.

    Raises:
        CheckpointError: if no round is complete, naming what is missing.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a run's folder")
    round_idx, config, tensors = _newest_whole(run_dir, round_idx, say)
    target = out or run_dir / "merged"
    try:
        target.mkdir(parents=True, exist_ok=True)
        path = target / "model.safetensors"
        # One key only, so that equal models give equal files. config.yaml is beside it.
        metadata = {"rounds": str(round_idx)}
        write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))
        write_text_atomically(target / "config.yaml", config.to_yaml())
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None
    say(f"merged the checkpoint of round {round_idx}")
    return path


def _newest_whole(
    run_dir: Path, asked: int | None, say: Callable[[str], None]
) -> tuple[int, Config, dict[str, Tensor]]:
    """Round, config and parameters of the requested round, or of the newest whole one.

    A live run saves rounds and removes old ones meanwhile: then the search starts again.
    """
    for _ in range(_ATTEMPTS):
        rounds = saved_rounds(run_dir)
        if asked is not None and asked not in rounds:
            raise CheckpointError(f"{run_dir} has no checkpoint of round {asked}, only {rounds}")
        refused: list[str] = []
        for candidate in rounds if asked is None else [asked]:
            try:
                config, tensors = _read_whole(run_dir, candidate)
            except CheckpointError as error:
                refused.append(str(error))
                if saved_rounds(run_dir) != rounds:
                    break
                continue
            for problem in refused:
                say(f"refused: {problem}")
            return candidate, config, tensors
        else:
            of_round = "" if asked is None else f" of round {asked}"
            reason = f": {refused[0]}" if refused else ""
            raise CheckpointError(f"{run_dir} holds no complete checkpoint{of_round}{reason}")
    raise CheckpointError(
        f"{run_dir} saves and removes rounds faster than they are read: {refused[0]}; a larger "
        f"run.keep_checkpoints keeps them longer"
    )


def _read_whole(run_dir: Path, round_idx: int) -> tuple[Config, dict[str, Tensor]]:
    """Read every parameter from its first holder, and check that all parts are of one run.

    Raises:
        CheckpointError: naming the first site whose part cannot be used, and why.
    """
    first = read_values(run_dir, round_idx, _any_site(run_dir, round_idx))
    config = parse_saved(first["config"])
    if config is None:
        raise CheckpointError(f"{round_folder(run_dir, round_idx)}: its config is damaged")
    for site in range(config.num_sites):
        if not has_manifest(run_dir, round_idx, site):
            load_part(run_dir, round_idx, site)  # says what is missing
    plan = plan_run(config).segment_plan
    shared = [bucket for bucket in plan.buckets if bucket.crosses]
    hashes: dict[int, bytes] = {}
    found: dict[str, Tensor] = {}
    for site in range(config.num_sites):
        part, values = load_part(run_dir, round_idx, site)
        held = [segment for segment in plan.segments_at(site) if segment.trainers]
        layout: Layout = {entry("param", s.name): (s.shape, torch.float32) for s in held}
        biases = config.model.moe_layers if site == 0 and config.router.balance != "loss" else ()
        for layer in biases:
            layout[entry("router", "balance_bias", layer)] = (
                (config.model.num_experts,),
                torch.float32,
            )
        part = {name: tensor for name, tensor in part.items() if name in layout}
        problem = differences(values, config, first.get("fingerprints")) or misfit(part, layout)
        own = of_kind(part, "param")
        if not problem and config.sync.verify_replicas:
            for index, digest in replica_hashes(shared, site, partial(_named, own)).items():
                if hashes.setdefault(index, digest) != digest:
                    problem = "its replicas are not those of the other sites"
        if problem:
            where = round_folder(run_dir, round_idx)
            raise CheckpointError(f"checkpoint {where}, site {site}: {problem}")
        found |= {s.name: own[s.name] for s in held if s.holders[0] == site}
        for layer in biases:
            name = f"layers.{layer}.moe.router.balance_bias"
            found[name] = part[entry("router", "balance_bias", layer)]
    return config, _join_rows(plan, found)


def _named(own: dict[str, Tensor], segment: Segment) -> Tensor:
    return own[segment.name]


def _join_rows(plan: Plan, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join parameters that were cut into rows; every expert stays a tensor of its own."""
    rows: dict[str, list[Segment]] = {}
    for bucket in plan.buckets:
        for segment in bucket.segments:
            if segment.trainers and not segment.is_expert and segment.name != segment.parameter:
                rows.setdefault(segment.parameter, []).append(segment)
    for parameter, segments in rows.items():
        segments.sort(key=lambda segment: segment.start)
        found[parameter] = torch.cat([found.pop(segment.name) for segment in segments])
    return found


def _any_site(run_dir: Path, round_idx: int) -> int:
    """A site whose part is present; the files of some sites may not have been copied yet."""
    names = listing(round_folder(run_dir, round_idx))
    manifests = [name for name in names if name.endswith(".manifest.json")]
    numbers = [name.removeprefix("site-").split(".")[0] for name in manifests]
    return min((int(number) for number in numbers if number.isdigit()), default=0)
