"""The syncs of adapters: the segment mean, and servers of baselines, which compute new adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fomoe.adapters.client import Client
from fomoe.adapters.layers import initial_matrix
from fomoe.adapters.nesting import scale_at
from fomoe.adapters.server import RULES, Matrices, Server, Upload, product_error, stack
from fomoe.adapters.shapes import A, B
from fomoe.planning import RunPlan
from fomoe.segments import Segment, contribution_weight
from fomoe.site import Site
from fomoe.state import Layout, entry
from fomoe.sync.sync import Exchanged, Prepared, Sync
from fomoe.sync.transport import Transport


class ClientsSync(Sync):
    """The sync of every method: each range of rows is averaged over its holders.

    Attributes:
        product_error: of the last sync, how far the product of these means is from the mean of the
            clients' products; None where other processes have clients, whose matrices are not here.
    """

    def __init__(
        self, plan: RunPlan, sites: Mapping[int, Site], transport: Transport, *, pin: bool = False
    ) -> None:
        super().__init__(plan, sites, transport, pin=pin)
        adapters = plan.config.adapters
        self.scale = scale_at(adapters, max(adapters.ranks))
        self.product_error: float | None = None

    def _average(self, prepared: Prepared) -> dict[int, Tensor]:
        if not self.transport.remote:
            uploads = self.uploads(prepared)
            self.product_error = product_error(uploads, self.server()) if uploads else None
        return super()._average(prepared)

    def figures(self) -> dict[str, Any]:
        return {} if self.product_error is None else {"product_error": self.product_error}

    def uploads(self, prepared: Prepared) -> list[Upload]:
        """What the clients with a weight above 0 send, in the clients' order."""
        found = []
        for index, site in self.sites.items():
            weight = contribution_weight(
                site.segments[0],
                index,
                rule=self.plan.config.sync.weight,
                counts=prepared.counts[index],
            )
            if weight:
                assert isinstance(site, Client)
                # Rows that a client has pruned are still sent as the plan has them, and ignored.
                own = {
                    name: parameter.detach()[: site.kept].to("cpu", copy=True)
                    for name, parameter in site.parameters.items()
                }
                scale = scale_at(self.plan.config.adapters, site.kept)
                found.append(Upload(weight=weight, scale=scale, a=part(own, A), b=part(own, B)))
        return found

    def server(self) -> Server:
        """The server's matrices before this sync: the anchors."""
        whole = whole_matrices(self.plan, self.anchor)
        return Server(scale=self.scale, a=part(whole, A), b=part(whole, B))


class ServerSync(ClientsSync):
    """A sync whose new values a rule computes from all clients' matrices; all are in this process.

    The clients' own rows cross as in every sync, and are counted; the server's result then takes
    the place of their mean.
    """

    def _average(self, prepared: Prepared) -> dict[int, Tensor]:
        means = super()._average(prepared)
        uploads = self.uploads(prepared)
        if not uploads:
            return means
        new_a, new_b = self.new_values(uploads, self.server())
        new = {f"{n}.{A}": t for n, t in new_a.items()} | {f"{n}.{B}": t for n, t in new_b.items()}
        return {
            bucket.index: torch.cat(
                [(self.anchor(s) - rows_of(new[s.parameter], s)).flatten() for s in bucket.segments]
            )
            for bucket in self.buckets
        }

    def new_values(self, uploads: list[Upload], server: Server) -> tuple[Matrices, Matrices]:
        return RULES[self.plan.config.adapters.aggregate](uploads, server)


class StackingSync(ServerSync):
    """FLoRA: the mean product is added to the base, and the adapters start anew.

    Attributes:
        merged: [out, in] that was added to every adapted layer so far.
    """

    def __init__(
        self, plan: RunPlan, sites: Mapping[int, Site], transport: Transport, *, pin: bool = False
    ) -> None:
        super().__init__(plan, sites, transport, pin=pin)
        self.adapted = next(s.adapted for s in sites.values() if isinstance(s, Client))
        self.merged = {
            name: torch.zeros(layer.linear.weight.shape)
            for name, layer in self.adapted.layers.items()
        }
        self._next = self.merged

    def new_values(self, uploads: list[Upload], server: Server) -> tuple[Matrices, Matrices]:
        self._next = {}
        for name, before in self.merged.items():
            a, b = stack(uploads, name)
            self._next[name] = before + b.T @ a
        config = self.plan.config
        done = self._steps // config.local_steps
        fresh = {
            name: initial_matrix(f"{name}.{A}", (len(a), a.shape[1]), config.seed, done)
            for name, a in server.a.items()
        }
        return fresh, {name: torch.zeros_like(b) for name, b in server.b.items()}

    def commit(self, exchanged: Exchanged) -> None:
        super().commit(exchanged)
        self._merge(self._next)

    def _merge(self, merged: Matrices) -> None:
        self.merged = self._next = merged
        for name, layer in self.adapted.layers.items():
            layer.merged = merged[name].to(layer.linear.weight.device)

    # The first client's part of a checkpoint holds what was merged.

    def state_of(self, site: int) -> dict[str, Tensor]:
        own = {entry("merged", n): t for n, t in self.merged.items()} if site == 0 else {}
        return super().state_of(site) | own

    def state_layout(self, site: int) -> Layout:
        layout = super().state_layout(site)
        if site == 0:
            for name, tensor in self.merged.items():
                layout[entry("merged", name)] = (tuple(tensor.shape), torch.float32)
        return layout

    def load_state_of(self, site: int, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_of(site, tensors)
        if site == 0:
            self._merge({name: tensors[entry("merged", name)].clone() for name in self.merged})


def rows_of(matrix: Tensor, segment: Segment) -> Tensor:
    """The rows of a segment in a matrix that has all rows."""
    return matrix.narrow(0, segment.start, segment.stop - segment.start)


def part(matrices: Mapping[str, Tensor], which: str) -> Matrices:
    """The A or the B of every layer, by the layer's name."""
    end = f".{which}"
    return {n.removesuffix(end): t for n, t in matrices.items() if n.endswith(end)}


def whole_matrices(plan: RunPlan, read: Callable[[Segment], Tensor]) -> Matrices:
    """Every adapter matrix with all its rows, from its segments."""
    found: dict[str, list[Segment]] = {}
    for bucket in plan.segment_plan.buckets:
        for segment in bucket.segments:
            found.setdefault(segment.parameter, []).append(segment)
    return {
        name: torch.cat([read(s) for s in sorted(segments, key=lambda s: s.start)])
        for name, segments in found.items()
    }
