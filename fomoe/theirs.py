"""A model in the words of a format of transformers: its config.json and its tensors (no torch).

Routed experts are written one by one, as both majors save them; 5 joins them when it loads.
`exact` tensors stay in fp32 there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fomoe.config import Config
from fomoe.formats import FORMATS, dense_layers
from fomoe.shapes import parameter_specs

# ------------------------------------------------------------------------------------- config.json


def _rope(config: Config) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": config.model.rope_theta}


def _dense_width(config: Config) -> int:
    """Of the dense layers; a format wants a number where there are none, too."""
    dense = dense_layers(config)
    return config.model.dense_width(dense[0]) if dense else config.model.expert_width


# What a key may say of a model: the option behind it, if there is one, and its value.
_VALUES: dict[str, tuple[str | None, Callable[[Config], Any]]] = {
    "vocab_size": ("model.vocab_size", lambda c: c.vocab_size),
    "d_model": ("model.d_model", lambda c: c.model.d_model),
    "num_layers": ("model.num_layers", lambda c: c.model.num_layers),
    "last_layer": (None, lambda c: c.model.num_layers - 1),
    "num_heads": ("model.num_heads", lambda c: c.model.num_heads),
    "kv_heads": ("model.num_kv_heads", lambda c: c.model.kv_heads),
    "head_size": ("model.head_dim", lambda c: c.model.head_size),
    "norms_heads": ("model.qk_norm", lambda c: c.model.qk_norm == "head"),
    "norm_eps": ("model.norm_eps", lambda c: c.model.norm_eps),
    "rope_theta": ("model.rope_theta", lambda c: c.model.rope_theta),
    "rope": (None, _rope),
    "rope_of_whole_heads": (None, lambda c: _rope(c) | {"partial_rotary_factor": 1.0}),
    "tied": ("model.tie_embeddings", lambda c: c.model.tie_embeddings),
    "num_dense": ("model.num_dense_layers", lambda c: len(dense_layers(c))),
    "dense_layers": ("model.num_dense_layers", dense_layers),
    "dense_width": ("model.dense_ffn_dim", _dense_width),
    "num_experts": ("model.num_experts", lambda c: c.model.num_experts),
    "top_k": ("model.top_k", lambda c: c.model.top_k),
    "expert_width": ("model.expert_ffn_dim", lambda c: c.model.expert_width),
    "num_shared": (
        "model.shared_expert_ffn_dim",
        lambda c: c.model.shared_expert_ffn_dim // c.model.expert_width,
    ),
    "gates_sum_to_1": ("router.gate_norm", lambda c: c.router.gate_norm != "none"),
}
# What config.json says in every format.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",  # as 4.57 reads it; 5 reads the next line
    "rope_parameters": "rope",
    "tie_word_embeddings": "tied",
}


def model_config(config: Config, name: str) -> dict[str, Any]:
    """What config.json says of the function that the merged model computes."""
    fmt = FORMATS[name]
    said = {key: _VALUES[row][1](config) for key, row in (_COMMON | fmt.keys).items()}
    return {"model_type": name, "hidden_act": "silu"} | said | fmt.fixed


def options_behind(name: str) -> dict[str, str]:
    """The option behind each key of config.json that has one."""
    options = {key: _VALUES[row][0] for key, row in (_COMMON | FORMATS[name].keys).items()}
    return {key: option for key, option in options.items() if option is not None}


# Other names of a key, which some releases write when they save a model.
ALIASES = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "moe_num_experts": "num_experts",
    "n_routed_experts": "num_local_experts",
    "moe_k": "num_experts_per_tok",
}
# What transformers takes where a config.json does not say it, if that is ours; a class default that
# differs between releases is not here, and the key must then be there.
DEFAULTS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_bias": False,
    "clip_qkv": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_layer_interval": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}


# ----------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class TheirTensor:
    """One tensor of the format, and the rows of ours that it holds.

    Attributes:
        name, shape: in the format.
        source: our name; of a routed expert, that of its own matrix.
        start, stop: rows of ours.
        pairs: head size, if the rows of every head go from halves to neighbours; else 0.
        exact: whether it stays in fp32.
        is_bias: whether it is the selection bias, a vector of ours.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    start: int
    stop: int
    pairs: int = 0
    exact: bool = False
    is_bias: bool = False


_RENAMED = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def their_tensors(config: Config, name: str) -> Iterator[TheirTensor]:
    """Every tensor of the format, in the model's order."""
    fmt, model = FORMATS[name], config.model
    for spec in parameter_specs(config):
        if spec.layer is None:
            yield _whole(_RENAMED[spec.name], spec.shape, spec.name)
            continue
        layer = f"model.layers.{spec.layer}"
        ours = spec.name.removeprefix(f"layers.{spec.layer}.")
        if ours in _IN_LAYER:
            yield _whole(f"{layer}.{_IN_LAYER[ours]}", spec.shape, spec.name)
        elif ours.startswith("attention."):
            part = ours.removeprefix("attention.")
            turned = fmt.pairs and part in ("q_proj.weight", "k_proj.weight")
            pairs = model.head_size if turned else 0
            yield _whole(f"{layer}.self_attn.{part}", spec.shape, spec.name, pairs=pairs)
        elif spec.kind == "router":
            theirs = f"{layer}.{fmt.block}.gate.weight"
            yield _whole(theirs, spec.shape, spec.name, exact=fmt.exact)
            if fmt.bias is not None:
                shape = (*((1,) if fmt.bias_rows else ()), model.num_experts)
                yield TheirTensor(
                    name=f"{layer}.{fmt.block}.{fmt.bias}",
                    shape=shape,
                    source=f"layers.{spec.layer}.moe.router.balance_bias",
                    start=0,
                    stop=model.num_experts,
                    exact=True,
                    is_bias=True,
                )
        elif spec.kind == "expert":
            for expert in range(spec.shape[0]):
                theirs = f"{layer}.{fmt.block}.experts.{expert}"
                yield from _ffn(theirs, spec.row_name(expert), spec.shape[1:], fmt.expert)
        else:
            theirs = (
                f"{layer}.mlp.shared_experts" if spec.kind == "shared_expert" else f"{layer}.mlp"
            )
            yield from _ffn(theirs, spec.name, spec.shape, ("gate_proj", "up_proj", "down_proj"))


def _whole(
    name: str, shape: tuple[int, ...], source: str, *, pairs: int = 0, exact: bool = False
) -> TheirTensor:
    return TheirTensor(
        name=name, shape=shape, source=source, start=0, stop=shape[0], pairs=pairs, exact=exact
    )


def _ffn(
    theirs: str, ours: str, shape: tuple[int, ...], names: tuple[str, str, str]
) -> Iterator[TheirTensor]:
    """Gate and up are the halves of one matrix of ours."""
    gate, up, down = names
    if ours.endswith("down"):
        yield _whole(f"{theirs}.{down}.weight", shape, ours)
        return
    width = shape[0] // 2
    for number, part in enumerate((gate, up)):
        yield TheirTensor(
            name=f"{theirs}.{part}.weight",
            shape=(width, *shape[1:]),
            source=ours,
            start=number * width,
            stop=(number + 1) * width,
        )
