"""Model formats of transformers: what each can say, and which one suits a model (no torch).

Read in transformers 4.57 and 5.24.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fomoe.config import Config
from fomoe.errors import ConfigError


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
        keys: what config.json says of the model beside what it says in every format;
            key to a row of theirs.py's table of values.
        fixed: what it says of every model.
        unused: keys of parts that no model of ours has, which other files may have.
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
    keys: dict[str, str]
    fixed: dict[str, Any]
    unused: dict[str, Any] = field(default_factory=dict)


# In the order in which a format is chosen.
FORMATS: dict[str, Format] = {
    "olmoe": Format(
        architecture="OlmoeForCausalLM",
        qk_norm=("full",),
        free_heads=False,
        keys={
            "intermediate_size": "expert_width",
            "num_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "norm_topk_prob": "gates_sum_to_1",
        },
        fixed={"attention_bias": False, "clip_qkv": None},
    ),
    "qwen3_moe": Format(
        architecture="Qwen3MoeForCausalLM",
        qk_norm=("head",),
        dense=True,
        keys={
            "head_dim": "head_size",
            "intermediate_size": "dense_width",
            "moe_intermediate_size": "expert_width",
            "num_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "norm_topk_prob": "gates_sum_to_1",
            "mlp_only_layers": "dense_layers",
        },
        fixed={"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1},
    ),
    "mixtral": Format(
        architecture="MixtralForCausalLM",
        qk_norm=("none",),
        raw_gates=False,
        block="block_sparse_moe",
        expert=("w1", "w3", "w2"),
        keys={
            "head_dim": "head_size",
            "intermediate_size": "expert_width",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "top_k",
        },
        fixed={"sliding_window": None},
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
        keys={
            "head_dim": "head_size",
            "intermediate_size": "dense_width",
            "moe_intermediate_size": "expert_width",
            "moe_num_experts": "num_experts",
            "moe_k": "top_k",
            "moe_num_shared_experts": "num_shared",
            "moe_layer_start_index": "num_dense",
            "moe_layer_end_index": "last_layer",
        },
        fixed={"use_bias": False, "moe_layer_interval": 1},
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
        keys={
            "rope_parameters": "rope_of_whole_heads",
            "head_dim": "head_size",
            "intermediate_size": "dense_width",
            "moe_intermediate_size": "expert_width",
            "use_qk_norm": "norms_heads",
            "n_routed_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "n_shared_experts": "num_shared",
            "first_k_dense_replace": "num_dense",
            "norm_topk_prob": "gates_sum_to_1",
        },
        fixed={
            "attention_bias": False,
            "partial_rotary_factor": 1.0,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
        },
        unused={"num_nextn_predict_layers": 0},
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
    widths = {model.dense_width(layer) for layer in dense_layers(config)}
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


def dense_layers(config: Config) -> list[int]:
    """Layers without experts."""
    return [n for n in range(config.model.num_layers) if n not in config.model.moe_layers]
