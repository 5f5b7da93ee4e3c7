"""Every parameter of the model, computed from the config: name, shape, kind (no torch).

The model builds exactly these parameters, and a test compares the two, so placement, segments,
`--dry-run` and the simulator need no built model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fomoe.adapters.base import read_base
from fomoe.adapters.shapes import adapter_shapes
from fomoe.config import Config


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        name: the name in the model.
        shape: sizes; matrices are [out, in] as in torch.nn.Linear. Routed experts are stacked:
            [E, out, in], one row per expert.
        kind: embedding, attention, norm, router, ffn, shared_expert, expert or adapter.
        layer: index of the layer, None outside the layers.
        residual: whether its product is added to the residual stream, which scales its init.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    layer: int | None = None
    residual: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def row_name(self, row: int) -> str:
        """Name of one row as a tensor of its own, in checkpoints and merged files: an expert's
        matrix, or one row of any other parameter."""
        if self.kind != "expert":
            return f"{self.name}[{row}:{row + 1}]"
        stack, _, part = self.name.rpartition(".")
        return f"{stack}.{row}.{part}"


def parameter_specs(config: Config) -> list[ParameterSpec]:
    """Parameters of the whole model, all experts included, in the model's order.

    With adapters: their matrices with all rows, and nothing of the frozen base.
    """
    if config.adapters.base is not None:
        targets = read_base(config.adapters.base).targets(config.adapters.targets)
        return [
            ParameterSpec(name, shape, "adapter")
            for name, shape in adapter_shapes(targets, max(config.adapters.ranks))
        ]
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
            specs += _ffn(prefix, (), model.d_model, width, "ffn", layer)
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
            ParameterSpec(
                f"{prefix}.attention.{name}.weight", shape, "attention", layer, name == "o_proj"
            )
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
        specs += _ffn(f"{prefix}.shared_expert", (), model.d_model, width, "shared_expert", layer)
    experts = (model.num_experts,)
    specs += _ffn(f"{prefix}.experts", experts, model.d_model, model.expert_width, "expert", layer)
    return specs


def _ffn(
    prefix: str, stacked: tuple[int, ...], d_model: int, width: int, kind: str, layer: int
) -> list[ParameterSpec]:
    """A SwiGLU FFN, or a stack of them; gate and up are one matrix, so that one product computes
    both."""
    return [
        ParameterSpec(f"{prefix}.gate_up", (*stacked, 2 * width, d_model), kind, layer),
        ParameterSpec(f"{prefix}.down", (*stacked, d_model, width), kind, layer, residual=True),
    ]
