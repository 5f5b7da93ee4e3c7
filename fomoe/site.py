"""One site: its resident model, its inner optimizer and its data; it runs local steps.

A site never talks to another one; the sync does, between rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fomoe.config import Config, InnerConfig
from fomoe.copies import num_sets, set_of_site, set_size, site_config
from fomoe.data.stream import Stream
from fomoe.errors import DataError
from fomoe.model.backends.choice import choose_backend
from fomoe.model.router import RouterStats
from fomoe.model.transformer import Transformer
from fomoe.planning import RunPlan
from fomoe.segments import RoundCounts, Segment
from fomoe.state import Layout, by_key, divergence, entry, optimizer_layout
from fomoe.textchoice import NUM_COUNTERS, count_ngrams, ngram_length

STEP_FIELDS = ("loss", "lb_loss", "z_loss", "grad_norm", "skipped_fraction", "executed_fraction")


@dataclass(frozen=True, kw_only=True)
class RoundRouting:
    """Routing of one site over a round; L MoE layers, E experts (with copies: of the site's set).

    Attributes:
        selected_LE, executed_LE: assignments per layer and expert.
        skipped_L: assignments of the original choice whose expert is absent.
        unserved_L: tokens none of whose assignments ran.
        entropy_L: mean entropy of the router's scores, in nats.
        tokens: tokens trained on.
    """

    selected_LE: Tensor
    executed_LE: Tensor
    skipped_L: Tensor
    unserved_L: Tensor
    entropy_L: Tensor
    tokens: int


class Site:
    """A site's model, optimizer and data.

    Args:
        plan: the experiment, and which site holds and trains what.
        site: this site's id.
        stream: this site's token sequences.
        device: where the model lives.

    Attributes:
        segments: those that this site holds.
        text_counts_N: n-grams of the text trained on, int64 [N]; None without copies of experts.
        parameters: the model's parameters by name; `trainable` are those with gradients.
    """

    def __init__(self, plan: RunPlan, site: int, *, stream: Stream, device: torch.device) -> None:
        config = plan.config
        self.config, self.site, self.stream, self.device = config, site, stream, device
        bf16 = uses_bf16(config.inner.precision, device)
        # With copies, the model here is one of this site's set, whose experts are numbered from 0.
        self.first_expert = set_of_site(config, site) * set_size(config)
        self.segments = plan.segment_plan.segments_at(site)
        self.parameters = self._build(plan)
        self.trainable = {n: p for n, p in self.parameters.items() if p.requires_grad}
        self.optimizer = build_inner_optimizer(config.inner, self.trainable)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.step_idx = 0
        # What the merged model chooses a set of copies by; no sync reads it.
        self.text_counts_N = (
            torch.zeros(NUM_COUNTERS, dtype=torch.int64) if num_sets(config) > 1 else None
        )
        self._reset_round()

    def _build(self, plan: RunPlan) -> dict[str, nn.Parameter]:
        """Make the model; returns its parameters by name."""
        # Checked before anything is built: a backend that cannot run here is a user's mistake.
        self.expert_backend = expert_backend(self.config, self.device)
        residents = _from(self.first_expert, plan.placement.residents(self.site))
        trained = _from(self.first_expert, plan.placement.trained(self.site))
        self.model = Transformer(site_config(self.config), residents, trained)
        self.model.to(self.device)
        return dict(self.model.named_parameters())

    def run_local_steps(self, num_steps: int, on_step: Callable[[Tensor], None]) -> list[Tensor]:
        """Take some local steps; `on_step` is called with the record of each step.

        Returns:
            One fp32 vector of `STEP_FIELDS` per step, on the device.
        """
        records = []
        for _ in range(num_steps):
            losses = self.backward()
            records.append(self.apply(losses))
            on_step(records[-1])
        return records

    def backward(self) -> Tensor:
        """Gradients of one inner step, accumulated over its micro-batches.

        Returns:
            Vector of the first STEP_FIELDS: loss, lb_loss, z_loss.
        """
        inner, router = self.config.inner, self.config.router
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(3, device=self.device)
        for _ in range(inner.accumulation_steps):
            batch = torch.from_numpy(self.stream.next_batch(inner.batch_size))
            self._check_tokens(batch)
            if self.text_counts_N is not None:
                self.text_counts_N += count_ngrams(batch[:, :-1], ngram_length(self.config))
            batch = batch.to(self.device, non_blocking=True)
            with self.autocast:
                output = self.model(batch[:, :-1], batch[:, 1:])
            lb_loss = _mean_over_layers([s.lb_loss for s in output.stats.values()], output.loss)
            z_loss = _mean_over_layers([s.z_loss for s in output.stats.values()], output.loss)
            loss = output.loss + router.z_loss * z_loss
            if router.balance != "bias":
                loss = loss + router.lb_loss * lb_loss
            (loss / inner.accumulation_steps).backward()
            total += torch.stack([output.loss, lb_loss, z_loss]).detach() / inner.accumulation_steps
            self._count(output.stats, batch[:, 1:].numel())
        for parameter in self.trainable.values():
            # An expert without tokens gets a zero gradient, so that the step does not depend on
            # how a backend treats empty experts.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return total

    def apply(self, losses: Tensor) -> Tensor:
        """Clip the present gradients and take the step; returns the step's record."""
        inner = self.config.inner
        # The norm is over this site's gradients only; sites do not share statistics.
        limit = inner.clip_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(list(self.trainable.values()), limit)
        lr = learning_rate(inner, self.step_idx, self.config.schedule_horizon)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step_idx += 1
        shares = self._steer_and_reset_step()
        return torch.cat([losses, grad_norm.detach().reshape(1), shares])

    # ---------------------------------------------------------------------------------- segments

    def view(self, segment: Segment) -> Tensor:
        """The memory of a segment held here, without a graph; writing to it changes the model."""
        name, rows = self._place(segment)
        return self.parameters[name].detach()[rows]

    @torch.no_grad()
    def start_from(self, read: Callable[[str], Tensor], biases: Collection[str]) -> None:
        """Take the values of a trained model for everything that is held here, and nothing else.

        Args:
            read: a parameter, or one expert's matrix, by name.
            biases: names of the selection biases that the model has; others stay 0.
        """
        for segment in self.segments:
            if segment.is_expert:
                self.view(segment).copy_(read(segment.name))
            else:
                rows = read(segment.parameter)[segment.start : segment.stop]
                self.view(segment).copy_(rows)
        for layer in self.config.model.moe_layers:
            name = f"layers.{layer}.moe.router.balance_bias"
            if name in biases:
                self.model.moe(layer).router.balance_bias_E.copy_(read(name))

    def grad_view(self, segment: Segment) -> Tensor:
        """The memory of a trained segment's gradient."""
        name, rows = self._place(segment)
        grad = self.parameters[name].grad
        assert grad is not None, f"{segment.name} has no gradient"
        return grad[rows]

    def inner_views(self, segment: Segment) -> dict[str, Tensor]:
        """The inner optimizer's state of a segment by key; a scalar is for the whole parameter."""
        name, rows = self._place(segment)
        state = self.optimizer.state.get(self.parameters[name], {})
        return {k: v[rows] if v.ndim else v for k, v in state.items() if v is not None}

    def _place(self, segment: Segment) -> tuple[str, int | slice]:
        """The parameter that holds a segment, and its rows there; no other code knows this."""
        if segment.is_expert:
            assert segment.layer is not None
            stack, _, part = segment.parameter.rpartition(".")
            place, row = self.model.moe(segment.layer).experts.place(part, segment.row)
            return f"{stack}.{place}", row
        return segment.parameter, slice(segment.row, segment.row + segment.stop - segment.start)

    # ---------------------------------------------------------------------------------- counting

    def _check_tokens(self, batch: Tensor) -> None:
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"token {low if low < 0 else high} in the training data is not below "
                f"model.vocab_size {self.config.vocab_size} and from 0 up"
            )

    def _reset_round(self) -> None:
        layers, experts = len(self.config.model.moe_layers), set_size(self.config)
        counts = {"dtype": torch.int64, "device": self.device}
        self._selected_LE = torch.zeros(layers, experts, **counts)
        self._executed_LE = torch.zeros(layers, experts, **counts)
        self._skipped_L = torch.zeros(layers, **counts)
        self._unserved_L = torch.zeros(layers, **counts)
        self._entropy_L = torch.zeros(layers, device=self.device)
        self._step_selected_L = torch.zeros(layers, **counts)
        self._step_executed_L = torch.zeros(layers, **counts)
        self._step_skipped_L = torch.zeros(layers, **counts)
        self._tokens = 0
        self._batches = 0

    @torch.no_grad()
    def _count(self, stats: dict[int, RouterStats], tokens: int) -> None:
        self._tokens += tokens
        self._batches += 1
        if not stats:
            return
        layers = list(stats.values())
        selected_LE = torch.stack([s.selected_E for s in layers])
        executed_LE = torch.stack([s.executed_E for s in layers])
        skipped_L = torch.stack([s.skipped for s in layers])
        self._selected_LE += selected_LE
        self._executed_LE += executed_LE
        self._skipped_L += skipped_L
        self._unserved_L += torch.stack([s.unserved for s in layers])
        self._entropy_L += torch.stack([s.entropy for s in layers])
        self._step_selected_L += selected_LE.sum(-1)
        self._step_executed_L += executed_LE.sum(-1)
        self._step_skipped_L += skipped_L

    def _steer_and_reset_step(self) -> Tensor:
        """Skipped and executed share of this step; moves the execute bias towards its target."""
        selected_L = self._step_selected_L.clamp_min(1)
        executed_L = self._step_executed_L / selected_L
        target = self.config.router.execute_target
        if target is not None:
            for row, layer in enumerate(self.config.model.moe_layers):
                bias = self.model.moe(layer).router.execute_bias
                bias += self.config.router.execute_rate * (target - executed_L[row])
        if len(selected_L):
            shares = torch.stack([(self._step_skipped_L / selected_L).mean(), executed_L.mean()])
        else:
            shares = torch.tensor([0.0, 1.0], device=self.device)  # dense: everything runs
        for counter in (self._step_selected_L, self._step_executed_L, self._step_skipped_L):
            counter.zero_()
        return shares

    def routing(self) -> RoundRouting:
        """Counts of the round so far."""
        return RoundRouting(
            selected_LE=self._selected_LE.cpu(),
            executed_LE=self._executed_LE.cpu(),
            skipped_L=self._skipped_L.cpu(),
            unserved_L=self._unserved_L.cpu(),
            entropy_L=self._entropy_L.cpu() / max(self._batches, 1),
            tokens=self._tokens,
        )

    def end_round(self) -> RoundRouting:
        """Return the round's counts and reset the counters."""
        routing = self.routing()
        self._reset_round()
        return routing

    def round_counts(self, routing: RoundRouting) -> RoundCounts:
        """The counts that this site's contribution weights are computed from."""
        layers = self.config.model.moe_layers
        executed = {
            (layer, expert): count
            for layer, row in zip(layers, routing.executed_LE.tolist(), strict=True)
            for expert, count in enumerate(row, start=self.first_expert)
        }
        return RoundCounts(tokens=routing.tokens, executed=executed)

    def move_balance_bias(self, selected_LE: Tensor) -> None:
        """Raise the selection bias of experts chosen less than average over all sites.

        The sign rule of auxiliary-loss-free balancing (2408.15664), once per round; every site
        gets the same counts, so the biases stay equal.
        """
        rate = self.config.router.bias_rate
        for layer, counts_E in zip(self.config.model.moe_layers, selected_LE, strict=True):
            bias_E = self.model.moe(layer).router.balance_bias_E
            step_E = rate * (counts_E.float().mean() - counts_E.float()).sign()
            bias_E += step_E.to(bias_E.device)

    # -------------------------------------------------------------------------------- checkpoint

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by entry name, and small values: everything that the next round depends on.

        Segments without trainers never change and are left out.
        """
        tensors = {entry("param", s.name): self.view(s) for s in self._changing()}
        for segment in self._changing():
            for key, value in self.inner_views(segment).items():
                tensors[entry("inner", key, segment.name)] = value
        for layer in self.config.model.moe_layers:
            router = self.model.moe(layer).router
            tensors[entry("router", "balance_bias", layer)] = router.balance_bias_E
            tensors[entry("router", "execute_bias", layer)] = router.execute_bias
        if self.text_counts_N is not None:
            tensors[entry("text", "counts")] = self.text_counts_N
        return tensors, {"step_idx": self.step_idx, "data": self.stream.state()}

    def _changing(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.trainers]

    def divergence(self) -> str:
        """Says what in this site's state is not finite; empty if everything is."""
        return divergence(self.state()[0])

    def state_layout(self) -> Layout:
        """Shapes and types of the tensors that `state` returns after the first step."""
        tensors, _ = self.state()
        layout: Layout = {
            name: (tuple(tensor.shape), tensor.dtype)
            for name, tensor in tensors.items()
            if not name.startswith(entry("inner", ""))
        }
        trained = [s for s in self._changing() if self._place(s)[0] in self.trainable]
        return layout | optimizer_layout(
            lambda trial: build_inner_optimizer(self.config.inner, {"trial": trial}),
            {segment.name: segment.shape for segment in trained},
            "inner",
        )

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer.state.clear()
        inner = by_key(tensors, "inner")
        for segment in self._changing():
            self.view(segment).copy_(tensors[entry("param", segment.name)])
            name, rows = self._place(segment)
            for key, value in inner.get(segment.name, {}).items():
                state = self.optimizer.state[self.trainable[name]]
                if not value.ndim:
                    state[key] = value.clone()
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(self.trainable[name])
                state[key][rows].copy_(value)
        for layer in self.config.model.moe_layers:
            router = self.model.moe(layer).router
            router.balance_bias_E.copy_(tensors[entry("router", "balance_bias", layer)])
            router.execute_bias.copy_(tensors[entry("router", "execute_bias", layer)])
        if self.text_counts_N is not None:
            self.text_counts_N.copy_(tensors[entry("text", "counts")])
        self.step_idx = values["step_idx"]
        self.stream.load_state(values["data"])


def _from(first: int, experts: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Experts by layer, numbered from `first` on."""
    return {layer: tuple(expert - first for expert in ids) for layer, ids in experts.items()}


def expert_backend(config: Config, device: torch.device) -> str:
    """The backend of the experts on a device.

    Raises:
        ConfigError: if the requested backend cannot run there.
    """
    bf16 = uses_bf16(config.inner.precision, device)
    return choose_backend(config.model, device, torch.bfloat16 if bf16 else torch.float32)


def build_inner_optimizer(
    inner: InnerConfig, trainable: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW or SGD; matrices are decayed, norms are not."""
    groups = [
        {
            "params": [p for p in trainable.values() if (p.ndim >= 2) == decayed],
            "weight_decay": inner.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    if inner.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=inner.lr, momentum=inner.momentum)
    betas = (inner.beta1, inner.beta2)
    return torch.optim.AdamW(groups, lr=inner.lr, betas=betas, eps=inner.eps, fused=True)


def learning_rate(inner: InnerConfig, step: int, horizon: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr_fraction` at the horizon; constant after it."""
    warmup = round(inner.warmup_fraction * horizon)
    if step < warmup:
        return inner.lr * (step + 1) / warmup
    if inner.schedule == "constant":
        return inner.lr
    done = min(1.0, (step - warmup) / max(1, horizon - warmup))
    floor = inner.min_lr_fraction
    return inner.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """`auto` uses bf16 autocast on an accelerator that supports it; a CPU stays in fp32."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def _mean_over_layers(losses: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(losses).mean() if losses else torch.zeros_like(like.detach())
