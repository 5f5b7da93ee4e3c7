"""The whole model from a checkpoint's parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fomoe import checkpoint
from fomoe.checkpoint import has_manifest, load_part, read_values, round_folder, saved_rounds
from fomoe.config import Config
from fomoe.errors import CheckpointError
from fomoe.planning import plan_run
from fomoe.remains import differences, parse_saved
from fomoe.shapes import parameter_specs
from fomoe.state import Layout, misfit
from fomoe.sync.outer import replica_hashes


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
        say: told which round is merged, and which newer ones are refused and why.

    Returns:
        The `model.safetensors` that was written, with `config.yaml` beside it.

    Raises:
        CheckpointError: if no round is complete, naming what is missing.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a run's folder")
    round_idx, config, tensors = _newest_complete(run_dir, round_idx, say)
    target = out or run_dir / "merged"
    try:
        target.mkdir(parents=True, exist_ok=True)
        path = target / "model.safetensors"
        # One key only: the file of equal models is equal to the byte. config.yaml lies beside it.
        metadata = {"rounds": str(round_idx)}
        checkpoint.write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))
        checkpoint.write_text_atomically(target / "config.yaml", config.to_yaml())
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None
    say(f"merged the checkpoint of round {round_idx}")
    return path


def _newest_complete(
    run_dir: Path, round_idx: int | None, say: Callable[[str], None]
) -> tuple[int, Config, dict[str, Tensor]]:
    rounds = saved_rounds(run_dir)
    asked = "" if round_idx is None else f" of round {round_idx}"
    if round_idx is not None:
        if round_idx not in rounds:
            raise CheckpointError(
                f"{run_dir} has no checkpoint of round {round_idx}, only {rounds}"
            )
        rounds = [round_idx]
    problems: list[str] = []
    for candidate in rounds:
        try:
            config, tensors = _read_whole(run_dir, candidate)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for refused in problems:
            say(f"refused: {refused}")
        return candidate, config, tensors
    reason = f": {problems[0]}" if problems else ""
    raise CheckpointError(f"{run_dir} holds no complete checkpoint{asked}{reason}")


def _read_whole(run_dir: Path, round_idx: int) -> tuple[Config, dict[str, Tensor]]:
    """Every parameter from its first holder, once all parts are found to be of one run.

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
    plan, shapes = plan_run(config).plan, {s.name: s.shape for s in parameter_specs(config)}
    shared = [bucket for bucket in plan.buckets if len(bucket.holders) > 1]
    hashes: dict[int, bytes] = {}
    whole: dict[str, Tensor] = {}
    for site in range(config.num_sites):
        part, values = load_part(run_dir, round_idx, site)
        layout: Layout = {
            f"param/{segment.parameter}": (shapes[segment.parameter], torch.float32)
            for bucket in plan.buckets
            if site in bucket.holders
            for segment in bucket.segments
        }
        biases = config.model.moe_layers if site == 0 and config.router.balance != "loss" else ()
        for layer in biases:
            layout[f"router/balance_bias/{layer}"] = (config.model.num_experts,), torch.float32
        part = {name: tensor for name, tensor in part.items() if name in layout}
        problem = differences(values, config, first.get("fingerprints")) or misfit(part, layout)
        own = {name.removeprefix("param/"): tensor for name, tensor in part.items()}
        if not problem and config.sync.verify_replicas:
            for index, digest in replica_hashes(shared, site, own).items():
                if hashes.setdefault(index, digest) != digest:
                    problem = "its replicas are not those of the other sites"
        if problem:
            where = round_folder(run_dir, round_idx)
            raise CheckpointError(f"checkpoint {where}, site {site}: {problem}")
        for bucket in plan.buckets:
            if bucket.holders[0] == site:
                whole |= {s.parameter: own[s.parameter] for s in bucket.segments}
        for layer in biases:
            name = f"layers.{layer}.moe.router.balance_bias"
            whole[name] = part[f"router/balance_bias/{layer}"]
    return config, whole


def _any_site(run_dir: Path, round_idx: int) -> int:
    """A site whose part is here; it may be any one where a site's files were not copied yet."""
    manifests = round_folder(run_dir, round_idx).glob("site-*.manifest.json")
    numbers = [path.name.removeprefix("site-").split(".")[0] for path in manifests]
    return min((int(n) for n in numbers if n.isdigit()), default=0)
