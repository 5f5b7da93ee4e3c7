"""The ranks of one site: a process group of their own, with torch's FSDP2 or DDP.

Nothing here crosses between sites. The group is the default one of its processes, so a rank sees
its own site and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from datetime import timedelta
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from fomoe.errors import SyncError
from fomoe.model.router import RouterStats, Routing
from fomoe.model.transformer import Output
from fomoe.ranks import Ranks
from fomoe.sync.waiting import in_thread, one_line

# The option's name in new releases of torch, which warn of the old one.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


class SiteRanks(Ranks):
    """This rank among the ranks of its site.

    Args:
        store: a torch.distributed store that they all reach, for them alone.
        rank, size: this rank and their number.
        parallel: `inner.parallel`: fsdp or ddp.
        device: where the model will be.
        join_s: longest wait for the others to join.
        timeout_s: longest wait for one of them later.

    Raises:
        SyncError: if they do not all join in time.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        parallel: str,
        device: torch.device,
        join_s: float,
        timeout_s: float,
    ) -> None:
        self.rank, self.size, self.shards = rank, size, parallel == "fsdp"
        self._group: dist.ProcessGroup | None = None  # the default one
        cuda = device.type == "cuda"
        started = time.monotonic()
        try:
            in_thread(
                lambda: dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if cuda else "gloo",
                    store=store,
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=timeout_s),
                ),
                timeout_s=join_s,
            )
            with lost_ranks():
                self.gather(b"")  # all are there
        except (RuntimeError, TimeoutError) as error:
            waited = time.monotonic() - started
            raise SyncError(
                f"the {size} ranks of this site did not all join within {waited:.0f} s: "
                f"{one_line(error)}"
            ) from None
        self._mesh = init_device_mesh(device.type, (size,))

    def gather(self, message: bytes) -> list[bytes]:
        with lost_ranks():
            own = torch.tensor([len(message)])
            lengths = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(lengths, own, group=self._group)
            sizes = [int(length) for length in lengths]
            longest = max(*sizes, 1)
            padded = torch.zeros(longest, dtype=torch.uint8)
            if message:
                padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded, group=self._group)
        return [t.numpy().tobytes()[:n] for t, n in zip(found, sizes, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        with lost_ranks():
            found = [torch.empty_like(values) for _ in range(self.size)]
            dist.all_gather(found, values.contiguous(), group=self._group)
        # In the order of the ranks: every rank gets the same bits.
        total = found[0]
        for other in found[1:]:
            total = total + other
        return total

    def spread(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        found = []
        with lost_ranks():
            for rank, size in enumerate(sizes):
                flat = own.contiguous() if rank == self.rank else own.new_empty(size)
                assert flat.numel() == size
                if size:
                    dist.broadcast(flat, src=rank, group=self._group)
                found.append(flat)
        return found

    def parallelize(self, model: nn.Module, device: torch.device) -> Callable[..., Any]:
        """Share a decoder's work.

        With shards, each layer is a unit of FSDP2, and what is outside the layers another. Matrices
        are cut by rows, stacks of experts by the rows of each expert.
        """
        if not self.shards:
            model.to(device)
            return DistributedDataParallel(model, init_sync=False, **{_SYNC_BUFFERS: False})
        open_outputs()
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": True,
            "shard_placement_fn": lambda p: Shard(1 if p.ndim == 3 else 0),
        }
        for layer in model.layers.children():  # type: ignore[union-attr]
            fully_shard(layer, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "within")
        return model

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        if not isinstance(parameter, DTensor):
            return parameter
        return nn.Parameter(parameter.detach().to_local(), parameter.requires_grad)

    def local_grad(self, parameter: nn.Parameter) -> Tensor | None:
        grad = parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def micro_batch(self, engine: Callable[..., Any], *, last: bool) -> AbstractContextManager:
        if last or not isinstance(engine, DistributedDataParallel):
            return lost_ranks()
        return engine.no_sync()

    def total_norm(self, grads: Sequence[Tensor]) -> Tensor:
        own = nn.utils.get_total_norm(grads)
        if not self.shards:
            return own
        return self.sum(own.double().square()).sqrt().to(own.dtype)

    def beside(self) -> SiteRanks:
        twin = copy(self)
        twin._group = dist.new_group(backend="gloo")
        return twin

    def close(self) -> None:
        with suppress(RuntimeError):
            dist.destroy_process_group()


@cache
def open_outputs() -> None:
    """Let FSDP2 find the tensors in a model's output.

    It gathers parameters for the backward pass when a gradient reaches one of them. Before torch
    2.13 it looked into no dataclass.
    """
    from torch.export import register_dataclass  # it takes a quarter of a second

    for kind in (Output, Routing, RouterStats):
        register_dataclass(kind)


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Says of torch's error that a rank of this site is gone.

    Raises:
        SyncError: instead of it.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        known = isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text
        if not known:
            raise
        raise SyncError(f"lost a rank of this site: {one_line(error)}") from error
