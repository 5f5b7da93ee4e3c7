"""Model formats of transformers: what each can say, its config.json, its tensors (no torch).

Read in transformers 4.57 and 5.24. Routed experts are written one by one, as both majors save
them; 5 joins them when it loads. `exact` tensors stay in fp32 there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.shapes import parameter_specs


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a format can say, beside rotary positions, RMSNorm and SwiGLU experts, which all do.

    Attributes:
        architecture: transformers' class.
        qk_norm: values of model.qk_norm.
        score: value of router.score.
        raw_gates: whether gates may stay as they are (router.gate_norm none).
        bias: name of the selection bias in an MoE block, or None.
        bias_rows: whether the bias has a dimension of size 1 before that of the experts.
        shared: whether there may be a shared expert; `needs_shared`: whether there must be one.
        dense: whether the first layers may be dense.
        free_heads: whether the heads together may be wider or narrower than d_model.
        pairs: whether rotary positions turn neighbours, not the halves of a head.
        exact: whether the router stays in fp32.
        block: name of the MoE block in a layer.
        expert: names of gate, up and down of a routed expert.
        fewest_experts: smallest number of experts that its code accepts.
    """

    architecture: str
    qk_norm: tuple[str, ...]
    score: str = "softmax"
    raw_gates: bool = True
    bias: str | None = None
    bias_rows: bool = False
    shared: bool = False
    needs_shared: bool = False
    dense: bool = False
    free_heads: bool = True
    pairs: bool = False
    exact: bool = False
    block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fewest_experts: int = 1


# In the order in which a format is chosen.
FORMATS: dict[str, Format] = {
    "olmoe": Format(architecture="OlmoeForCausalLM", qk_norm=("full",), free_heads=False),
    "qwen3_moe": Format(architecture="Qwen3MoeForCausalLM", qk_norm=("head",), dense=True),
    "mixtral": Format(
        architecture="MixtralForCausalLM",
        qk_norm=("none",),
        raw_gates=False,
        block="block_sparse_moe",
        expert=("w1", "w3", "w2"),
    ),
    "ernie4_5_moe": Format(
        architecture="Ernie4_5_MoeForCausalLM",
        qk_norm=("none",),
        raw_gates=False,
        bias="moe_statics.e_score_correction_bias",
        bias_rows=True,
        shared=True,
        dense=True,
        pairs=True,
        exact=True,
    ),
    "glm4_moe": Format(
        architecture="Glm4MoeForCausalLM",
        qk_norm=("none", "head"),
        score="sigmoid",
        bias="gate.e_score_correction_bias",
        shared=True,
        needs_shared=True,
        dense=True,
        exact=True,
        fewest_experts=2,  # it adds the two best scores of a group
    ),
}


# ---------------------------------------------------------------------------------- what fits where


def choose_format(config: Config, asked: str | None) -> str:
    """The requested format, or the first that can say the model.

    Raises:
        ConfigError: if it cannot, with the reasons and the settings that would allow it.
    """
    if asked is not None:
        reasons = why_not(config, asked)
        if reasons:
            raise ConfigError("--format", asked, f"cannot say this model: {'; '.join(reasons)}")
        return asked
    missing = {name: why_not(config, name) for name in FORMATS}
    fitting = [name for name, reasons in missing.items() if not reasons]
    if not fitting:
        nearest = sorted(missing, key=lambda name: len(missing[name]))
        lines = [f"{name}: {', '.join(missing[name])}" for name in nearest]
        raise ConfigError("--format", "", f"none can say this model: {'; '.join(lines)}")
    return fitting[0]


def why_not(config: Config, name: str) -> list[str]:
    """What a format cannot say of a model, each with the setting that would allow it."""
    fmt, model = FORMATS[name], config.model
    reasons = []
    if model.qk_norm not in fmt.qk_norm:
        allowed = " or ".join(f"model.qk_norm={value}" for value in fmt.qk_norm)
        reasons.append(f"it has no qk-norm of kind {model.qk_norm} ({allowed})")
    if not fmt.free_heads and model.head_size * model.num_heads != model.d_model:
        reasons.append("its heads are as wide as d_model together (model.head_dim=null)")
    widths = {model.dense_width(layer) for layer in _dense_layers(config)}
    if widths and not fmt.dense:
        setting = "model.ffn=moe" if model.ffn == "dense" else "model.num_dense_layers=0"
        reasons.append(f"it has no dense layers ({setting})")
    elif len(widths) > 1:
        reasons.append("its dense layers have one width (model.dense_ffn_dim=null)")
    if model.moe_layers:
        reasons += _why_not_routed(config, fmt)
    return reasons


def _why_not_routed(config: Config, fmt: Format) -> list[str]:
    model, router = config.model, config.router
    width, shared = model.expert_width, model.shared_expert_ffn_dim
    reasons = []
    if router.score != fmt.score:
        reasons.append(f"its scores are {fmt.score}, not {router.score} (router.score={fmt.score})")
    if router.gate_norm == "none" and not fmt.raw_gates:
        reasons.append("its gates add up to 1 (router.gate_norm=selected)")
    if router.balance != "loss" and fmt.bias is None:
        reasons.append("it has no selection bias (router.balance=loss)")
    if model.num_experts < fmt.fewest_experts:
        reasons.append(f"it needs {fmt.fewest_experts} experts (model.num_experts=2)")
    if shared and not fmt.shared:
        reasons.append("it has no shared expert (model.shared_expert_ffn_dim=0)")
    elif shared % width or (fmt.needs_shared and not shared):
        nearest = max(1, round(shared / width)) * width
        reasons.append(
            f"its shared expert is a multiple of a routed one, {width} "
            f"(model.shared_expert_ffn_dim={nearest})"
        )
    return reasons


def _dense_layers(config: Config) -> list[int]:
    return [n for n in range(config.model.num_layers) if n not in config.model.moe_layers]


# ------------------------------------------------------------------------------------- config.json


def model_config(config: Config, name: str) -> dict[str, Any]:
    """What config.json says of the function that the merged model computes."""
    model, fmt = config.model, FORMATS[name]
    normed = config.router.gate_norm != "none"
    dense = _dense_layers(config)
    dense_width = model.dense_width(dense[0]) if dense else model.expert_width
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    common = {
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # as 4.57 reads it; 5 reads the next line
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if fmt.free_heads:
        common["head_dim"] = model.head_size
    if name == "olmoe":
        return common | {
            "attention_bias": False,
            "clip_qkv": None,
            "intermediate_size": model.expert_width,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "norm_topk_prob": normed,
        }
    if name == "mixtral":
        return common | {
            "sliding_window": None,
            "intermediate_size": model.expert_width,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
        }
    common |= {"intermediate_size": dense_width, "moe_intermediate_size": model.expert_width}
    shared = model.shared_expert_ffn_dim // model.expert_width
    if name == "qwen3_moe":
        return common | {
            "attention_bias": False,
            "use_sliding_window": False,
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "norm_topk_prob": normed,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }
    if name == "ernie4_5_moe":
        return common | {
            "use_bias": False,
            "moe_num_experts": model.num_experts,
            "moe_k": model.top_k,
            "moe_num_shared_experts": shared,
            "moe_layer_start_index": len(dense),
            "moe_layer_end_index": model.num_layers - 1,
            "moe_layer_interval": 1,
        }
    rope["partial_rotary_factor"] = 1.0
    return common | {
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
        "use_qk_norm": model.qk_norm == "head",
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.top_k,
        "n_shared_experts": shared,
        "first_k_dense_replace": len(dense),
        "norm_topk_prob": normed,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    }


# Our option behind a key of config.json; the others have none.
OPTIONS = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.d_model",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "head_dim": "model.head_dim",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.rope_theta",
    "tie_word_embeddings": "model.tie_embeddings",
    "num_experts": "model.num_experts",
    "num_local_experts": "model.num_experts",
    "moe_num_experts": "model.num_experts",
    "n_routed_experts": "model.num_experts",
    "num_experts_per_tok": "model.top_k",
    "moe_k": "model.top_k",
    "moe_intermediate_size": "model.expert_ffn_dim",
    "norm_topk_prob": "router.gate_norm",
    "use_qk_norm": "model.qk_norm",
    "mlp_only_layers": "model.num_dense_layers",
    "first_k_dense_replace": "model.num_dense_layers",
    "moe_layer_start_index": "model.num_dense_layers",
    "n_shared_experts": "model.shared_expert_ffn_dim",
    "moe_num_shared_experts": "model.shared_expert_ffn_dim",
}
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
