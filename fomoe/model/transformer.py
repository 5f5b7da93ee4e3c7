"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU experts.

A model holds the experts of its resident set and no others. It can be run layer by layer with
experts that are passed in, which is how the merged model is evaluated without existing anywhere.

Shapes: B batch, S sequence, T = B x S tokens, D model, H head size, E all experts, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe.config import Config
from fomoe.model.attention import Attention
from fomoe.model.elementwise import RMSNorm
from fomoe.model.experts import Expert, Experts, SwiGLU, run_experts, slots
from fomoe.model.matmul import Linear, check_matmul, linear
from fomoe.model.router import Router, RouterStats, Routing
from fomoe.shapes import ParameterSpec, parameter_specs

T = TypeVar("T")

Residents = Mapping[int, tuple[int, ...]]


class MoE(nn.Module):
    """Router, resident experts and, if there is one, the shared expert."""

    def __init__(
        self, config: Config, residents: tuple[int, ...], trained: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        model = config.model
        self.num_experts = model.num_experts
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
        self.experts = Experts(model, residents, trained)

    def forward(
        self,
        x_TD: Tensor,
        experts: Mapping[int, Expert] | None = None,
        scope_TE: Tensor | None = None,
        router_ED: Tensor | None = None,
    ) -> tuple[Tensor, Routing, RouterStats]:
        """Route and run T tokens.

        Args:
            experts: run instead of the residents.
            scope_TE: bool, the experts that each token may choose.
            router_ED: their router's rows, if this model's router has only a part of them.
        """
        if experts is None:
            residents_E, number = self.experts.resident_E, len(self.experts)
            routing, stats = self.router(x_TD, residents_E, number, scope_TE)
            y_TD = self.experts(x_TD, routing)
        else:
            num_experts = self.num_experts if router_ED is None else len(router_ED)
            slot_E = slots(tuple(experts), num_experts).to(x_TD.device)
            residents_E, number = slot_E < len(experts), len(experts)
            routing, stats = self.router(x_TD, residents_E, number, scope_TE, router_ED)
            y_TD = run_experts(x_TD, routing, experts, slot_E)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD, routing, stats


class Layer(nn.Module):
    """Pre-norm attention and FFN; the FFN is an MoE or a dense SwiGLU."""

    def __init__(
        self,
        config: Config,
        index: int,
        residents: tuple[int, ...] | None,
        trained: tuple[int, ...] | None,
    ) -> None:
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
        self.moe = None if residents is None else MoE(config, residents, trained)

    def forward(
        self,
        x_BSD: Tensor,
        cos_SH: Tensor,
        sin_SH: Tensor,
        experts: Mapping[int, Expert] | None = None,
        scope_TE: Tensor | None = None,
        router_ED: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None, RouterStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SH, sin_SH)
        y_BSD = self.ffn_norm(x_BSD)
        if self.moe is None:
            assert self.ffn is not None
            return x_BSD + self.ffn(y_BSD), None, None
        y_TD, routing, stats = self.moe(y_BSD.flatten(0, 1), experts, scope_TE, router_ED)
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
        trained: those that are trained, per MoE layer; None: all.
        initial: draw the initial weights; else `initialize` has to be called.
    """

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(
        self,
        config: Config,
        residents: Residents,
        trained: Residents | None = None,
        *,
        initial: bool = True,
    ) -> None:
        super().__init__()
        model = config.model
        check_matmul(model.matmul)
        self.matmul, self.recompute = model.matmul, model.recompute
        self.embedding = nn.Embedding(config.vocab_size, model.d_model, _weight=_empty(config))
        self.layers = nn.ModuleList(
            Layer(config, i, residents.get(i), None if trained is None else trained.get(i))
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
        if initial:
            parameters = dict(self.named_parameters())
            initialize(self, config, lambda name, row: _row(parameters[name], row))

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor, scope_TE: Tensor | None = None
    ) -> Output:
        """Run B sequences; `scope_TE` is a bool mask of the experts that each token may choose."""
        x_BSD = self.embed(tokens_BS)
        routings, stats = {}, {}
        for index in range(len(self.layers)):
            x_BSD, routing, stat = self.run_layer(index, x_BSD, scope_TE=scope_TE)
            if routing is not None and stat is not None:
                routings[index], stats[index] = routing, stat
        return Output(loss=self.loss(x_BSD, targets_BS), routings=routings, stats=stats)

    def within(self, work: Callable[[], T]) -> T:
        """Call `work`, which uses parts of this model; where ranks share its parameters, those
        outside the layers are gathered meanwhile."""
        return work()

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self.embedding(tokens_BS)

    def run_layer(
        self,
        index: int,
        x_BSD: Tensor,
        experts: Mapping[int, Expert] | None = None,
        *,
        scope_TE: Tensor | None = None,
        router_ED: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None, RouterStats | None]:
        """Run one layer, with its residents or with the experts (and router rows) given."""
        seq = x_BSD.shape[1]
        inputs = (x_BSD, self.cos_SH[:seq], self.sin_SH[:seq], experts, scope_TE, router_ED)
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

    def places(self, spec: ParameterSpec) -> Iterator[tuple[str, str, int | None]]:
        """Tensors of a parameter that are held here.

        Yields, for each, its name, the name of the module's parameter that holds it, and its row
        there (None: the whole).
        """
        if spec.kind != "expert":
            yield spec.name, spec.name, None
            return
        assert spec.layer is not None
        stack, _, part = spec.name.rpartition(".")
        experts = self.moe(spec.layer).experts
        for expert in experts.ids:
            place, row = experts.place(part, expert)
            yield spec.row_name(expert), f"{stack}.{place}", row


def rotary_table(*, seq_len: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, H] of the rotary angles, in fp32."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] / theta ** exponent[None, :]
    angle_SH = torch.cat([angle, angle], dim=-1)
    return angle_SH.cos().float(), angle_SH.sin().float()


@torch.no_grad()
def initialize(
    model: Transformer, config: Config, place: Callable[[str, int | None], tuple[Tensor, int]]
) -> None:
    """Draw every tensor from a generator of its own, keyed by seed and name, on CPU in fp32.

    Names carry layer and expert id, so an expert starts the same wherever it is placed, and what
    else a site holds does not matter. Projections into the residual stream are scaled by
    1 / sqrt(2 L) (GPT-2).

    Args:
        place: the memory of a parameter of the model, or of one row of a stack, and which of the
            tensor's own rows comes first there: a rank of a site has only some of them.
    """
    for spec in parameter_specs(config):
        std = config.model.init_std / (
            math.sqrt(2 * config.model.num_layers) if spec.residual else 1
        )
        shape = spec.shape[1:] if spec.kind == "expert" else spec.shape
        for name, parameter, row in model.places(spec):
            target, first = place(parameter, row)
            if spec.kind == "norm":
                target.fill_(1)
            elif target.numel():
                generator = torch.Generator().manual_seed(stable_seed(config.seed, name))
                drawn = torch.randn(shape, generator=generator)[first : first + len(target)]
                target.copy_(drawn * std)


def _row(parameter: Tensor, row: int | None) -> tuple[Tensor, int]:
    return (parameter if row is None else parameter[row]), 0


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal in every process and Python version."""
    digest = hashlib.sha256(":".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _empty(config: Config) -> Tensor:
    return torch.empty(config.vocab_size, config.model.d_model)
