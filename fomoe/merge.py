"""The whole model from a checkpoint's parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fomoe import checkpoint
from fomoe.checkpoint import check_part, load_part, round_folder, saved_rounds
from fomoe.config import build_config
from fomoe.errors import CheckpointError
from fomoe.planning import plan_run


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
    round_idx = _choose_round(run_dir, round_idx, say)
    _, values = load_part(run_dir, round_idx, _any_site(run_dir, round_idx))
    config = build_config(values["config"])
    plan = plan_run(config).plan
    tensors: dict[str, Any] = {}
    for site in range(config.num_sites):
        part, _ = load_part(run_dir, round_idx, site)
        for bucket in plan.buckets:
            if bucket.holders[0] == site:
                for segment in bucket.segments:
                    own = part["param"][segment.name]
                    if segment.name == segment.parameter or segment.expert_class:
                        tensors[segment.name] = own
                    else:
                        tensors.setdefault(segment.parameter, {})[segment.start] = own
        if site == 0 and config.router.balance != "loss":
            for layer in config.model.moe_layers:
                name = f"layers.{layer}.moe.router.balance_bias"
                tensors[name] = part["router"]["balance_bias"][str(layer)]
    tensors = {
        name: torch.cat([own[row] for row in sorted(own)]) if isinstance(own, dict) else own
        for name, own in tensors.items()
    }
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


def _choose_round(run_dir: Path, round_idx: int | None, say: Callable[[str], None]) -> int:
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
        problem = _why_incomplete(run_dir, candidate)
        if not problem:
            for refused in problems:
                say(f"refused: {refused}")
            return candidate
        problems.append(problem)
    reason = f": {problems[0]}" if problems else ""
    raise CheckpointError(f"{run_dir} holds no complete checkpoint{asked}{reason}")


def _why_incomplete(run_dir: Path, round_idx: int) -> str:
    """The first site whose part of a round cannot be used; empty if all can."""
    try:
        _, values = load_part(run_dir, round_idx, _any_site(run_dir, round_idx))
    except CheckpointError as error:
        return str(error)
    for site in range(values["config"]["num_sites"]):
        problem = check_part(run_dir, round_idx, site)
        if problem:
            return f"round {round_idx}, site {site}: {problem}"
    return ""


def _any_site(run_dir: Path, round_idx: int) -> int:
    """A site whose part is here; it may be any one where a site's files were not copied yet."""
    manifests = round_folder(run_dir, round_idx).glob("site-*.manifest.json")
    numbers = [path.name.removeprefix("site-").split(".")[0] for path in manifests]
    return min((int(n) for n in numbers if n.isdigit()), default=0)
