"""Every parameter of the model from config arithmetic: name, shape, kind (no torch).

The model builds exactly these parameters and a test holds the two equal, so placement, segments,
`--dry-run` and the simulator can speak of a model that nobody has built.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fomoe.config import Config


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        name: the name in the model, the optimizers and checkpoints.
        shape: sizes; matrices are [out, in] as in torch.nn.Linear.
        kind: embedding, attention, norm, router, ffn, shared_expert or expert.
        layer: index of the layer, None outside the layers.
        expert: id of the routed expert, None for shared parameters.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    layer: int | None = None
    expert: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name of one expert's matrix; `part` is gate_up (gate rows, then up rows) or down."""
    return f"layers.{layer}.moe.experts.{expert}.{part}"


def parameter_specs(config: Config) -> list[ParameterSpec]:
    """Parameters of the whole model, all experts included, in the model's order."""
    model = config.model
    specs = [ParameterSpec("embedding.weight", (config.vocab_size, model.d_model), "embedding")]
    for layer in range(model.num_layers):
        specs += _attention(config, layer)
        specs.append(
            ParameterSpec(f"layers.{layer}.ffn_norm.weight", (model.d_model,), "norm", layer)
        )
        if layer in model.moe_layers:
            specs += _moe(config, layer)
        else:
            prefix, width = f"layers.{layer}.ffn", model.dense_width(layer)
            specs += _ffn(prefix, model.d_model, width, "ffn", layer)
    specs.append(ParameterSpec("final_norm.weight", (model.d_model,), "norm"))
    if not model.tie_embeddings:
        shape = (config.vocab_size, model.d_model)
        specs.append(ParameterSpec("head.weight", shape, "embedding"))
    return specs


def _attention(config: Config, layer: int) -> list[ParameterSpec]:
    model, prefix = config.model, f"layers.{layer}"
    q_size, kv_size = model.num_heads * model.head_size, model.kv_heads * model.head_size
    specs = [
        ParameterSpec(f"{prefix}.attention_norm.weight", (model.d_model,), "norm", layer),
        *(
            ParameterSpec(f"{prefix}.attention.{name}.weight", shape, "attention", layer)
            for name, shape in (
                ("q_proj", (q_size, model.d_model)),
                ("k_proj", (kv_size, model.d_model)),
                ("v_proj", (kv_size, model.d_model)),
                ("o_proj", (model.d_model, q_size)),
            )
        ),
    ]
    if model.qk_norm != "none":
        full = model.qk_norm == "full"
        for name, size in (("q_norm", q_size), ("k_norm", kv_size)):
            shape = (size if full else model.head_size,)
            specs.append(ParameterSpec(f"{prefix}.attention.{name}.weight", shape, "norm", layer))
    return specs


def _moe(config: Config, layer: int) -> list[ParameterSpec]:
    model, prefix = config.model, f"layers.{layer}.moe"
    router = (model.num_experts, model.d_model)
    specs = [ParameterSpec(f"{prefix}.router.weight", router, "router", layer)]
    if model.shared_expert_ffn_dim:
        width = model.shared_expert_ffn_dim
        specs += _ffn(f"{prefix}.shared_expert", model.d_model, width, "shared_expert", layer)
    for expert in range(model.num_experts):
        prefix = expert_name(layer, expert, "").rstrip(".")
        specs += _ffn(prefix, model.d_model, model.expert_width, "expert", layer, expert)
    return specs


def _ffn(
    prefix: str, d_model: int, width: int, kind: str, layer: int, expert: int | None = None
) -> list[ParameterSpec]:
    """A SwiGLU FFN: gate and up in one matrix, so that one product serves both."""
    return [
        ParameterSpec(f"{prefix}.gate_up", (2 * width, d_model), kind, layer, expert),
        ParameterSpec(f"{prefix}.down", (d_model, width), kind, layer, expert),
    ]
