"""What a site's routers did since the last sync; the sums are over all ranks of the site.

Shapes: L MoE layers, E experts (with copies: of the site's set).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.model.router import RouterStats
from fomoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class RoundRouting:
    """Routing of one site over a round.

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


class RoundCounter:
    """Counts of one site, equal at all of its ranks.

    Args:
        num_layers, num_experts: L and E.
        device: where the counts are kept.
        ranks: the ranks of the site.
    """

    def __init__(
        self, num_layers: int, num_experts: int, device: torch.device, ranks: Ranks
    ) -> None:
        self._ranks, self._layers, self._experts = ranks, num_layers, num_experts
        self._device = device
        self._reset()

    def _reset(self) -> None:
        layers, experts = self._layers, self._experts
        counts = {"dtype": torch.int64, "device": self._device}
        self.selected_LE = torch.zeros(layers, experts, **counts)
        self.executed_LE = torch.zeros(layers, experts, **counts)
        self._skipped_L = torch.zeros(layers, **counts)
        self._unserved_L = torch.zeros(layers, **counts)
        self._entropy_L = torch.zeros(layers, device=self._device)
        self._step_selected_L = torch.zeros(layers, **counts)
        self._step_executed_L = torch.zeros(layers, **counts)
        self._step_skipped_L = torch.zeros(layers, **counts)
        self.tokens = 0
        self._batches = 0

    @torch.no_grad()
    def add(self, stats: dict[int, RouterStats], tokens: int) -> Tensor | None:
        """Add one micro-batch, of which every rank has a part.

        Args:
            stats: of this rank's part, per MoE layer.
            tokens: of the whole micro-batch.

        Returns:
            The assignments of the whole micro-batch per layer and expert, [L, E]; None without MoE
            layers.
        """
        self.tokens += tokens
        self._batches += 1
        if not stats:
            return None
        layers = list(stats.values())
        own = [
            torch.stack([s.selected_E for s in layers]),
            torch.stack([s.executed_E for s in layers]),
            torch.stack([s.skipped for s in layers]).unsqueeze(-1),
            torch.stack([s.unserved for s in layers]).unsqueeze(-1),
        ]
        widths = [part.shape[-1] for part in own]
        # One message, however many layers there are.
        selected_LE, executed_LE, skipped_L1, unserved_L1 = self._ranks.sum(
            torch.cat(own, dim=-1)
        ).split(widths, dim=-1)
        self.selected_LE += selected_LE
        self.executed_LE += executed_LE
        self._skipped_L += skipped_L1.squeeze(-1)
        self._unserved_L += unserved_L1.squeeze(-1)
        self._entropy_L += torch.stack([s.entropy for s in layers])
        self._step_selected_L += selected_LE.sum(-1)
        self._step_executed_L += executed_LE.sum(-1)
        self._step_skipped_L += skipped_L1.squeeze(-1)
        return selected_LE

    def end_step(self) -> tuple[Tensor, Tensor]:
        """End an inner step.

        Returns:
            Executed share of the step per layer, [L], and the mean skipped and executed share.
        """
        selected_L = self._step_selected_L.clamp_min(1)
        executed_L = self._step_executed_L / selected_L
        if len(selected_L):
            shares = torch.stack([(self._step_skipped_L / selected_L).mean(), executed_L.mean()])
        else:
            shares = torch.tensor([0.0, 1.0], device=self._device)  # dense: everything runs
        for counter in (self._step_selected_L, self._step_executed_L, self._step_skipped_L):
            counter.zero_()
        return executed_L, shares

    def routing(self) -> RoundRouting:
        """Counts of the round so far."""
        entropy_L = self._ranks.sum(self._entropy_L) / self._ranks.size
        return RoundRouting(
            selected_LE=self.selected_LE.cpu(),
            executed_LE=self.executed_LE.cpu(),
            skipped_L=self._skipped_L.cpu(),
            unserved_L=self._unserved_L.cpu(),
            entropy_L=entropy_L.cpu() / max(self._batches, 1),
            tokens=self.tokens,
        )

    def end_round(self) -> RoundRouting:
        """Return the round's counts and start again."""
        routing = self.routing()
        self._reset()
        return routing
