"""`fomoe eval` of a run with adapters: the server's at every rank, and every client's own."""

from __future__ import annotations

import math
from typing import Any

import torch

from fomoe.adapters.client import Client
from fomoe.adapters.data import PairStream, build_client_data
from fomoe.adapters.evaluate import evaluate_server
from fomoe.adapters.exporting import merged_values
from fomoe.adapters.layers import load_adapted
from fomoe.errors import DataError
from fomoe.sync.transport import InMemoryTransport
from fomoe.whole import WholeModel


def evaluate_adapters(whole: WholeModel, device: torch.device) -> dict[str, Any]:
    """Loss and perplexity at every rank on the overall held-out part, and of every client on its
    own part at its own rank.

    Raises:
        DataError: if the base or a held-out part is no longer that of the run.
    """
    config = whole.config
    data = build_client_data(config, range(config.num_sites), tokenizer_dir=whole.run_dir)
    for name, own in data.fingerprints.items():
        if whole.fingerprints.get(name, own) != own:
            raise DataError(f"the {name} is no longer that of {whole.run_dir}: it has changed")
    adapted = load_adapted(config.adapters, device)
    for name, change in merged_values(whole.parts[0], whole).items():
        adapted.layers[name].merged = change.to(device)
    clients = {}
    for number, part in enumerate(whole.parts):
        clients[number] = Client(
            whole.plan, number, stream=PairStream([], seed=0, client=number), adapted=adapted,
            device=device,
        )  # fmt: skip
        tensors = {n: part.read(n) for n in part.kept if n.startswith("param/")}
        clients[number].load_state(tensors, {**part.values, "data": {"position": 0}})
    transport = InMemoryTransport(range(config.num_sites))
    more = evaluate_server(whole.plan, clients, transport, data).more
    own_losses = more["val_loss_by_client"]
    return {
        "run_dir": str(whole.run_dir),
        "round": whole.round_idx,
        "text": "held-out part",
        "sequences": len(data.held_out),
        "tokens": int((data.held_out[:, 1:] >= 0).sum()),
        "ranks": {rank: _figures(loss) for rank, loss in more["val_loss_by_rank"].items()},
        "clients": [None if loss is None else _figures(loss) for loss in own_losses],
        "energy": more["energy"],
    }


def _figures(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}
