"""The server's adapters at every rank, and every client's on its own held-out part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from fomoe.adapters.client import Client, summed_loss
from fomoe.adapters.nesting import cuts_of, mean_passes
from fomoe.adapters.server import Matrices, energy
from fomoe.adapters.shapes import A, B
from fomoe.adapters.sync import part, whole_matrices
from fomoe.data.dataset import Data
from fomoe.evaluate import MergedEvaluation
from fomoe.planning import RunPlan
from fomoe.segments import Segment
from fomoe.site import Site
from fomoe.sync.exchange import Item, fetch, gather
from fomoe.sync.transport import Transport


def evaluate_server(
    plan: RunPlan, sites: Mapping[int, Site], transport: Transport, data: Data
) -> MergedEvaluation:
    """Evaluate right after a sync; every client takes a share of the overall held-out part.

    Returns:
        The loss at the largest rank; `more` has `val_loss_by_rank`, `val_loss_by_client`, what
        each client's own held-out part costs at the client's own rank, `passes_per_step`, mean
        over the clients, and `energy`, the share of every rank dimension in the server's product;
        with self-pruning `kept_ranks`, the ranks that clients still use.
    """
    clients = {index: site for index, site in sites.items() if isinstance(site, Client)}
    matrices = fetch_matrices(plan, clients, transport)
    cuts, members = cuts_of(plan.config.adapters.ranks), transport.members

    def message(site: int) -> bytes:
        client, share = clients[site], data.held_out[members.index(site) :: len(members)]
        own = data.own_held_out.get(site)
        sums = []
        for rank in cuts:
            client.adapted.put(matrices, rank)
            sums.append(summed_loss(client, share))
        own_sums = None if own is None else client.losses(own)
        return json.dumps([sums, own_sums, client.kept]).encode()

    # Computed first: no peer waits for the first message while another still computes.
    messages = {site: message(site) for site in transport.sites}
    rows = [json.loads(text) for text in gather(transport, messages.__getitem__)]
    by_rank = {}
    for position, rank in enumerate(cuts):
        total = math.fsum(row[0][position][0] for row in rows)
        by_rank[rank] = total / sum(row[0][position][1] for row in rows)
    more: dict[str, Any] = {
        "val_loss_by_rank": {str(rank): loss for rank, loss in by_rank.items()},
        "val_loss_by_client": [None if row[1] is None else row[1][0] / row[1][1] for row in rows],
        "passes_per_step": mean_passes(plan.config.adapters),
        "energy": energy(part(matrices, A), part(matrices, B)),
    }
    if plan.config.adapters.prune_keep is not None:
        more["kept_ranks"] = [row[2] for row in rows]
    return MergedEvaluation(loss=by_rank[cuts[-1]], load_LE=[], more=more)


def fetch_matrices(plan: RunPlan, clients: Mapping[int, Client], transport: Transport) -> Matrices:
    """The server's matrices with all rows: each range from one of its holders."""
    segments: dict[str, Segment] = {
        segment.name: segment for bucket in plan.segment_plan.buckets for segment in bucket.segments
    }
    items = [Item(s.name, s.shape, s.holders) for s in segments.values()]
    tensors = fetch(transport, items, lambda site, name: clients[site].view(segments[name]))
    device = next(iter(clients.values())).device
    with torch.no_grad():
        return whole_matrices(plan, lambda segment: tensors[segment.name].to(device))
