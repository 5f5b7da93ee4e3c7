"""What a site has executed since each fragment was last synced: its weights in the next mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fomoe.config import Config
from fomoe.counting import RoundRouting
from fomoe.fragments import fragment_of_layer, streams
from fomoe.segments import RoundCounts
from fomoe.site import Site
from fomoe.state import Layout, entry


class Since:
    """Counts of one site since the last sync of every fragment; P fragments.

    Attributes:
        executed_LE: assignments executed per MoE layer and expert since the layer's last sync.
        tokens_P: tokens trained on since the fragment's last sync.
    """

    def __init__(self, config: Config, site: Site) -> None:
        self._config, self._site = config, site
        self.executed_LE = torch.zeros_like(site.routing().executed_LE)
        self.tokens_P = torch.zeros(config.sync.fragments, dtype=torch.int64)
        self._counted: RoundRouting | None = None

    def end_round(self) -> RoundRouting:
        """Count what is left of a round, and reset the site's own counters."""
        self._add(self._site.routing())
        self._counted = None
        return self._site.end_round()

    def take(self, fragment: int) -> RoundCounts:
        """The counts of a fragment, which start again from 0."""
        routing = self._site.routing()
        self._add(routing)
        found = replace(
            routing, executed_LE=self.executed_LE.clone(), tokens=int(self.tokens_P[fragment])
        )
        for row, layer in enumerate(self._config.model.moe_layers):
            if fragment_of_layer(self._config, layer) == fragment:
                self.executed_LE[row] = 0
        self.tokens_P[fragment] = 0
        return self._site.round_counts(found)

    def _add(self, routing: RoundRouting) -> None:
        """Add what the round has counted since the last call."""
        self.executed_LE += routing.executed_LE
        self.tokens_P += routing.tokens
        if self._counted is not None:
            self.executed_LE -= self._counted.executed_LE
            self.tokens_P -= self._counted.tokens
        self._counted = replace(routing, executed_LE=routing.executed_LE.clone())

    # -------------------------------------------------------------------------------- checkpoint

    def state(self) -> dict[str, Tensor]:
        """Tensors by entry; none where nothing is left at a round's end."""
        if not streams(self._config):
            return {}
        return {
            entry("since", "executed"): self.executed_LE,
            entry("since", "tokens"): self.tokens_P,
        }

    def state_layout(self) -> Layout:
        """Shapes and types of what `state` returns."""
        return {name: (tuple(t.shape), t.dtype) for name, t in self.state().items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, own in self.state().items():
            own.copy_(tensors[name])
