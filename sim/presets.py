"""Models by name: public shapes as data, with the totals that their vendors publish.

Totals leave out multi-token prediction and vision. A test holds every computed total equal to the
published integer, or within the published digits where only those are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fomoe.errors import ConfigError
from fomoe.hints import hint
from fomoe_sim.shape import Attention, ModelShape

if TYPE_CHECKING:
    from fomoe.config import Config


def _gqa(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    qk_norm: Literal["none", "head", "full"] = "none",
    qkv_bias: bool = False,
) -> Attention:
    return Attention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, qkv_bias=qkv_bias
    )


def _mla(heads: int) -> Attention:
    """Latent attention with the ranks that DeepSeek-V3 and Kimi K2 share."""
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        q_lora=1536,
        kv_lora=512,
        rope_dim=64,
        value_dim=128,
    )


def _dense(name: str, layers: int, d_model: int, source: str) -> ModelShape:
    """Chinchilla-style decoder: heads of 64, ungated FFN of 4 d (arXiv 2203.15556, table A9)."""
    return ModelShape(
        name=name,
        num_layers=layers,
        num_dense_layers=layers,
        d_model=d_model,
        vocab_size=32_000,
        attention=_gqa(d_model // 64, d_model // 64, 64),
        dense_ffn=4 * d_model,
        gated=False,
        tied=True,
        seq_len=2048,
        source=source,
        unsupported=("a dense model without gate (model.ffn: dense is gated)",),
    )


_MLA_GAPS = ("latent attention (MLA)", "a score bias that is a parameter")
_GLM_ACTIVE: tuple[Literal["embedding", "head"], ...] = ("embedding", "head")

_MODELS = (
    ModelShape(
        name="olmoe-1b-7b",
        num_layers=16,
        d_model=2048,
        vocab_size=50_304,
        attention=_gqa(16, 16, 128, qk_norm="full"),
        num_experts=64,
        top_k=8,
        expert_ffn=1024,
        source="arXiv 2409.02060",
    ),
    ModelShape(
        name="mixtral-8x7b",
        num_layers=32,
        d_model=4096,
        vocab_size=32_000,
        attention=_gqa(32, 8, 128),
        num_experts=8,
        top_k=2,
        expert_ffn=14_336,
        source="arXiv 2401.04088; context not published, 4096 assumed",
    ),
    ModelShape(
        name="mixtral-8x22b",
        num_layers=56,
        d_model=6144,
        vocab_size=32_000,
        attention=_gqa(48, 8, 128),
        num_experts=8,
        top_k=2,
        expert_ffn=16_384,
        source="mistralai/Mixtral-8x22B-v0.1 config; context not published, 4096 assumed",
    ),
    ModelShape(
        name="dbrx",
        num_layers=40,
        d_model=6144,
        vocab_size=100_352,
        attention=_gqa(48, 8, 128),
        num_experts=16,
        top_k=4,
        expert_ffn=10_752,
        source="databricks/dbrx-base config; 4096 tokens assumed",
    ),
    ModelShape(
        name="deepseek-v3",
        num_layers=61,
        num_dense_layers=3,
        d_model=7168,
        vocab_size=129_280,
        attention=_mla(128),
        num_experts=256,
        top_k=8,
        expert_ffn=2048,
        shared_ffn=2048,
        dense_ffn=18_432,
        score_bias=True,
        source="arXiv 2412.19437",
        unsupported=_MLA_GAPS,
    ),
    ModelShape(
        name="kimi-k2",
        num_layers=61,
        num_dense_layers=1,
        d_model=7168,
        vocab_size=163_840,
        attention=_mla(64),
        num_experts=384,
        top_k=8,
        expert_ffn=2048,
        shared_ffn=2048,
        dense_ffn=18_432,
        score_bias=True,
        source="arXiv 2507.20534",
        unsupported=_MLA_GAPS,
    ),
    ModelShape(
        name="qwen3-30b-a3b",
        num_layers=48,
        d_model=2048,
        vocab_size=151_936,
        attention=_gqa(32, 4, 128, qk_norm="head"),
        num_experts=128,
        top_k=8,
        expert_ffn=768,
        source="arXiv 2505.09388",
    ),
    ModelShape(
        name="qwen3-235b-a22b",
        num_layers=94,
        d_model=4096,
        vocab_size=151_936,
        attention=_gqa(64, 4, 128, qk_norm="head"),
        num_experts=128,
        top_k=8,
        expert_ffn=1536,
        source="arXiv 2505.09388",
    ),
    ModelShape(
        name="gpt-oss-120b",
        num_layers=36,
        d_model=2880,
        vocab_size=201_088,
        attention=Attention(
            heads=64, kv_heads=8, head_dim=64, qkv_bias=True, out_bias=True, sinks=True
        ),
        num_experts=128,
        top_k=4,
        expert_ffn=2880,
        expert_bias=True,
        router_bias=True,
        active_without=("embedding",),
        source="arXiv 2508.10925; context 4096 in pre-training assumed",
        unsupported=("attention biases and sinks", "expert and router biases"),
    ),
    ModelShape(
        name="glm-4.5",
        num_layers=92,
        num_dense_layers=3,
        d_model=5120,
        vocab_size=151_552,
        attention=_gqa(96, 8, 128, qkv_bias=True, qk_norm="head"),
        num_experts=160,
        top_k=8,
        expert_ffn=1536,
        shared_ffn=1536,
        dense_ffn=12_288,
        score_bias=True,
        active_without=_GLM_ACTIVE,
        source="arXiv 2508.06471",
        unsupported=("attention biases", "a score bias that is a parameter"),
    ),
    ModelShape(
        name="glm-4.5-air",
        num_layers=46,
        num_dense_layers=1,
        d_model=4096,
        vocab_size=151_552,
        attention=_gqa(96, 8, 128, qkv_bias=True),
        num_experts=128,
        top_k=8,
        expert_ffn=1408,
        shared_ffn=1408,
        dense_ffn=10_944,
        score_bias=True,
        active_without=_GLM_ACTIVE,
        source="arXiv 2508.06471",
        unsupported=("attention biases", "a score bias that is a parameter"),
    ),
    ModelShape(
        name="llama-4-scout",
        num_layers=48,
        d_model=5120,
        vocab_size=202_048,
        attention=_gqa(40, 8, 128),
        num_experts=16,
        top_k=1,
        expert_ffn=8192,
        shared_ffn=8192,
        source="meta-llama/Llama-4-Scout-17B-16E config, text part; 4096 tokens assumed",
    ),
    # The numbers of layers are published (arXiv 2501.18512); the widths are chosen here so that
    # the totals come near the models' names.
    _dense("1b", 24, 2048, "arXiv 2501.18512 (layers); width chosen from the total"),
    _dense("10b", 48, 4096, "arXiv 2501.18512 (layers); width chosen from the total"),
    _dense("100b", 108, 8768, "arXiv 2501.18512 (layers); width chosen from the total"),
    ModelShape(
        name="llama3-405b",
        num_layers=126,
        num_dense_layers=126,
        d_model=16_384,
        vocab_size=128_256,
        attention=_gqa(128, 8, 128),
        dense_ffn=53_248,
        seq_len=8192,
        source="arXiv 2407.21783, table 3",
    ),
    ModelShape(
        name="100b-moe",
        num_layers=48,
        d_model=4096,
        vocab_size=128_000,
        attention=_gqa(32, 8, 128),
        num_experts=64,
        top_k=8,
        expert_ffn=2560,
        shared_ffn=2560,
        source="ours: 101e9 parameters that the trainer can build",
    ),
    ModelShape(
        name="proxy-54m",
        num_layers=6,
        d_model=512,
        vocab_size=32_000,
        attention=_gqa(8, 8, 64),
        num_experts=8,
        top_k=2,
        expert_ffn=448,
        tied=True,
        seq_len=1024,
        source="the proxy of configs/proxy_54m.yaml (arXiv 2606.19025 publishes 54M)",
    ),
)

MODELS = {shape.name: shape for shape in _MODELS}


def model_preset(name: str) -> ModelShape:
    """The shape of a named model.

    Raises:
        ConfigError: if there is none of that name; names the nearest.
    """
    if name not in MODELS:
        rule = f"is not a model preset; {hint(name, MODELS)}"
        raise ConfigError("--model", name, rule)
    return MODELS[name]


def shape_from_config(config: Config, name: str) -> ModelShape:
    """The shape that the trainer builds for a config; its parameters equal fomoe.shapes'."""
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
        attention=_gqa(model.num_heads, model.kv_heads, model.head_size, qk_norm=model.qk_norm),
        num_experts=model.num_experts if moe else 0,
        top_k=model.top_k if moe else 0,
        expert_ffn=model.expert_width if moe else 0,
        shared_ffn=model.shared_expert_ffn_dim if moe else 0,
        dense_ffn=dense[0] if dense else 0,
        dense_widths=dense,
        tied=model.tie_embeddings,
        seq_len=config.data.seq_len,
        source="the config's own arithmetic (fomoe.shapes)",
    )
