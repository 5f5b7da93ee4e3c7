"""A tiny base of transformers, and clients with adapters on it, on random text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import RandomStream, Silent, tiny_config
from torch import Tensor

from fomoe.adapters.client import Client
from fomoe.adapters.layers import AdaptedModel, load_adapted
from fomoe.config import Config
from fomoe.data.dataset import Data
from fomoe.planning import plan_run
from fomoe.ranks import ONE_RANK
from fomoe.run import Run
from fomoe.site import Site
from fomoe.summary import Totals
from fomoe.sync.transport import InMemoryTransport, Transport
from fomoe.systems import system_of
from fomoe.whole import open_whole

RANKS = [1, 2, 2, 4]
_KEPT = TemporaryDirectory(prefix="fomoe-base-")


@lru_cache
def base_folder(kind: str = "llama") -> Path:
    """A saved causal model with two layers of width 16 and 257 tokens."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            **shape, **heads, num_key_value_heads=2, intermediate_size=24, initializer_range=0.3
        )
    else:
        config = transformers.GPTNeoXConfig(**shape, **heads, intermediate_size=24)
    folder = Path(_KEPT.name) / kind
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


def adapter_options(**more: Any) -> dict[str, Any]:
    """Options of four clients; keywords with `__` for the dot."""
    options: dict[str, Any] = {
        "method": "prelort",
        "adapters.base": str(base_folder()),
        "adapters.ranks": RANKS,
        "outer.lr": 1.0,
        "outer.momentum": 0.0,
        "sync.weight": "tokens",
        "inner.weight_decay": 0.0,
        "data.source": "python-stdlib",
        "data.tokenizer": "byte",
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return options


def adapter_config(**more: Any) -> Config:
    options = adapter_options(**more)
    plain: dict[str, Any] = {
        "model.vocab_size": None,
        "model.num_layers": 4,
        "model.d_model": 256,
        "model.num_heads": 4,
        "model.expert_ffn_dim": 256,
        "placement.replication_factor": None,
    }
    return tiny_config({**plain, **options})


def client_run(config: Config, transport: Transport | None = None) -> Run:
    """The clients of one process, on random text: all of them, or those of the transport."""
    transport = transport or InMemoryTransport(range(config.num_sites))
    plan, system = plan_run(config), system_of(config, torch.device("cpu"))
    sites: dict[int, Site] = {
        site: system.make_site(plan, site, RandomStream(config, 100 + site), ONE_RANK)
        for site in transport.sites
    }
    data = Data(
        streams={},
        held_out=RandomStream(config, 7).next_batch(5),
        own_held_out={site: RandomStream(config, 8 + site).next_batch(2) for site in sites},
        unigram_entropy=0.0,
        fingerprints={},
        tokenizer_json=None,
    )
    return Run(
        config=config,
        run_dir=Path("unused"),
        plan=plan,
        transport=transport,
        data=data,
        system=system,
        sites=sites,
        sync=system.sync(plan, sites, transport),
        progress=Silent(),  # type: ignore[arg-type]
        totals={site: Totals() for site in sites},
    )


def client_of(run: Run, site: int) -> Client:
    client = run.sites[site]
    assert isinstance(client, Client)
    return client


def fill(client: Client, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers in all of a client's matrices, so that no product is 0; returns copies."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in client.parameters.values():
            parameter.normal_(generator=draw).mul_(0.3)
    return {name: p.detach().clone() for name, p in client.parameters.items()}


def load_server(run_dir: Path) -> tuple[AdaptedModel, dict[str, Tensor]]:
    """The base of a run, and the server's matrices of its newest round."""
    whole = open_whole(run_dir, None)
    adapted = load_adapted(whole.config.adapters, torch.device("cpu"))
    return adapted, {name: whole.read(name) for name in whole.shapes}
