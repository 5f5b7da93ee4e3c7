"""The same weights in transformers' OLMoE give the same logits, loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_config

from fomoe.model.transformer import Transformer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'fomoe[transformers]')"
)
if not hasattr(transformers, "OlmoeForCausalLM"):
    pytest.skip("this transformers has no OLMoE", allow_module_level=True)


def build() -> tuple[Transformer, Any]:
    """Our model with all experts resident, and theirs with its weights."""
    config = tiny_config(method="single", model__qk_norm="full", model__init_std=0.1)
    model = config.model
    ours = Transformer(config, {layer: tuple(range(8)) for layer in model.moe_layers})
    theirs = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=model.expert_width,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_experts=model.num_experts,
            num_experts_per_tok=model.top_k,
            norm_topk_prob=True,
            rms_norm_eps=model.norm_eps,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = translate(name, own)
            if value is None:
                pytest.skip(f"this transformers names a parameter {name}")
            parameter.copy_(value)
    return ours, theirs


RENAMED = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate.weight": "moe.router.weight",
    "model.layers": "layers",
}


def translate(name: str, own: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Our values, or gradients, for one of their parameters; theirs stacks a layer's experts."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    for theirs, part in (("experts.gate_up_proj", "gate_up"), ("experts.down_proj", "down")):
        if name.endswith(theirs):
            return own[f"layers.{layer}.moe.experts.{part}"]
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return own.get(name)


def test_logits_loss_and_gradients_are_those_of_transformers() -> None:
    ours, theirs = build()
    tokens_BS = torch.randint(32, (3, 17), generator=torch.Generator().manual_seed(0))
    inputs_BS, targets_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    x_BSD = ours.embed(inputs_BS)
    for layer in range(len(ours.layers)):
        x_BSD = ours.run_layer(layer, x_BSD)[0]
    logits_BSV = theirs(input_ids=inputs_BS).logits
    torch.testing.assert_close(ours.logits(x_BSD), logits_BSV, rtol=1e-4, atol=1e-4)
    loss = ours(inputs_BS, targets_BS).loss
    reference = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    loss.backward()
    reference.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in ours.named_parameters()
    }
    for name, parameter in theirs.named_parameters():
        own = translate(name, grads)
        assert own is not None
        scale = parameter.grad.abs().max()
        assert (own - parameter.grad).abs().max() <= 1e-3 * scale, name
