"""A run's merged model as a checkpoint of transformers.

Tensors go from the sites' parts to the shards one at a time. Everything is written to a folder
beside the target first, which takes its place at the end.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe import __version__
from fomoe.card import model_card
from fomoe.data.dataset import run_tokenizer
from fomoe.data.tokenizer import Tokenizer
from fomoe.data.tokenizerfiles import write_tokenizer
from fomoe.errors import CheckpointError, ConfigError
from fomoe.files import listing, remove
from fomoe.formats import FORMATS, choose_format
from fomoe.tensorfile import Entry, in_shards, write_tensors
from fomoe.theirs import TheirTensor, model_config, their_tensors
from fomoe.whole import WholeModel, open_whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHARD_BYTES = 5_000_000_000  # of a file, as transformers' own limit


def export(
    run_dir: Path,
    out: Path,
    *,
    format_name: str | None = None,
    round_idx: int | None = None,
    dtype: str = "fp32",
    shard_bytes: int = _SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write the merged model of a round as a folder that transformers loads.

    Args:
        run_dir: a run's folder, with the parts of all sites.
        out: the folder to write; it must not exist, or be empty.
        format_name: one of FORMATS; None: the first that can say the model.
        round_idx: rounds done; None: the newest that is complete.
        dtype: fp32, bf16 or fp16.
        shard_bytes: largest file of tensors, unless a single tensor is larger.
        say: called with a line that says what is written.

    Returns:
        The format's name.

    Raises:
        ConfigError: if no format can say the model, or the requested one cannot.
        CheckpointError: if no round is complete, or the folder is in the way or cannot be written.
        DataError: if the run's tokenizer cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ConfigError("--dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    if format_name is not None and format_name not in FORMATS:
        raise ConfigError("--format", format_name, f"must be one of {', '.join(FORMATS)}")
    refuse_in_the_way(out)
    whole = open_whole(run_dir, round_idx, say)
    whole.refuse_adapters("has adapters and no model of its own")
    whole.refuse_copies("cannot be exported: transformers cannot choose experts by the text")
    name = choose_format(whole.config, format_name)
    tokenizer = run_tokenizer(whole.config, run_dir, whole.fingerprints.get("tokenizer"))
    with new_folder(out) as aside:
        _write_tensors(whole, name, aside, DTYPES[dtype], shard_bytes)
        _write_settings(whole, name, aside, tokenizer, dtype)
        if tokenizer is not None:
            write_tokenizer(tokenizer, aside, seq_len=whole.config.data.seq_len)
        card = model_card(whole, name, dtype, has_tokenizer=tokenizer is not None)
        (aside / "README.md").write_text(card, encoding="utf-8")
    say(f"exported round {whole.round_idx} as {name} ({FORMATS[name].architecture}), {dtype}")
    return name


def refuse_in_the_way(out: Path) -> None:
    """Refuse a target that holds something.

    Raises:
        CheckpointError: naming it.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise CheckpointError(f"--out {out} is in the way: it is a file, not a folder")
    if listing(out):
        raise CheckpointError(f"--out {out} is in the way: it is not empty; name a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside the target, to write to; at the end it takes the target's place.

    Raises:
        CheckpointError: if it cannot be written; nothing of it is left then.
    """
    out = Path(os.path.abspath(out))  # `.` has no name to put a folder beside
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        remove(aside)


def _write_tensors(
    whole: WholeModel, name: str, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    """Shards, and the index that names them where there are several."""
    zeros = partial(_no_bias, whole.config.model.num_experts)
    entries = []
    for theirs in their_tensors(whole.config, name):
        read = partial(whole.read, theirs.source) if theirs.source in whole.shapes else zeros
        kept = torch.float32 if theirs.exact else dtype
        reader = partial(to_theirs, theirs, read)
        entries.append(Entry(name=theirs.name, shape=theirs.shape, dtype=kept, read=reader))
    shards = in_shards(entries, shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        write_tensors(folder / file, shard, {"format": "pt"})
        where |= {entry.name: file for entry in shard}
    if len(shards) > 1:
        size = sum(entry.num_bytes for entry in entries)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _no_bias(num_experts: int) -> Tensor:
    """A model without a selection bias chooses as with zeros."""
    return torch.zeros(num_experts)


def to_theirs(theirs: TheirTensor, read: Callable[[], Tensor]) -> Tensor:
    """A tensor of the format from ours."""
    rows = read()[theirs.start : theirs.stop]
    if theirs.pairs:
        heads = rows.unflatten(0, (-1, 2, theirs.pairs // 2))
        rows = heads.transpose(1, 2).flatten(0, 2)
    return rows.reshape(theirs.shape)


def to_ours(theirs: TheirTensor, tensor: Tensor) -> Tensor:
    """The rows of ours that a tensor of the format holds, in fp32."""
    rows = tensor.float()
    if theirs.pairs:
        heads = rows.unflatten(0, (-1, theirs.pairs // 2, 2))
        rows = heads.transpose(1, 2).flatten(0, 2)
    return rows.flatten() if theirs.is_bias else rows


def _write_settings(
    whole: WholeModel, name: str, folder: Path, tokenizer: Tokenizer | None, dtype: str
) -> None:
    config, fmt = whole.config, FORMATS[name]
    end = None if tokenizer is None else tokenizer.eos_id
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    settings: dict[str, Any] = {
        "architectures": [fmt.architecture],
        **model_config(config, name),
        **fmt.unused,
        **tokens,
        "max_position_embeddings": config.data.seq_len,
        "initializer_range": config.model.init_std,
        "use_cache": True,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }
    settings["fomoe"] = {
        "version": __version__,
        "round": whole.round_idx,
        "tokenizer": whole.fingerprints.get("tokenizer"),
    }
    _write_json(folder / "config.json", settings)
    generation = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    _write_json(folder / "generation_config.json", {**generation, "do_sample": True})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
