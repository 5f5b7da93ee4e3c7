"""`init_from`: a federation starts from a trained model, a run's folder or a transformers one.

Settings and shapes are compared before any value is read, and each site reads only the parameters
that it holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fomoe.config import Config
from fomoe.data.tokenizer import load_tokenizer
from fomoe.errors import CheckpointError, ConfigError, FomoeError
from fomoe.exporting import to_ours
from fomoe.formats import FORMATS, why_not
from fomoe.theirs import (
    ALIASES,
    DEFAULTS,
    TheirTensor,
    model_config,
    options_behind,
    their_tensors,
)
from fomoe.whole import bias_name, biased_layers, open_whole

_UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Initial:
    """A trained model that fits the config.

    Attributes:
        read: a parameter, or one expert's matrix, by our name, in fp32 on the CPU.
        biases: names of the selection biases that it has.
    """

    read: Callable[[str], Tensor]
    biases: frozenset[str]


def open_initial(config: Config, tokenizer: str | None) -> Initial | None:
    """Open and check what `init_from` names; None if nothing is named.

    Args:
        config: the experiment that starts from it.
        tokenizer: the fingerprint of its tokenizer; None: not compared.

    Raises:
        ConfigError: naming the first setting or shape that differs, or the folder that is neither.
        CheckpointError: if a file in it cannot be used.
    """
    if config.init_from is None:
        return None
    folder = Path(os.path.expanduser(config.init_from))
    if not folder.is_dir():
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise ConfigError("init_from", Path(config.init_from), what)
    if (folder / "checkpoints").is_dir():
        return _from_run(config, folder, tokenizer)
    if (folder / "config.json").is_file():
        return _from_transformers(config, folder, tokenizer)
    rule = "holds neither a run (checkpoints/) nor an exported model (config.json)"
    raise ConfigError("init_from", Path(config.init_from), rule)


def _refused(config: Config, reason: str) -> ConfigError:
    return ConfigError("init_from", config.init_from, reason)


def _check_biases(config: Config, names: list[str], read: Callable[[str], Tensor]) -> None:
    """A selection bias of the model must not be lost: without it, other experts are chosen."""
    if not biased_layers(config) and any(bool(read(name).any()) for name in names):
        reason = "has selection biases, which router.balance=loss has not; set router.balance=both"
        raise _refused(config, reason)


def _check_tokenizer(config: Config, theirs: str | None, ours: str | None, take: Path) -> None:
    if None not in (theirs, ours) and theirs != ours:
        reason = (
            f"was trained with another tokenizer than data.tokenizer={config.data.tokenizer}; "
            f"data.tokenizer={take} is its own"
        )
        raise _refused(config, reason)


# ------------------------------------------------------------------------------------ from a run


def _from_run(config: Config, folder: Path, tokenizer: str | None) -> Initial:
    try:
        whole = open_whole(folder, None, check=False)
        whole.refuse_copies("cannot be started from")
        whole.refuse_adapters("has adapters and no model to start from")
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None
    theirs, ours = function_of(whole.config), function_of(config)
    for option, value in ours.items():
        if theirs.get(option) != value:
            raise _refused(config, f"has {option}={theirs.get(option)}, this config {value}")
    own = whole.config.data.tokenizer
    take = folder / "tokenizer.json" if own == "bpe" else Path(own)
    _check_tokenizer(config, whole.fingerprints.get("tokenizer"), tokenizer, take)
    biases = [bias_name(layer) for layer in biased_layers(whole.config)]
    _check_biases(config, biases, whole.read)
    return Initial(read=whole.read, biases=frozenset(biases))


def function_of(config: Config) -> dict[str, Any]:
    """The options that decide the function of the merged model, as they take effect."""
    model, router = config.model, config.router
    same: dict[str, Any] = {
        "model.vocab_size": config.vocab_size,
        "model.num_layers": model.num_layers,
        "model.d_model": model.d_model,
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.head_dim": model.head_size,
        "model.qk_norm": model.qk_norm,
        "model.rope_theta": model.rope_theta,
        "model.norm_eps": model.norm_eps,
        "model.tie_embeddings": model.tie_embeddings,
        "model.ffn": model.ffn,
        "model.num_dense_layers": model.num_layers - len(model.moe_layers),
    }
    dense = [n for n in range(model.num_layers) if n not in model.moe_layers]
    widths = {f"model.dense_ffn_dim (layer {n})": model.dense_width(n) for n in dense}
    if model.moe_layers:
        same |= {
            "model.num_experts": model.num_experts,
            "model.top_k": model.top_k,
            "model.expert_ffn_dim": model.expert_width,
            "model.shared_expert_ffn_dim": model.shared_expert_ffn_dim,
            "router.score": router.score,
            "router.gate_norm": "none" if router.gate_norm == "none" else "selected",
        }
    return same | widths


# ----------------------------------------------------------------------- from transformers' folder


class _Shards:
    """The tensors of a transformers folder, by name, opened when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = _read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise CheckpointError(f"init_from: {index}: it has no weight_map")
            self.files: dict[str, str] = files
        else:
            self.files = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except _UNREADABLE as error:
                raise _damaged(self.folder / name, error) from None
        return self._open[name]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None if there is no such tensor."""
        if name not in self.files:
            return None
        try:
            return tuple(self._file(self.files[name]).get_slice(name).get_shape())
        except _UNREADABLE as error:
            raise _damaged(self.folder / self.files[name], error) from None

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file(self.files[name]).get_tensor(name)
        except _UNREADABLE as error:
            raise _damaged(self.folder / self.files[name], error) from None
        return tensor


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = "does not exist" if not path.exists() else " ".join(str(error).split())[:120]
    return CheckpointError(f"init_from: {path}: {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"init_from: {path}: it is no JSON object")
    return tree


def _from_transformers(config: Config, folder: Path, tokenizer: str | None) -> Initial:
    found = _read_json(folder / "config.json")
    name = found.get("model_type")
    if not isinstance(name, str) or name not in FORMATS:
        raise _refused(config, f"is of model_type {name}; known are {', '.join(FORMATS)}")
    _compare_settings(config, name, found)
    shards = _Shards(folder)
    by_source: dict[str, list[TheirTensor]] = {}
    for theirs in their_tensors(config, name):
        shape = shards.shape(theirs.name)
        if shape != theirs.shape:
            there = "is missing there" if shape is None else f"is {list(shape)} there"
            raise _refused(
                config, f"does not fit: {theirs.name} {there}, {list(theirs.shape)} here"
            )
        by_source.setdefault(theirs.source, []).append(theirs)
    if config.model.tie_embeddings and "lm_head.weight" in shards.files:
        raise _refused(config, "has an output matrix of its own; set model.tie_embeddings=false")
    _check_tokenizer(config, _tokenizer_of(folder, found), tokenizer, folder)
    biases = [source for source in by_source if source.endswith("balance_bias")]
    read = partial(_read_theirs, by_source, shards)
    _check_biases(config, biases, read)
    return Initial(read=read, biases=frozenset(biases))


def _read_theirs(by_source: dict[str, list[TheirTensor]], shards: _Shards, name: str) -> Tensor:
    rows = [to_ours(theirs, shards.read(theirs.name)) for theirs in by_source[name]]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _tokenizer_of(folder: Path, found: dict[str, Any]) -> str | None:
    """The fingerprint of its tokenizer: the run's own, or that of its tokenizer.json."""
    own = found.get("fomoe")
    if isinstance(own, dict) and isinstance(own.get("tokenizer"), str):
        return str(own["tokenizer"])
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return load_tokenizer(str(folder)).fingerprint
    except FomoeError:
        return None


def _compare_settings(config: Config, name: str, found: dict[str, Any]) -> None:
    """Compare config.json with what an export of this config would write."""
    without_bias = config.router.model_copy(update={"balance": "loss"})
    reasons = why_not(config.model_copy(update={"router": without_bias}), name)
    if reasons:
        raise _refused(config, f"is a {name}, which cannot be this model: {'; '.join(reasons)}")
    expected = model_config(config, name)
    left_out = {"rope_parameters", "partial_rotary_factor", "tie_word_embeddings"}
    dense = len(config.model.moe_layers) < config.model.num_layers
    if FORMATS[name].dense and not dense:
        left_out.add("intermediate_size")  # no layer has it
    found = _with_rope(found) | {
        "num_key_value_heads": found.get("num_key_value_heads") or found.get("num_attention_heads"),
    }
    # What transformers derives; where the numbers it is derived from differ, those are named.
    model = config.model
    if not found.get("head_dim"):
        found["head_dim"] = model.d_model // model.num_heads
    if found.get("moe_layer_end_index") == -1:
        found["moe_layer_end_index"] = model.num_layers - 1
    if not found.get("use_sliding_window", True):
        found["sliding_window"] = None
    # Dense layers first and their width last: what differs there has other reasons.
    order = {"model.num_dense_layers": -1, "model.dense_ffn_dim": 1}
    options = options_behind(name)
    for key in sorted(expected, key=lambda key: order.get(options.get(key, ""), 0)):
        ours = expected[key]
        usual = DEFAULTS.get(key, "missing")
        theirs = found.get(key, found.get(ALIASES.get(key, key), usual))
        if key not in left_out and theirs != ours:
            option = options.get(key)
            rule = f"has {key}={theirs}, this config {ours}"
            raise _refused(config, f"{rule} ({option})" if option else rule)
    turned = found["partial_rotary_factor"]
    if turned != 1.0:
        raise _refused(config, f"turns {turned} of every head by its position; here all of it is")


def _with_rope(found: dict[str, Any]) -> dict[str, Any]:
    """The positions' settings at one place, however a release of transformers writes them."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    usual = 0.5 if found.get("model_type") == "glm4_moe" else 1.0
    turned = rope.get("partial_rotary_factor", found.get("partial_rotary_factor", usual))
    theta = rope.get("rope_theta", found.get("rope_theta", "missing"))
    more = {"rope_theta": theta if kind == "default" else f"{theta} of kind {kind}"}
    return found | more | {"partial_rotary_factor": turned}
