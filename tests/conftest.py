"""Small worlds for tests: tiny configs, random text, sites in memory or over gloo threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_study import STAND_IN
from torch import Tensor

from fomoe.config import Config
from fomoe.data.dataset import Data
from fomoe.load import build_config
from fomoe.model.transformer import Transformer
from fomoe.overrides import set_option
from fomoe.planning import RunPlan, plan_run
from fomoe.run import Run
from fomoe.shapes import parameter_specs
from fomoe.site import Site
from fomoe.summary import Totals
from fomoe.sync.ddp import GradientSync
from fomoe.sync.gloo import GlooTransport
from fomoe.sync.sync import Sync
from fomoe.sync.transport import InMemoryTransport, Transport, failure_text
from fomoe.systems import system_of
from fomoe.training import run_local_steps, synchronize

torch.set_num_threads(1)
# Optimizers import it at their first step, which two threads must not do at once.
import_module("torch._dynamo")

_TINY: dict[str, Any] = {
    "num_sites": 4,
    "local_steps": 2,
    "rounds": 3,
    "model.vocab_size": 32,
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_experts": 8,
    "model.top_k": 2,
    "model.expert_ffn_dim": 12,
    "placement.replication_factor": 2,
    "inner.batch_size": 2,
    "inner.lr": 1e-2,
    "inner.warmup_fraction": 0.0,
    "data.source": "nothing.npy",
    "data.tokenizer": "none",
    "data.seq_len": 16,
    "sync.timeout_s": 30.0,
}

# One of every kind of layout: which parameters exist, who holds them, whose updates count.
LAYOUTS: dict[str, dict[str, Any]] = {
    "cyclic": {},
    "one holder": {"placement.replication_factor": 1, "model.tie_embeddings": True},
    "one holder, local": {"placement.replication_factor": 1, "sync.single_holder": "local"},
    "dense first layer": {
        "model.num_dense_layers": 1,
        "model.dense_ffn_dim": 20,
        "model.num_layers": 3,
    },
    "router rows": {"sync.router_rows": "holders", "placement.replication_factor": 1},
    "shared expert": {
        "model.shared_expert_ffn_dim": 10,
        "model.qk_norm": "full",
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
    },
    "uneven": {"num_sites": 3, "model.num_experts": 5, "model.qk_norm": "head"},
    "common": {
        "placement.kind": "common",
        "placement.num_common": 3,
        "placement.replication_factor": None,
    },
    "capacity": {"placement.capacity": [8, 5, 2, 1], "placement.replication_factor": None},
    "table": {
        "num_sites": 3,
        "model.num_experts": 4,
        "placement.kind": "table",
        "placement.replication_factor": None,
        "placement.table": [[0], [2, 0], [1, 2], [0, 1, 2]],
    },
    "diloco": {"method": "diloco"},
    "ddp": {"method": "ddp"},
    "spes": {"method": "spes"},
    "spes, router rows": {"method": "spes", "sync.router_rows": "holders"},
    "resident-routing": {"method": "resident-routing"},
    "dense": {"method": "dense"},
    "diloco-half": {"method": "diloco-half", "model.head_dim": 6},
    "single": {"method": "single"},
    "copies, tied": {"method": "copies", "placement.grow_at": 1.0},
    "copies, apart": {"method": "copies", "placement.grow_at": 0.0},
    "copies, one holder": {
        "method": "copies",
        "placement.replication_factor": 1,
        "placement.grow_at": 0.4,
    },
}


def tiny_config(options: Mapping[str, Any] | None = None, **more: Any) -> Config:
    """A config of a tiny model; options are dotted names, or keywords with `__` for the dot."""
    tree: dict[str, Any] = {}
    named = {name.replace("__", "."): value for name, value in more.items()}
    for name, value in {**_TINY, **(options or {}), **named}.items():
        set_option(tree, name, value)
    return build_config(tree)


class RandomStream:
    """Random sequences that a few repeated tokens make learnable; a seed fixes them all."""

    def __init__(self, config: Config, seed: int) -> None:
        self._vocab, self._length = config.vocab_size, config.data.seq_len + 1
        self._random = np.random.default_rng(seed)

    def next_batch(self, batch_size: int) -> np.ndarray:
        low = self._random.integers(0, self._vocab, (batch_size, self._length))
        return np.minimum(low, self._random.integers(0, self._vocab, low.shape)).astype(np.int64)

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        pass


def make_site(config: Config, site: int = 0, *, seed: int | None = None) -> Site:
    """One site on random text."""
    stream = RandomStream(config, 100 + site if seed is None else seed)
    return Site(plan_run(config), site, stream=stream, device=torch.device("cpu"))


class Silent:
    """Stands in for the progress display."""

    def step_callback(self, *_: Any) -> Callable[[Any], None]:
        return lambda _: None


def make_run(config: Config, transport: Transport | None = None) -> Run:
    """The sites of one process, on random text: all of them, or those of the transport."""
    transport = transport or InMemoryTransport(range(config.num_sites))
    sites = {site: make_site(config, site) for site in transport.sites}
    plan = plan_run(config)
    held_out = RandomStream(config, 7).next_batch(5)
    data = Data(
        streams={}, held_out=held_out, unigram_entropy=0.0, fingerprints={}, tokenizer_json=None
    )
    return Run(
        config=config,
        run_dir=Path("unused"),
        plan=plan,
        transport=transport,
        data=data,
        system=system_of(config, torch.device("cpu")),
        sites=sites,
        sync=make_sync(plan, sites, transport),
        progress=Silent(),  # type: ignore[arg-type]
        totals={site: Totals() for site in sites},
    )


def whole_model(config: Config, tensors: Mapping[str, Tensor]) -> Transformer:
    """A model that holds every expert, with the tensors of a merged file."""
    everyone = tuple(range(config.model.num_experts))
    model = Transformer(config, dict.fromkeys(config.model.moe_layers, everyone))
    values = {}
    for spec in parameter_specs(config):
        if spec.kind == "expert":
            values[spec.name] = torch.stack([tensors[spec.row_name(e)] for e in everyone])
        else:
            values[spec.name] = tensors[spec.name]
    model.load_state_dict(values)
    return model


def make_sync(plan: RunPlan, sites: dict[int, Site], transport: Transport) -> Sync:
    kind = GradientSync if plan.config.sync.average == "gradients" else Sync
    return kind(plan, sites, transport)


def one_round(run: Run, round_idx: int = 0) -> dict[int, str]:
    """Local steps and a sync, as in training; returns the replica hashes."""
    run_local_steps(run, round_idx)
    synchronize(run)
    return run.sync.check_replicas()


def parameters_of(run: Run) -> dict[tuple[int, str], Tensor]:
    """Copies of every segment of every site of a process."""
    return {
        (site, segment.name): own.view(segment).clone()
        for site, own in run.sites.items()
        for segment in own.segments
    }


def named_view(site: Site, name: str) -> Tensor:
    """The memory of a segment that a site holds."""
    (segment,) = (segment for segment in site.segments if segment.name == name)
    return site.view(segment)


def anchors_of(run: Run) -> dict[str, Tensor]:
    return {name: anchor.detach().clone() for name, anchor in run.sync.anchors.values.items()}


def assert_same_bits(left: Mapping[Any, Tensor], right: Mapping[Any, Tensor]) -> None:
    """Two sets of tensors are equal to the last bit (0.0 and -0.0 differ, NaN equals itself)."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        bits = [x.detach().contiguous().flatten().view(torch.uint8) for x in (tensor, right[name])]
        assert torch.equal(*bits), f"{name} differs"


_prefixes = count()


def over_gloo(
    members: int | Sequence[int],
    work: Callable[[GlooTransport], Any],
    *,
    timeout_s: float = 30.0,
    join_s: float = 60.0,
) -> list[Any]:
    """Run `work` at every site, each a thread with a gloo transport of its own.

    Returns:
        Per site, in order, what `work` returned or the exception that it raised.
    """
    sites = list(range(members)) if isinstance(members, int) else list(members)
    store, prefix = dist.HashStore(), f"test-{next(_prefixes)}"
    results: dict[int, Any] = dict.fromkeys(sites, TimeoutError("hangs"))

    def main(site: int) -> None:
        try:
            transport = GlooTransport(store, sites, site, timeout_s=timeout_s, prefix=prefix)
            try:
                # A site with nothing to say must not leave while others are still joining.
                store.add(f"{prefix}/joined", 1)
                while store.add(f"{prefix}/joined", 0) < len(sites):
                    time.sleep(0.001)
                results[site] = work(transport)
            except Exception as error:
                transport.close(failure_text(error))
                raise
            transport.close()
        except Exception as error:
            results[site] = error

    threads = [threading.Thread(target=main, args=(site,), daemon=True) for site in sites]
    for thread in threads:
        thread.start()
    end = time.monotonic() + join_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [results[site] for site in sites]


def all_good(results: list[Any]) -> list[Any]:
    """Results of `over_gloo` where no site may fail."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor holds NaN, so that reading one shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's runs train nothing; the file lists the calls of their program."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr("fomoe.study.work.PROGRAM", [sys.executable, "-I", "-S", str(script)])
    return tmp_path / "calls"
