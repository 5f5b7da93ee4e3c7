"""Shapes of models: their parameters, and what one token costs them in FLOPs and kept values.

The trainer builds one family; the presets need more (latent attention, biases, sinks, ungated
FFNs). A config's sums equal those of the parameters that the trainer lists, which a test holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from fomoe_sim.trainer import Config, ConfigError, hint, read_data, read_yaml, stamp
from fomoe_sim.units import read_record

TRAIN = 3  # forward, and a backward pass of twice its cost (arXiv 2001.08361, section 2.1)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head attention: grouped-query (`q_lora` 0) or latent (MLA).

    Attributes:
        heads, kv_heads: query heads and key/value heads (MLA: kv_heads is not used).
        head_dim: width of one query/key head without the MLA rope part.
        q_lora, kv_lora, rope_dim, value_dim: MLA ranks and widths; 0 for grouped-query attention.
        qk_norm: RMS norms of queries and keys: over one head, or over all of them.
        qkv_bias, out_bias: biases of the projections.
        sinks: one learned logit per head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    q_lora: int = 0
    kv_lora: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False

    @property
    def latent(self) -> bool:
        return self.q_lora > 0

    @property
    def score_width(self) -> int:
        """Summed width of queries and values over heads: FLOPs per token and key are 2 x this."""
        value = self.value_dim if self.latent else self.head_dim
        return self.heads * (self.head_dim + self.rope_dim + value)

    def matrices(self, d_model: int) -> int:
        """Elements of one layer's products: what a token multiplies with."""
        if self.latent:  # DeepSeek-V2/V3 latent attention (arXiv 2412.19437, section 2.1.1)
            queries = self.heads * (self.head_dim + self.rope_dim)
            up = self.kv_lora * self.heads * (self.head_dim + self.value_dim)
            down = d_model * (self.q_lora + self.kv_lora + self.rope_dim)
            return down + self.q_lora * queries + up + self.heads * self.value_dim * d_model
        return 2 * d_model * self.head_dim * (self.heads + self.kv_heads)

    def vectors(self, d_model: int) -> int:
        """Elements of one layer's norms, biases and sinks."""
        if self.latent:
            return self.q_lora + self.kv_lora
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = {"none": 0, "head": 2 * self.head_dim, "full": queries + keys}[self.qk_norm]
        biases = self.qkv_bias * (queries + 2 * keys) + self.out_bias * d_model
        return norms + biases + self.sinks * self.heads


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One model.

    Attributes:
        name: preset name, or the config file's.
        num_layers, num_dense_layers: layers, and how many of the first have a dense FFN.
        d_model, vocab_size: widths.
        num_experts, top_k: routed experts per MoE layer (0 for a dense model) and choices.
        expert_ffn, shared_ffn, dense_ffn: hidden widths; shared_ffn sums all shared experts.
        dense_widths: hidden width of each dense layer where they differ (else dense_ffn).
        gated: SwiGLU (three matrices) or a plain FFN (two).
        expert_bias, router_bias: biases inside experts and of the router.
        score_bias: one balancing bias per expert.
        active_without: what the vendor leaves out when it counts active parameters.
        seq_len: pre-training context, in tokens.
        source: where the shape comes from.
        unsupported: features of it that the trainer does not build.
    """

    name: str
    num_layers: int
    d_model: int
    vocab_size: int
    attention: Attention
    num_dense_layers: int = 0
    num_experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_ffn: int = 0
    dense_widths: tuple[int, ...] = ()
    tied: bool = False
    gated: bool = True
    expert_bias: bool = False
    router_bias: bool = False
    score_bias: bool = False
    active_without: tuple[Literal["embedding", "head"], ...] = ()
    seq_len: int = 4096
    source: str = ""
    unsupported: tuple[str, ...] = ()

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def num_dense(self) -> int:
        """Layers with a dense FFN; all of them in a model without routed experts."""
        return self.num_layers - self.num_moe_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.num_dense, self.num_layers))

    @cached_property
    def expert_numel(self) -> int:
        """Elements of one routed expert of one layer."""
        if not self.num_experts:
            return 0
        bias = (2 if self.gated else 1) * self.expert_ffn + self.d_model
        return self._ffn_numel(self.expert_ffn) + (bias if self.expert_bias else 0)

    @cached_property
    def expert_total(self) -> int:
        """Elements of all routed experts."""
        return self.num_moe_layers * self.num_experts * self.expert_numel

    @cached_property
    def layer_shared(self) -> tuple[int, ...]:
        """Shared elements (all but routed experts) of each layer."""
        attention = self.attention
        attention_numel = attention.matrices(self.d_model) + attention.vectors(self.d_model)
        common = 2 * self.d_model + attention_numel
        router = self.num_experts * (self.d_model + self.router_bias + self.score_bias)
        moe = common + router + (self._ffn_numel(self.shared_ffn) if self.shared_ffn else 0)
        dense = [common + self._ffn_numel(self.dense_width(i)) for i in range(self.num_dense)]
        return (*dense, *[moe] * self.num_moe_layers)

    @cached_property
    def shared_total(self) -> int:
        """Elements that every site holds."""
        embedding = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return embedding + self.d_model + sum(self.layer_shared)

    @property
    def total(self) -> int:
        return self.shared_total + self.expert_total

    @cached_property
    def active(self) -> int:
        """Parameters one token runs through, by the vendor's convention."""
        skipped = self.num_moe_layers * (self.num_experts - self.top_k) * self.expert_numel
        table = self.vocab_size * self.d_model
        return self.total - skipped - table * len(self.active_without)

    def dense_width(self, layer: int) -> int:
        """Hidden width of a dense layer's FFN."""
        return self.dense_widths[layer] if self.dense_widths else self.dense_ffn

    def _ffn_numel(self, width: int) -> int:
        return (3 if self.gated else 2) * self.d_model * width


# ------------------------------------------------------------------------------------------ names


def model_preset(name: str) -> ModelShape:
    """The shape of a named model, or of a YAML file of one shape.

    Raises:
        ConfigError: if there is none of that name; lists the nearest.
    """
    return _model(name, stamp(name) if name.endswith((".yaml", ".yml")) else None)


@lru_cache(maxsize=64)
def _model(name: str, file: int | None) -> ModelShape:
    if file is not None:
        return read_shape(Path(name).stem, read_yaml(name), f"--model {name}")
    table = read_data("models")
    if name not in table:
        raise ConfigError("--model", name, f"is not a model preset; {hint(name, table)}")
    return read_shape(name, table[name], "--model")


def read_shape(name: str, tree: dict[str, Any], where: str) -> ModelShape:
    """A shape from the keys of `ModelShape` and `Attention`.

    Raises:
        ConfigError: for a key that is unknown, missing or of the wrong kind.
    """
    attention = read_record(Attention, tree.get("attention"), f"{where} attention")
    shape: ModelShape = read_record(
        ModelShape, {"name": name, **tree, "attention": attention}, where
    )
    for key in ("num_layers", "d_model", "vocab_size", "seq_len"):
        if not getattr(shape, key):
            raise ConfigError(f"{where} {key}", 0, "must be at least 1")
    if not attention.heads:
        raise ConfigError(f"{where} attention heads", 0, "must be at least 1")
    experts = (shape.num_experts, shape.top_k, shape.expert_ffn)
    if any(experts) and not (all(experts) and shape.top_k <= shape.num_experts):
        rule = "num_experts, top_k and expert_ffn go together, top_k at most num_experts"
        raise ConfigError(f"{where} num_experts", shape.num_experts, rule)
    if shape.num_dense and not (shape.dense_ffn or shape.dense_widths):
        raise ConfigError(f"{where} dense_ffn", shape.dense_ffn, "is needed by its dense layers")
    return shape


def shape_from_config(config: Config, name: str) -> ModelShape:
    """The shape that the trainer builds for a config; its parameters equal the trainer's."""
    model = config.model
    moe = len(model.moe_layers) > 0
    num_dense = model.num_layers - len(model.moe_layers)
    dense = tuple(model.dense_width(layer) for layer in range(num_dense))
    return ModelShape(
        name=name,
        num_layers=model.num_layers,
        num_dense_layers=num_dense,
        d_model=model.d_model,
        vocab_size=config.vocab_size,
        attention=Attention(
            heads=model.num_heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_size,
            qk_norm=model.qk_norm,
        ),
        num_experts=model.num_experts if moe else 0,
        top_k=model.top_k if moe else 0,
        expert_ffn=model.expert_width if moe else 0,
        shared_ffn=model.shared_expert_ffn_dim if moe else 0,
        dense_ffn=dense[0] if dense else 0,
        dense_widths=dense,
        tied=model.tie_embeddings,
        seq_len=config.data.seq_len,
        source="the config's own arithmetic",
    )


# ----------------------------------------------------------------------------------- one token


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
