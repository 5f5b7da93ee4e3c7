"""The server's adapters of a saved round: as PEFT's own format, or added to the base's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe.adapters.base import read_base
from fomoe.adapters.layers import read_model
from fomoe.adapters.nesting import scale_at
from fomoe.adapters.shapes import A, B
from fomoe.checkpoint import Part
from fomoe.errors import ConfigError
from fomoe.exporting import new_folder, refuse_in_the_way
from fomoe.state import entry
from fomoe.tensorfile import Entry, write_tensors
from fomoe.whole import WholeModel, open_whole

# What a tokenizer may consist of, copied beside a merged model.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model")


def export_adapter(
    run_dir: Path,
    out: Path,
    *,
    rank: int | None = None,
    merge: bool = False,
    round_idx: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the server's adapters, cut to a rank, as a folder that PEFT loads.

    Args:
        run_dir: a run's folder, with the parts of all clients.
        out: the folder to write; it must not exist, or be empty.
        rank: dimensions to keep; None: all.
        merge: write the base with the adapters added instead, as transformers loads it.
        round_idx: rounds done; None: the newest that is complete.
        say: called with a line that says what is written.

    Returns:
        The rank.

    Raises:
        ConfigError: if the run has no adapters, or none of this rank.
        CheckpointError: if no round is complete, or the folder is in the way or cannot be written.
    """
    refuse_in_the_way(out)
    whole = open_whole(run_dir, round_idx, say)
    adapters = whole.config.adapters
    if adapters.base is None:
        raise ConfigError("--adapter", run_dir, "is a run of pre-training, which has no adapters")
    most = max(adapters.ranks)
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ConfigError("--rank", rank, f"must be from 1 to {most}, the run's largest rank")
    added = merged_values(whole.parts[0], whole)
    if added and not merge:
        rule = "has added its adapters to the base (aggregate flora); --merge writes that"
        raise ConfigError("--adapter", run_dir, rule)
    with new_folder(out) as aside:
        if merge:
            _write_merged(whole, aside, rank, added)
        else:
            _write_peft(whole, aside, rank)
    what = "base with its adapters" if merge else "adapters"
    say(f"exported the {what} of round {whole.round_idx} at rank {rank}")
    return rank


def merged_values(part: Part, whole: WholeModel) -> dict[str, Tensor]:
    """What the server had added to the base's layers, by name; nothing unless it merges."""
    if whole.config.adapters.aggregate != "flora":
        return {}
    return {name: part.read(entry("merged", name)) for name in layers_of(whole)}


def layers_of(whole: WholeModel) -> list[str]:
    """The names of the adapted layers."""
    return [name.removesuffix(f".{A}") for name in whole.shapes if name.endswith(f".{A}")]


def _write_peft(whole: WholeModel, folder: Path, rank: int) -> None:
    entries = []
    for layer in layers_of(whole):
        for part in (A, B):
            own = f"{layer}.{part}"
            width = whole.shapes[own][1]
            entries.append(
                Entry(
                    name=f"base_model.model.{own}.weight",
                    shape=(rank, width) if part == A else (width, rank),
                    dtype=torch.float32,
                    read=partial(_peft_matrix, whole, own, rank),
                )
            )
    write_tensors(folder / "adapter_model.safetensors", entries, {"format": "pt"})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": whole.config.adapters.base,
        "inference_mode": True,
        "r": rank,
        # PEFT multiplies by lora_alpha / r.
        "lora_alpha": scale_at(whole.config.adapters, rank) * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "target_modules": layers_of(whole),
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _peft_matrix(whole: WholeModel, name: str, rank: int) -> Tensor:
    """The first rows of a matrix; B as PEFT has it, [out, r]."""
    rows = whole.read(name)[:rank]
    return rows.T if name.endswith(B) else rows


def _write_merged(whole: WholeModel, folder: Path, rank: int, added: dict[str, Tensor]) -> None:
    adapters = whole.config.adapters
    assert adapters.base is not None
    base = read_base(adapters.base)
    model: Any = read_model(adapters.base, base.folder, dtype="auto")
    scale = scale_at(adapters, rank)
    with torch.no_grad():
        for layer in layers_of(whole):
            weight = model.get_submodule(layer).weight
            a, b = whole.read(f"{layer}.{A}")[:rank], whole.read(f"{layer}.{B}")[:rank]
            change = scale * b.T @ a + added.get(layer, 0.0)
            weight.copy_((weight.float() + change).to(weight.dtype))
    model.save_pretrained(folder)
    for pattern in _TOKENIZER_FILES:
        for path in base.folder.glob(pattern):
            shutil.copy(path, folder)
