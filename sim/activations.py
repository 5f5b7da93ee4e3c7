"""Activations that a training step keeps, per token: what grows with the micro-batch.

Counted as arXiv 2205.05198 (section 4.1) counts them, for what our trainer's SwiGLU, norms and
attention without stored scores keep. `none` keeps all of it. `experts` computes the hidden
activations of routed experts again, `selective` all that needs no matrix product, and `full` keeps
the input of each layer and computes the layer again: one whole layer is alive.
"""

from __future__ import annotations

from functools import lru_cache

from fomoe_sim.shape import ModelShape

FLOAT32 = 4


@lru_cache(maxsize=4096)
def activations_per_token(
    shape: ModelShape, *, executed: float, element_bytes: int, recompute: str
) -> float:
    """Bytes of saved activations per token over all layers, without MoE dispatch.

    Args:
        executed: routed experts that a token really runs in each layer.
    """

    def layer_bytes(layer: int | None) -> float:
        elements = _layer_elements(shape, executed, recompute, layer)
        return element_bytes * elements

    dense = [layer_bytes(layer) for layer in range(shape.num_layers - shape.num_moe_layers)]
    moe = layer_bytes(None)
    if recompute == "full":
        alive = max([*dense, moe] if shape.num_moe_layers else dense)
        return element_bytes * shape.d_model * shape.num_layers + alive
    again = element_bytes * _hidden(shape, executed * shape.expert_ffn, "none")
    alive = again if recompute == "experts" and shape.num_moe_layers else 0.0
    return sum(dense) + shape.num_moe_layers * moe + alive


def _layer_elements(shape: ModelShape, executed: float, recompute: str, layer: int | None) -> float:
    """Elements per token of one layer; `layer` None is an MoE layer."""
    attention = shape.attention
    value = attention.value_dim if attention.latent else attention.head_dim
    queries = attention.heads * (attention.head_dim + attention.rope_dim)
    kv_heads = attention.heads if attention.latent else attention.kv_heads
    keys_values = kv_heads * (attention.head_dim + attention.rope_dim + value)
    # Layer input and FFN input, queries, keys, values, and the attention's output twice: heads
    # lie apart for attention and side by side for the output projection.
    elements: float = 2 * shape.d_model + queries + keys_values + 2 * attention.heads * value
    if recompute != "selective":
        elements += 2 * shape.d_model  # normalised inputs of attention and FFN
    if layer is not None:
        return elements + _hidden(shape, shape.dense_width(layer), recompute)
    elements += _hidden(shape, shape.shared_ffn, recompute)
    if recompute == "experts":
        return elements
    return elements + _hidden(shape, executed * shape.expert_ffn, recompute)


def _hidden(shape: ModelShape, width: float, recompute: str) -> float:
    """Elements of an FFN's hidden width: gate and up (or up), and the activated product."""
    first = 2 if shape.gated else 1
    return width * (first if recompute == "selective" else first + 1)


def dispatch_per_token(
    shape: ModelShape, *, executed: float, element_bytes: int, recompute: str
) -> float:
    """Bytes per token over all MoE layers of scores, indices, copied rows and their outputs."""
    if not shape.num_experts:
        return 0.0
    scores = 2 * FLOAT32 * shape.num_experts  # logits and probabilities, fp32
    if element_bytes != FLOAT32 and recompute != "selective":
        scores += FLOAT32 * shape.d_model  # the router's input, cast to fp32
    indices = shape.top_k * (8 + FLOAT32)  # expert id (int64) and gate
    rows = 2 * executed * shape.d_model * element_bytes
    layers = 1 if recompute == "full" else shape.num_moe_layers
    kept_rows = 1 if recompute in ("full", "experts") else shape.num_moe_layers
    return layers * (scores + indices) + kept_rows * rows
