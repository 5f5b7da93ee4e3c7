"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU experts.

A model holds the experts of its resident set and no others. It can be run layer by layer with
experts that are passed in, which is how the merged model is evaluated without existing anywhere.

Shapes: B batch, S sequence, T = B x S tokens, D model, H head size, E all experts, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe.config import Config
from fomoe.model.attention import Attention
from fomoe.model.backends.base import ExpertWeights, compute_dtype, plan_dispatch
from fomoe.model.backends.choice import BACKENDS, choose_backend
from fomoe.model.elementwise import RMSNorm
from fomoe.model.experts import Expert, SwiGLU, run_experts
from fomoe.model.matmul import Linear, check_matmul, linear
from fomoe.model.router import Router, RouterStats, Routing

Residents = Mapping[int, tuple[int, ...]]


class MoE(nn.Module):
    """Router, resident experts and, if there is one, the shared expert."""

    def __init__(self, config: Config, residents: tuple[int, ...]) -> None:
        super().__init__()
        model = config.model
        self.options, self.num_experts = model, model.num_experts
        self.router = Router(
            d_model=model.d_model,
            num_experts=model.num_experts,
            top_k=model.top_k,
            options=config.router,
            matmul=model.matmul,
        )
        self.shared_expert = (
            SwiGLU(model.d_model, model.shared_expert_ffn_dim, model.matmul)
            if model.shared_expert_ffn_dim
            else None
        )
        self.experts = nn.ModuleDict(
            {str(e): SwiGLU(model.d_model, model.expert_width, model.matmul) for e in residents}
        )
        experts = list(self.experts.values())
        _allocate_together([expert.gate_up for expert in experts])
        _allocate_together([expert.down for expert in experts])
        slot_E = _slots(residents, model.num_experts)
        self.register_buffer("_slot_E", slot_E, persistent=False)
        self.register_buffer("_resident_E", slot_E < len(residents), persistent=False)

    def forward(
        self, x_TD: Tensor, experts: Mapping[int, Expert] | None = None
    ) -> tuple[Tensor, Routing, RouterStats]:
        """Route and run T tokens; `experts` stand in for the residents where they are given."""
        if experts is None:
            routing, stats = self.router(x_TD, self._resident_E, len(self.experts))
            y_TD = self.run_residents(x_TD, routing)
        else:
            slot_E = _slots(tuple(experts), self.num_experts).to(x_TD.device)
            routing, stats = self.router(x_TD, slot_E < len(experts), len(experts))
            y_TD = run_experts(x_TD, routing, experts, slot_E)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD, routing, stats

    def run_residents(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sum of gate x expert(x) over each token's executed assignments, [T, D]."""
        if not len(self.experts):
            return torch.zeros_like(x_TD)
        dispatch = plan_dispatch(routing, self._slot_E, len(self.experts))
        gate_A = routing.gate_TK.flatten().index_select(0, dispatch.order_A)
        experts = list(self.experts.values())
        weights = ExpertWeights(
            gate_ups=[e.gate_up for e in experts],
            downs=[e.down for e in experts],
            matmul=self.options.matmul,
            recompute=self.options.recompute == "experts",
        )
        backend = choose_backend(self.options, x_TD.device, compute_dtype(x_TD))
        return BACKENDS[backend](x_TD, gate_A, dispatch, weights)


class Layer(nn.Module):
    """Pre-norm attention and FFN; the FFN is an MoE or a dense SwiGLU."""

    def __init__(self, config: Config, index: int, residents: tuple[int, ...] | None) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = RMSNorm(model.d_model, model.norm_eps)
        self.attention = Attention(model)
        self.ffn_norm = RMSNorm(model.d_model, model.norm_eps)
        self.ffn = (
            None
            if residents is not None
            else SwiGLU(model.d_model, model.dense_width(index), model.matmul)
        )
        self.moe = None if residents is None else MoE(config, residents)

    def forward(
        self,
        x_BSD: Tensor,
        cos_SH: Tensor,
        sin_SH: Tensor,
        experts: Mapping[int, Expert] | None = None,
    ) -> tuple[Tensor, Routing | None, RouterStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SH, sin_SH)
        y_BSD = self.ffn_norm(x_BSD)
        if self.moe is None:
            assert self.ffn is not None
            return x_BSD + self.ffn(y_BSD), None, None
        y_TD, routing, stats = self.moe(y_BSD.flatten(0, 1), experts)
        return x_BSD + y_TD.view_as(x_BSD), routing, stats


@dataclass(frozen=True, kw_only=True)
class Output:
    """One forward pass.

    Attributes:
        loss: mean cross-entropy over the tokens, in nats.
        routings, stats: per MoE layer.
    """

    loss: Tensor
    routings: dict[int, Routing]
    stats: dict[int, RouterStats]


class Transformer(nn.Module):
    """A decoder that holds a resident set of experts.

    Args:
        config: the experiment.
        residents: expert ids held, per MoE layer.
    """

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(self, config: Config, residents: Residents) -> None:
        super().__init__()
        model = config.model
        check_matmul(model.matmul)
        self.matmul, self.recompute = model.matmul, model.recompute
        self.embedding = nn.Embedding(config.vocab_size, model.d_model, _weight=_empty(config))
        self.layers = nn.ModuleList(
            Layer(config, i, residents[i] if i in model.moe_layers else None)
            for i in range(model.num_layers)
        )
        self.final_norm = RMSNorm(model.d_model, model.norm_eps)
        self.head = (
            None if model.tie_embeddings else Linear(model.d_model, config.vocab_size, model.matmul)
        )
        cos_SH, sin_SH = rotary_table(
            seq_len=config.data.seq_len, head_size=model.head_size, theta=model.rope_theta
        )
        self.register_buffer("cos_SH", cos_SH, persistent=False)
        self.register_buffer("sin_SH", sin_SH, persistent=False)
        initialize(self, seed=config.seed, std=model.init_std, num_layers=model.num_layers)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Output:
        x_BSD = self.embed(tokens_BS)
        routings, stats = {}, {}
        for index in range(len(self.layers)):
            x_BSD, routing, stat = self.run_layer(index, x_BSD)
            if routing is not None and stat is not None:
                routings[index], stats[index] = routing, stat
        return Output(loss=self.loss(x_BSD, targets_BS), routings=routings, stats=stats)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self.embedding(tokens_BS)

    def run_layer(
        self, index: int, x_BSD: Tensor, experts: Mapping[int, Expert] | None = None
    ) -> tuple[Tensor, Routing | None, RouterStats | None]:
        """Run one layer, with its residents or with the experts given."""
        seq = x_BSD.shape[1]
        inputs = (x_BSD, self.cos_SH[:seq], self.sin_SH[:seq], experts)
        if self.recompute == "layers" and torch.is_grad_enabled():
            return checkpoint(self.layers[index], *inputs, use_reentrant=False)
        return self.layers[index](*inputs)

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Vocabulary logits [B, S, V] of the last layer's output."""
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        return linear(self.final_norm(x_BSD), weight_VD, self.matmul)

    def loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean cross-entropy in nats, in fp32."""
        logits_BSV = self.logits(x_BSD)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())

    def moe(self, layer: int) -> MoE:
        """The MoE of a layer that has one."""
        module = self.layers[layer].moe
        assert isinstance(module, MoE)
        return module


def rotary_table(*, seq_len: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, H] of the rotary angles, in fp32."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] / theta ** exponent[None, :]
    angle_SH = torch.cat([angle, angle], dim=-1)
    return angle_SH.cos().float(), angle_SH.sin().float()


def initialize(model: nn.Module, *, seed: int, std: float, num_layers: int) -> None:
    """Draw every parameter from a generator of its own, keyed by seed and name, on CPU in fp32.

    Names carry layer and expert id, so an expert starts the same wherever it is placed, and what
    else a site holds does not matter. Projections into the residual stream are scaled by
    1 / sqrt(2 L) (GPT-2).
    """
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
            continue
        into_residual = name.endswith((".down", "o_proj.weight"))
        scale = std / math.sqrt(2 * num_layers) if into_residual else std
        generator = torch.Generator().manual_seed(stable_seed(seed, name))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal in every process and Python version."""
    digest = hashlib.sha256(":".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _empty(config: Config) -> Tensor:
    return torch.empty(config.vocab_size, config.model.d_model)


def _allocate_together(parameters: list[nn.Parameter]) -> None:
    """Uninitialised parameters of one shape become views of one buffer, as backends read them."""
    if parameters:
        whole = torch.empty(len(parameters), *parameters[0].shape)
        for own, parameter in zip(whole, parameters, strict=True):
            parameter.data = own


def _slots(experts: tuple[int, ...], num_experts: int) -> Tensor:
    slot_E = torch.full((num_experts,), len(experts))
    if experts:
        slot_E[list(experts)] = torch.arange(len(experts))
    return slot_E
