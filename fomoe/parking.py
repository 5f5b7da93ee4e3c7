"""Parking: the state of waiting sites of a proxy run is moved to host memory.

Sites of one process run one after the other. While a site waits, its parameters and inner optimizer
state may be kept in pinned host memory; sync, checkpoints and replica hashes read them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.memory import SiteMemory
from fomoe.site import Site

# Share of the free device memory; the running site's activations and buffers need the rest.
_STATE_FRACTION = 0.5


def parks(config: Config, memory: Iterable[SiteMemory], device: torch.device) -> bool:
    """Whether waiting sites are parked; `memory` is that of this process's sites.

    `auto` parks where the state of all sites would take more than half of the free device memory.

    Raises:
        ConfigError: if parking is requested where it cannot help.
    """
    asked, together = config.run.park, config.sync.average == "gradients"
    if asked == "always" and device.type != "cuda":
        raise ConfigError("run.park", asked, f"needs an accelerator; the sites run on {device}")
    if asked == "never" or device.type != "cuda" or together:
        return asked == "always"
    sizes = [m.parameters + m.gradients + m.inner_optimizer for m in memory]
    free, _ = torch.cuda.mem_get_info(device)
    return asked == "always" or (len(sizes) > 1 and sum(sizes) > _STATE_FRACTION * free)


class Parking:
    """Moves one site's parameters and optimizer state to host memory and back.

    Args:
        site: the site; its buffers and random state stay where they are.
        pin: use pinned memory, from which copies run at the bus's speed.
    """

    def __init__(self, site: Site, *, pin: bool) -> None:
        self.site, self.pin = site, pin
        self._host: dict[str, Tensor] = {}  # allocated once, pinning is slow

    def park(self) -> None:
        """Move everything to the host and free the gradients; a second call changes nothing."""
        self.site.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.site.parameters.items():
            parameter.data = self._to_host(name, parameter.data)
        for name, parameter in self.site.trainable.items():
            state = self.site.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.device == self.site.device:
                    state[key] = self._to_host(f"{key}/{name}", value)
        if self.site.device.type == "cuda":
            # The host reads these buffers next, and the copies may still be queued.
            torch.cuda.synchronize(self.site.device)

    def unpark(self, *, optimizer: bool = True) -> None:
        """Move the parameters back, and the optimizer state if a step follows."""
        device = self.site.device
        for parameter in self.site.parameters.values():
            parameter.data = self._to_device(parameter.data, device)
        if not optimizer:
            return
        for name, parameter in self.site.trainable.items():
            state = self.site.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if value is not None and value is self._host.get(f"{key}/{name}"):
                    state[key] = self._to_device(value, device)

    def _to_host(self, name: str, value: Tensor) -> Tensor:
        host = self._host.get(name)
        if host is None or host.shape != value.shape:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=self.pin)
            self._host[name] = host
        if host.data_ptr() != value.data_ptr():
            host.copy_(value, non_blocking=True)
        return host

    def _to_device(self, value: Tensor, device: torch.device) -> Tensor:
        # A copy on CPU too, so that the host buffer is never the one that trains.
        return value.to(device, non_blocking=True, copy=True)


@contextmanager
def unparked(parkings: Iterable[Parking], *, optimizer: bool) -> Iterator[None]:
    """Keep the sites on their device inside the block, and park them after it."""
    parkings = list(parkings)
    for parking in parkings:
        parking.unpark(optimizer=optimizer)
    yield
    for parking in parkings:
        parking.park()
