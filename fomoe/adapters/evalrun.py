"""`fomoe eval` of a run with adapters: the server's at every rank, and every client's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fomoe.adapters.answers import scores
from fomoe.adapters.client import Client
from fomoe.adapters.data import CHOICES, PairStream, build_client_data, held_out_pairs
from fomoe.adapters.evaluate import evaluate_server, fetch_matrices
from fomoe.adapters.exporting import merged_values
from fomoe.adapters.layers import load_adapted
from fomoe.adapters.server import Matrices
from fomoe.data.dataset import named_tokenizer
from fomoe.errors import ConfigError, DataError
from fomoe.sync.transport import InMemoryTransport
from fomoe.whole import WholeModel

Figures = dict[str, float | None]


def evaluate_adapters(
    whole: WholeModel,
    device: torch.device,
    *,
    metrics: Sequence[str] = (),
    max_tokens: int = 32,
) -> dict[str, Any]:
    """Loss and perplexity at every rank on the overall held-out part, and of every client on its
    own part at its own rank.

    Args:
        metrics: of `ANSWER_METRICS`, which the figures of pairs have as well.
        max_tokens: of a generated completion.

    Raises:
        ConfigError: for metrics of a run on text, or accuracy where no held-out pair has choices.
        DataError: if the base or a held-out part is no longer that of the run.
        ServiceError: if a metric needs a package that is not there.
    """
    config = whole.config
    answers = _Answers(whole, device, metrics, max_tokens) if metrics else None
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
    ranks = {rank: _figures(loss) for rank, loss in more["val_loss_by_rank"].items()}
    by_client = [None if loss is None else _figures(loss) for loss in own_losses]
    if answers is not None:
        answers.add(ranks, by_client, clients, fetch_matrices(whole.plan, clients, transport))
    return {
        "run_dir": str(whole.run_dir),
        "round": whole.round_idx,
        "text": "held-out part",
        "sequences": len(data.held_out),
        "tokens": int((data.held_out[:, 1:] >= 0).sum()),
        "ranks": ranks,
        "clients": by_client,
        "energy": more["energy"],
    }


def _figures(loss: float) -> Figures:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


class _Answers:
    """The metrics of a run on pairs; refused before anything is computed."""

    def __init__(
        self, whole: WholeModel, device: torch.device, metrics: Sequence[str], max_tokens: int
    ) -> None:
        config = whole.config
        if config.data.format != "prompt-completion":
            rule = "needs a run on pairs (data.format prompt-completion)"
            raise ConfigError("--metrics", ",".join(metrics), rule)
        self.overall, self.own = held_out_pairs(config)
        if "accuracy" in metrics and not any(pair.choices for pair in self.overall):
            rule = f"needs pairs with the field {CHOICES}; none of the held-out ones has it"
            raise ConfigError("--metrics", "accuracy", rule)
        self.scores = scores(
            metrics,
            tokenizer=named_tokenizer(config),
            seq_len=config.data.seq_len,
            batch_size=config.inner.batch_size,
            max_tokens=max_tokens,
            device=device,
        )

    def add(
        self,
        ranks: dict[str, Figures],
        own: list[Figures | None],
        clients: dict[int, Client],
        matrices: Matrices,
    ) -> None:
        """Put the metrics beside the losses: of the server at its ranks, of clients at theirs."""
        adapted = clients[0].adapted
        for rank, figures in ranks.items():
            adapted.put(matrices, int(rank))
            figures |= {name: score(adapted, self.overall) for name, score in self.scores.items()}
        for number, client in clients.items():
            row = own[number]
            if row is not None:
                adapted.put(client.parameters, client.kept)
                for name, score in self.scores.items():
                    row[name] = score(adapted, self.own[number])
