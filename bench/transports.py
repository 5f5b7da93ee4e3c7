"""A whole sync of two sites over this machine's loopback: the link, our transport, and torchft's.

The sites are threads of this process. torchft's rows are left out where it is not installed
(`pip install torchft`); it is not a dependency of this project.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bench.codecs import HOLDERS, NUMEL
from bench.layers import Row
from bench.machine import Machine
from bench.timing import side_by_side
from fomoe.codecs import CODECS
from fomoe.hostmemory import keep_freed_memory
from fomoe.load import build_config
from fomoe.planning import RunPlan, plan_run
from fomoe.site import Site
from fomoe.sync.gloo import GlooTransport
from fomoe.sync.sync import Sync

_WIDTH = 128
_TIMEOUT_S = 60.0

Work = Callable[[], object]


def transport_rows(machine: Machine, numel: int = NUMEL) -> list[Row]:
    """Seconds of one sync of about `numel` fp32 values that both sites hold.

    GB/s are of the fp32 values of a site. `link` sends as many bytes both ways over one TCP
    connection. A sync is a mean, the checks of both sites and the outer step; torchft's also
    renews its quorum and its backup of the parameters.
    """
    keep_freed_memory()  # as a run does
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(HOLDERS)))
        work = {"link": stack.enter_context(_link(pool, numel * 4))}
        for codec in CODECS:
            work[f"sync {codec}"] = stack.enter_context(_our_sync(pool, numel, codec))
        theirs = stack.enter_context(_torchft_sync(pool, numel))
        if theirs is not None:
            work["torchft DiLoCo"] = theirs
        times = side_by_side(work, budget_s=machine.budget_s, clock=machine.clock)
    return [
        {
            "what": what,
            "ms": time.median * 1e3,
            "spread": time.spread,
            "gb_per_s": numel * 4 / time.median / 1e9,
            "over_link": time.over(times["link"]),
        }
        for what, time in times.items()
    ]


def _at_both(pool: ThreadPoolExecutor, works: list[Work]) -> Work:
    def step() -> None:
        for done in [pool.submit(work) for work in works]:
            done.result()

    return step


@contextmanager
def _link(pool: ThreadPoolExecutor, size: int) -> Iterator[Work]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    with left, right, ThreadPoolExecutor(2) as senders:
        data = bytes(size)
        into = [bytearray(size), bytearray(size)]

        def both_ways(own: socket.socket, received: bytearray) -> None:
            sending = senders.submit(own.sendall, data)
            view = memoryview(received)
            while view:
                view = view[own.recv_into(view) :]
            sending.result()

        yield _at_both(pool, [lambda: both_ways(left, into[0]), lambda: both_ways(right, into[1])])


def _plan(numel: int, codec: str) -> RunPlan:
    """Of a model whose parameters are mostly two tables."""
    config = build_config(
        {
            "num_sites": len(HOLDERS),
            "method": "diloco",
            "data": {"source": "random.npy", "tokenizer": "none", "seq_len": 8},
            "sync": {"codec": codec, "weight": "uniform", "timeout_s": _TIMEOUT_S},
            "model": {
                "vocab_size": max(numel // (2 * _WIDTH), 2),
                "num_layers": 1,
                "d_model": _WIDTH,
                "num_heads": 1,
                "num_experts": 2,
                "expert_ffn_dim": 16,
            },
        }
    )
    return plan_run(config)


def _site(plan: RunPlan, site: int) -> Site:
    return Site(plan, site, stream=_Nothing(), device=torch.device("cpu"))


class _Nothing:
    """The stream of a site that takes no step."""

    def next_batch(self, batch_size: int) -> np.ndarray:
        raise AssertionError("no step is taken")

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        pass


@contextmanager
def _our_sync(pool: ThreadPoolExecutor, numel: int, codec: str) -> Iterator[Work]:
    store, plan = dist.HashStore(), _plan(numel, codec)

    def join(index: int) -> tuple[GlooTransport, Sync]:
        transport = GlooTransport(store, HOLDERS, index, timeout_s=_TIMEOUT_S)
        return transport, Sync(plan, {index: _site(plan, index)}, transport)

    joined = list(pool.map(join, HOLDERS))
    try:
        yield _at_both(pool, [lambda sync=sync: sync.sync_fragment(0) for _, sync in joined])
    finally:
        for transport, _ in joined:
            transport.close()


@contextmanager
def _torchft_sync(pool: ThreadPoolExecutor, numel: int) -> Iterator[Work | None]:
    """DiLoCo over the same tensors: an inner step without gradients, and the sync after it."""
    try:
        from torchft.coordination import LighthouseServer
        from torchft.local_sgd import DiLoCo
        from torchft.manager import Manager
        from torchft.process_group import ProcessGroupGloo
    except ImportError:
        print("torchft is not installed: its rows are left out", file=sys.stderr)
        yield None
        return
    logging.getLogger("torchft").setLevel(logging.WARNING)
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=len(HOLDERS))
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in HOLDERS
    ]

    def join(index: int) -> tuple[Any, Any, torch.optim.Optimizer]:
        own = _site(_plan(numel, "fp32"), index).model
        model = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in own.parameters())
        manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=_TIMEOUT_S)),
            load_state_dict=lambda state: None,
            state_dict=dict,
            min_replica_size=len(HOLDERS),
            use_async_quorum=False,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=stores[index].port,
            lighthouse_addr=lighthouse.address(),
            replica_id=f"site{index}",
            hostname="127.0.0.1",
            init_sync=False,
        )
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        diloco = DiLoCo(manager, [model], inner, outer, sync_every=1, pin_memory=False)
        diloco.__enter__()
        return manager, diloco, inner

    joined = list(pool.map(join, HOLDERS))
    try:
        yield _at_both(pool, [inner.step for _, _, inner in joined])
    finally:
        for manager, diloco, _ in joined:
            diloco.__exit__(None, None, None)
            manager.shutdown(wait=False)
        lighthouse.shutdown()
