"""A client: a site whose parameters are adapters on a base that it shares with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fomoe.adapters.layers import AdaptedModel, initial_matrix
from fomoe.adapters.nesting import participants, row_ranks, truncations
from fomoe.adapters.pruning import rank_after, tail_norm
from fomoe.data.stream import Stream
from fomoe.evaluate import LocalEvaluation
from fomoe.planning import RunPlan
from fomoe.segments import Segment
from fomoe.site import Site
from fomoe.state import Layout, entry


class Client(Site):
    """A site of federated fine-tuning.

    Args:
        plan: the experiment, and which client holds which rows.
        site: this client's id.
        stream: this client's sequences, as `inputs_and_targets` reads them.
        adapted: the base; the clients of a process share it.
        device: where the adapters live.

    Attributes:
        rank: rows of each of its matrices.
        kept: rows that it uses; fewer after self-pruning.
        adapted: the base.
    """

    def __init__(
        self,
        plan: RunPlan,
        site: int,
        *,
        stream: Stream,
        adapted: AdaptedModel,
        device: torch.device,
    ) -> None:
        self.adapted = adapted
        self.rank = self.kept = plan.config.adapters.ranks[site]
        super().__init__(plan, site, stream=stream, device=device)

    def _build(self, plan: RunPlan) -> dict[str, nn.Parameter]:
        """The matrices that start from the seed; the base is there already."""
        num_rows, seed = max(self.config.adapters.ranks), self.config.seed
        widths = {segment.parameter: segment.shape[1] for segment in self.segments}
        parameters = {
            name: nn.Parameter(
                initial_matrix(name, (num_rows, width), seed)[: self.rank].to(
                    self.device, copy=True
                )
            )
            for name, width in widths.items()
        }
        self._whole = parameters
        return parameters

    def run_local_steps(self, num_steps: int, on_step: Callable[[Tensor], None]) -> list[Tensor]:
        """Take some local steps; none in a round without this client, whose schedule goes on."""
        round_idx = self.step_idx // self.config.local_steps
        if self.site not in participants(self.config.adapters, self.config.seed, round_idx):
            self.step_idx += num_steps
            return []
        if not self.config.adapters.keep_optimizer:
            self.optimizer.state.clear()
        before = self._tail_norm()
        records = super().run_local_steps(num_steps, on_step)
        if self._tail_norm() < before:
            self.kept = self._after_pruning
        return records

    @property
    def _after_pruning(self) -> int:
        share = self.config.adapters.prune_keep
        return self.kept if share is None else rank_after(self.kept, share)

    @torch.no_grad()
    def _tail_norm(self) -> float:
        """Of the rows that self-pruning would remove; 0 without it."""
        if self._after_pruning == self.kept:
            return 0.0
        return float(tail_norm(self.parameters, self._after_pruning, self.kept))

    def _objective(self, loss: Tensor) -> Tensor:
        """The loss, with the penalty of self-pruning."""
        weight = self.config.adapters.prune_weight
        if self._after_pruning == self.kept or not weight:
            return loss
        return loss + weight * tail_norm(self.parameters, self._after_pruning, self.kept)

    def backward(self) -> Tensor:
        """Gradients of one inner step: the mean over micro-batches and over their truncations.

        Returns:
            Vector of the first STEP_FIELDS; the loss is that of the client's own rank.
        """
        config, inner = self.config, self.config.inner
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(3, device=self.device)
        draw = {"seed": config.seed, "step": self.step_idx}
        for part in range(inner.accumulation_steps):
            windows = self._next_windows(inner.batch_size)
            ranks = truncations(config.adapters, self.site, part=part, **draw)
            rows = row_ranks(config.adapters, self.site, len(windows), part=part, **draw)
            for index, rank in enumerate(ranks):
                self.adapted.put(self.parameters, min(rank, self.kept), rows)
                with self.autocast:
                    loss = self.adapted.loss(windows)
                (self._objective(loss) / (len(ranks) * inner.accumulation_steps)).backward()
                if index == 0:
                    total[0] += loss.detach() / inner.accumulation_steps
            self.counter.add({}, int((windows[:, 1:] >= 0).sum()))
        return total

    def _next_windows(self, batch_size: int) -> Tensor:
        windows = torch.from_numpy(self.stream.next_batch(batch_size))
        self._check_tokens(torch.where(windows < 0, -1 - windows, windows))
        return windows.to(self.device, non_blocking=True)

    # A state of the inner optimizer that ends with the round is not part of a checkpoint.

    def inner_views(self, segment: Segment) -> dict[str, Tensor]:
        """The inner optimizer's state of a segment by key, if it is kept between rounds."""
        return super().inner_views(segment) if self.config.adapters.keep_optimizer else {}

    def state_layout(self, segments: Iterable[Segment]) -> Layout:
        """Shapes and types of the tensors that `state` returns after the first step."""
        layout = super().state_layout(segments)
        if self.config.adapters.keep_optimizer:
            return layout
        return {n: kind for n, kind in layout.items() if not n.startswith(entry("inner", ""))}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state()
        return tensors, {**values, "kept": self.kept}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state(tensors, values)
        self.kept = values.get("kept", self.rank)

    @torch.no_grad()
    def losses(self, windows: np.ndarray, rank: int | None = None) -> tuple[float, int]:
        """Sum of the cross-entropy over coded windows, and the number of targets.

        Args:
            rank: of the truncation; None: this client's own.
        """
        self.adapted.put(self.parameters, self.kept if rank is None else rank)
        return summed_loss(self, windows)


@torch.no_grad()
def summed_loss(client: Client, windows: np.ndarray) -> tuple[float, int]:
    """Sum of the cross-entropy with the adapters that are put in, and the number of targets."""
    total, count, size = 0.0, 0, client.config.inner.batch_size
    for start in range(0, len(windows), size):
        batch = torch.from_numpy(windows[start : start + size]).to(client.device)
        with client.autocast:
            total += float(client.adapted.loss(batch, reduction="sum"))
        count += int((batch[:, 1:] >= 0).sum())
    return total, count


def evaluate_client(site: Site, held_out: np.ndarray) -> LocalEvaluation:
    """A client's model at its own rank on the held-out part; it routes nothing."""
    assert isinstance(site, Client)
    total, count = site.losses(held_out)
    probe = torch.empty(0, 0, site.config.model.top_k, dtype=torch.int16)
    return LocalEvaluation(loss=total / count, probe_LTK=probe)
