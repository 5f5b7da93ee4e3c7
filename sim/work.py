"""What one token costs a model: FLOPs, and the values that layers keep for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fomoe_sim.shape import ModelShape

TRAIN = 3  # forward, and a backward pass of twice its cost (arXiv 2001.08361, section 2.1)


@dataclass(frozen=True, kw_only=True)
class TokenWork:
    """Training FLOPs of one token without recomputation, and the values that its layers keep.

    Attributes:
        products: matrix products but routed experts'.
        experts: products of all top-k routed experts of all layers.
        scores: causal attention's two products with the scores.
        kept: elements kept for the backward pass if nothing is recomputed, routed experts left out.
        kept_experts: elements that the top-k routed experts add.
    """

    products: float
    experts: float
    scores: float
    kept: float
    kept_experts: float

    @property
    def full(self) -> float:
        return self.products + self.experts + self.scores

    @property
    def expert_fraction(self) -> float:
        """Routed experts' share of the FLOPs."""
        return self.experts / self.full


@lru_cache(maxsize=256)
def token_work(shape: ModelShape, seq_len: int) -> TokenWork:
    """Work of one token at a context length; attention is causal, so a token sees half of it."""
    matrices = 3 if shape.gated else 2
    experts = shape.num_moe_layers * shape.top_k * matrices * shape.d_model * shape.expert_ffn
    # Tied or not, the head is one product; the embedding is a look-up.
    weights = shape.vocab_size * shape.d_model
    weights += shape.num_layers * shape.attention.matrices(shape.d_model)
    weights += (
        shape.num_moe_layers * shape.d_model * (shape.num_experts + matrices * shape.shared_ffn)
    )
    weights += matrices * shape.d_model * sum(shape.dense_width(i) for i in range(shape.num_dense))
    scores = shape.num_layers * shape.attention.score_width * seq_len / 2
    kept = sum(layer_elements(shape, i, "none") for i in range(shape.num_layers))
    return TokenWork(
        products=TRAIN * 2 * weights,
        experts=TRAIN * 2 * experts,
        scores=TRAIN * 2 * scores,
        kept=kept,
        kept_experts=shape.num_moe_layers * expert_elements(shape, shape.top_k, "none"),
    )


def layer_elements(shape: ModelShape, layer: int, recompute: str) -> float:
    """Elements per token that one layer keeps, without its routed experts.

    Counted as arXiv 2205.05198 (section 4.1) counts them, for SwiGLU, norms and attention without
    stored scores. `selective` computes again all that needs no product; `half` also every second
    product (torchtitan's selective checkpointing of operators).
    """
    attention = shape.attention
    value = attention.value_dim if attention.latent else attention.head_dim
    queries = attention.heads * (attention.head_dim + attention.rope_dim)
    kv_heads = attention.heads if attention.latent else attention.kv_heads
    keys_values = kv_heads * (attention.head_dim + attention.rope_dim + value)
    width = shape.dense_width(layer) if layer < shape.num_dense else shape.shared_ffn
    output = attention.heads * value
    if recompute == "half":
        # The layer's input and attention's output are kept, and half of all products' outputs.
        return (
            shape.d_model
            + output
            + 0.5 * (queries + keys_values + 2 * shape.d_model + (1 + shape.gated) * width)
        )
    # Inputs of attention and FFN, queries, keys, values, and attention's output twice: heads lie
    # apart for attention and side by side for the output product.
    elements: float = 2 * shape.d_model + queries + keys_values + 2 * output
    if recompute != "selective":
        elements += 2 * shape.d_model  # normalised inputs of attention and FFN
    return elements + _hidden(shape, width, recompute)


def expert_elements(shape: ModelShape, executed: float, recompute: str) -> float:
    """Elements per token that an MoE layer's routed experts keep: hidden values, rows, outputs."""
    rows = 2 * executed * shape.d_model
    if recompute == "experts":
        return rows
    hidden = _hidden(shape, executed * shape.expert_ffn, recompute)
    return rows + (hidden if recompute != "half" else hidden / 2)


def _hidden(shape: ModelShape, width: float, recompute: str) -> float:
    """Elements of an FFN's hidden width: gate and up (or up), and the activated product."""
    first = 2 if shape.gated else 1
    return width * (first if recompute in ("selective", "half") else first + 1)
