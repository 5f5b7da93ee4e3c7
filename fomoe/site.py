"""One site: its resident model, its inner optimizer and its data; it runs local steps.

A site never talks to another one; the sync does, between rounds. Where several ranks train it, each
runs this code on its part of every batch, and `fomoe.ranks` adds up what belongs to the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fomoe.config import Config, InnerConfig
from fomoe.copies import num_sets, set_of_site, set_size, site_config
from fomoe.counting import RoundCounter, RoundRouting
from fomoe.data.stream import Stream
from fomoe.errors import DataError
from fomoe.model.backends.choice import choose_backend
from fomoe.model.router import load_balancing_loss
from fomoe.model.transformer import Output, Transformer, initialize
from fomoe.planning import RunPlan
from fomoe.ranks import ONE_RANK, Ranks
from fomoe.segments import RoundCounts, Segment
from fomoe.shards import rank_rows
from fomoe.state import Layout, by_key, divergence, entry, optimizer_layout
from fomoe.textchoice import NUM_COUNTERS, count_ngrams, ngram_length

STEP_FIELDS = ("loss", "lb_loss", "z_loss", "grad_norm", "skipped_fraction", "executed_fraction")


class Site:
    """A site's model, optimizer and data.

    Args:
        plan: the experiment, and which site holds and trains what; that of this rank.
        site: this site's id.
        stream: this site's token sequences, the same at all of its ranks.
        device: where the model lives.
        ranks: the ranks of this site.

    Attributes:
        segments: those that this site holds; of a site of several ranks, what this rank exchanges
            with other sites and saves.
        stored: what lies in this rank's memory; without shards, also what its siblings exchange.
        counter: what its routers did since the last sync.
        text_counts_N: n-grams of the text trained on, int64 [N]; None without copies of experts.
        parameters: the model's parameters by name; `trainable` are those with gradients.
    """

    def __init__(
        self,
        plan: RunPlan,
        site: int,
        *,
        stream: Stream,
        device: torch.device,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        config = plan.config
        self.config, self.site, self.stream, self.device = config, site, stream, device
        self.ranks = ranks
        bf16 = uses_bf16(config.inner.precision, device)
        # With copies, the model here is one of this site's set, whose experts are numbered from 0.
        self.first_expert = set_of_site(config, site) * set_size(config)
        self.segments = plan.segment_plan.segments_at(site)
        self.stored = plan.memory_plan.segments_at(site)
        self.parameters = self._build(plan)
        self.trainable = {
            name: p for name, p in self.parameters.items() if p.requires_grad and p.numel()
        }
        self.optimizer = build_inner_optimizer(config.inner, self.trainable)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.step_idx = 0
        # What the merged model chooses a set of copies by; no sync reads it.
        self.text_counts_N = (
            torch.zeros(NUM_COUNTERS, dtype=torch.int64) if num_sets(config) > 1 else None
        )
        layers, experts = len(config.model.moe_layers), set_size(config)
        self.counter = RoundCounter(layers, experts, device, ranks)

    def _build(self, plan: RunPlan) -> dict[str, nn.Parameter]:
        """Make the model; returns its parameters by name."""
        # Checked before anything is built: a backend that cannot run here is a user's mistake.
        self.expert_backend = expert_backend(self.config, self.device)
        residents = _from(self.first_expert, plan.placement.residents(self.site))
        trained = _from(self.first_expert, plan.placement.trained(self.site))
        config = site_config(self.config)
        # The weights are drawn once every rank has only its own part of them.
        self.model = Transformer(config, residents, trained, initial=False)
        self._engine = self.ranks.parallelize(self.model, self.device)
        self._whole = dict(self.model.named_parameters())
        self.parameters = {name: self.ranks.local(p) for name, p in self._whole.items()}
        initialize(self.model, config, self._rows_in_memory)
        return self.parameters

    def _rows_in_memory(self, name: str, row: int | None) -> tuple[Tensor, int]:
        """What is here of a parameter, or of one row of a stack, and the first row of it."""
        local = self.parameters[name].detach()
        return (local if row is None else local[row]), self._first_row(name)

    def _first_row(self, name: str) -> int:
        """First of the rows of a parameter (of a stack: of each expert's matrix) that are here."""
        if not self.ranks.shards:
            return 0
        shape = self._whole[name].shape
        num_rows = shape[1] if len(shape) == 3 else shape[0]
        return rank_rows(num_rows, self.ranks.rank, self.ranks.size)[0]

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
        inner = self.config.inner
        self.model.train()
        for parameter in self._whole.values():
            parameter.grad = None
        total = torch.zeros(3, device=self.device)
        for part in range(inner.accumulation_steps):
            batch, tokens = self._next_batch()
            last = part + 1 == inner.accumulation_steps
            with self.ranks.micro_batch(self._engine, last=last):
                with self.autocast:
                    output = self._engine(batch[:, :-1], batch[:, 1:])
                selected_LE = self.counter.add(output.stats, tokens)
                loss, losses = self._total_loss(output, selected_LE)
                (loss / inner.accumulation_steps).backward()
            total += losses / inner.accumulation_steps
        for name, parameter in self.trainable.items():
            grad = self.ranks.local_grad(self._whole[name])
            # An expert without tokens gets a zero gradient, so that the step does not depend on
            # how a backend treats empty experts.
            parameter.grad = torch.zeros_like(parameter) if grad is None else grad
        return self.ranks.sum(total) / self.ranks.size

    def _next_batch(self) -> tuple[Tensor, int]:
        """This rank's part of the site's next micro-batch, and the tokens of all of it."""
        whole = torch.from_numpy(self.stream.next_batch(self.config.batch_sizes[self.site]))
        self._check_tokens(whole)
        if self.text_counts_N is not None:
            self.text_counts_N += count_ngrams(whole[:, :-1], ngram_length(self.config))
        own = whole.chunk(self.ranks.size)[self.ranks.rank]
        return own.to(self.device, non_blocking=True), whole[:, 1:].numel()

    def _total_loss(self, output: Output, selected_LE: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss with its router losses, and a vector of the first STEP_FIELDS.

        Over ranks of equal parts, the mean is the loss of the site's whole micro-batch.
        """
        router, stats = self.config.router, list(output.stats.values())
        lb_losses = [s.lb_loss for s in stats]
        if self.ranks.size > 1 and selected_LE is not None:
            lb_losses = [
                load_balancing_loss(selected_E=selected_E, mean_E=s.mean_E)
                for selected_E, s in zip(selected_LE, stats, strict=True)
            ]
        lb_loss = _mean_over_layers(lb_losses, output.loss)
        z_loss = _mean_over_layers([s.z_loss for s in stats], output.loss)
        loss = output.loss + router.z_loss * z_loss
        if router.balance != "bias":
            loss = loss + router.lb_loss * lb_loss
        return loss, torch.stack([output.loss, lb_loss, z_loss]).detach()

    def apply(self, losses: Tensor) -> Tensor:
        """Clip the present gradients and take the step; returns the step's record."""
        inner = self.config.inner
        # The norm is over this site's gradients only; sites do not share statistics.
        limit = inner.clip_norm or math.inf
        parameters = list(self.trainable.values())
        grad_norm = self.ranks.total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, limit, grad_norm)
        lr = learning_rate(inner, self.step_idx, self.config.schedule_horizon)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step_idx += 1
        executed_L, shares = self.counter.end_step()
        self._steer(executed_L)
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
        for segment in self.stored:
            if segment.is_expert:
                rows = read(segment.name)
            else:
                rows = read(segment.parameter)[segment.start : segment.stop]
            self.view(segment).copy_(rows if segment.cut is None else rows[slice(*segment.cut)])
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

    def _place(self, segment: Segment) -> tuple[str, int | slice | tuple[int, slice]]:
        """The parameter that holds a segment, and its rows there; no other code knows this."""
        low, high = segment.cut or (0, segment.stop - segment.start)
        if not segment.is_expert:
            name = segment.parameter
            first = segment.row - (0 if segment.cut is None else self._first_row(name))
            return name, slice(first + low, first + high)
        assert segment.layer is not None
        stack, _, part = segment.parameter.rpartition(".")
        place, row = self.model.moe(segment.layer).experts.place(part, segment.row)
        name = f"{stack}.{place}"
        if segment.cut is None:
            return name, row
        first = self._first_row(name)
        return name, (row, slice(low - first, high - first))

    # ---------------------------------------------------------------------------------- counting

    def _check_tokens(self, batch: Tensor) -> None:
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"token {low if low < 0 else high} in the training data is not below "
                f"model.vocab_size {self.config.vocab_size} and from 0 up"
            )

    def _steer(self, executed_L: Tensor) -> None:
        """Move the execute bias towards its target."""
        target = self.config.router.execute_target
        if target is not None:
            for row, layer in enumerate(self.config.model.moe_layers):
                bias = self.model.moe(layer).router.execute_bias
                bias += self.config.router.execute_rate * (target - executed_L[row])

    def routing(self) -> RoundRouting:
        """Counts of the round so far."""
        return self.counter.routing()

    def end_round(self) -> RoundRouting:
        """Return the round's counts and reset the counters."""
        return self.counter.end_round()

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
        return tensors | self._biases_and_counts(), {
            "step_idx": self.step_idx,
            "data": self.stream.state(),
        }

    def _biases_and_counts(self) -> dict[str, Tensor]:
        """State that belongs to no segment; equal at all ranks of the site."""
        tensors = {}
        for layer in self.config.model.moe_layers:
            router = self.model.moe(layer).router
            tensors[entry("router", "balance_bias", layer)] = router.balance_bias_E
            tensors[entry("router", "execute_bias", layer)] = router.execute_bias
        if self.text_counts_N is not None:
            tensors[entry("text", "counts")] = self.text_counts_N
        return tensors

    def _changing(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.trainers]

    def divergence(self) -> str:
        """Says what in this site's state is not finite; empty if everything is."""
        return divergence(self.state()[0])

    def state_layout(self, segments: Iterable[Segment]) -> Layout:
        """Shapes and types of the tensors that `state` returns after the first step.

        Args:
            segments: of this site; those of all its ranks together, in a whole checkpoint.
        """
        changing = [segment for segment in segments if segment.trainers]
        own = self._biases_and_counts().items()
        layout: Layout = {entry("param", s.name): (s.shape, torch.float32) for s in changing}
        layout |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own}
        trained = [s for s in changing if self._whole[self._place(s)[0]].requires_grad]
        return layout | optimizer_layout(
            lambda trial: build_inner_optimizer(self.config.inner, {"trial": trial}),
            {segment.name: segment.shape for segment in trained},
            "inner",
        )

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state` returned; without shards, of all ranks of the site together."""
        self.optimizer.state.clear()
        inner = by_key(tensors, "inner")
        for segment in self.stored:
            if not segment.trainers:
                continue
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
