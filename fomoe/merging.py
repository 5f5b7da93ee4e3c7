"""The whole model from a checkpoint's parts, in one file with our own names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fomoe.copies import num_sets
from fomoe.errors import CheckpointError
from fomoe.files import write_text_atomically
from fomoe.tensorfile import Entry, write_tensors
from fomoe.textchoice import NUM_COUNTERS
from fomoe.whole import open_whole


def merge(
    run_dir: str | Path,
    *,
    round_idx: int | None = None,
    out: str | Path | None = None,
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
    whole = open_whole(Path(run_dir), round_idx, say)
    target = Path(out) if out else Path(run_dir) / "merged"
    entries = [
        Entry(name=name, shape=shape, dtype=torch.float32, read=partial(whole.read, name))
        for name, shape in whole.shapes.items()
    ]
    if num_sets(whole.config) > 1:
        shape = (num_sets(whole.config), NUM_COUNTERS)
        entries.append(
            Entry(name="text_counts", shape=shape, dtype=torch.int64, read=whole.text_counts)
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        path = target / "model.safetensors"
        # One key only, so that equal models give equal files. config.yaml is beside it.
        write_tensors(path, entries, {"rounds": str(whole.round_idx)})
        write_text_atomically(target / "config.yaml", whole.config.to_yaml())
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None
    say(f"merged the checkpoint of round {whole.round_idx}")
    return path
