"""FLOPs of one token, from the shape: what skipping an expert saves follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fomoe_sim.shape import ModelShape
from fomoe_sim.traffic import Floats

TRAIN = 3  # forward, and a backward pass of twice its cost (arXiv 2001.08361, section 2.1)


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Training FLOPs of one token: matrix products and attention scores, no recomputation."""

    fixed: float  # everything but routed experts
    experts: float  # all top-k routed experts of all layers

    @property
    def full(self) -> float:
        return self.fixed + self.experts

    @property
    def expert_fraction(self) -> float:
        """f in the step-time gain 1 / (1 - f (1 - s)), s the executed share."""
        return self.experts / self.full

    def executed(self, share: Floats) -> Floats:
        """FLOPs per token when a share of the assignments is executed."""
        return self.fixed + self.experts * np.asarray(share)


@lru_cache(maxsize=256)
def token_flops(shape: ModelShape, seq_len: int | None = None) -> TokenFlops:
    """FLOPs of one token at a context length; attention is causal, so a token sees half of it."""
    matrices = 3 if shape.gated else 2
    experts = shape.num_moe_layers * shape.top_k * matrices * shape.d_model * shape.expert_ffn
    # Tied or not, the head is one product; the embedding is a look-up.
    weights = shape.vocab_size * shape.d_model
    for name, size, _ in shape.attention.parameters(shape.d_model):
        if len(size) == 2 and name.endswith(".weight"):
            weights += shape.num_layers * size[0] * size[1]
    moe = shape.num_experts + matrices * shape.shared_ffn
    weights += shape.num_moe_layers * shape.d_model * moe
    dense = shape.num_layers - shape.num_moe_layers
    widths = sum(shape.dense_width(layer) for layer in range(dense))
    weights += matrices * shape.d_model * widths
    scores = shape.num_layers * shape.attention.score_width * (seq_len or shape.seq_len) / 2
    return TokenFlops(fixed=TRAIN * 2 * (weights + scores), experts=TRAIN * 2 * experts)
