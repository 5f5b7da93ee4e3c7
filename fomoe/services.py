"""Optional packages and services: checked before a folder is claimed; a failure is one line."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fomoe.config import Config
from fomoe.data import sources
from fomoe.errors import ConfigError
from fomoe.logs import import_tensorboard, import_wandb, log_in
from fomoe.site import expert_backend


def check_services(config: Config, sites: Iterable[int], device: torch.device) -> None:
    """Check whatever a config needs that an installation may lack.

    Raises:
        FomoeError: naming the option, the package or service, and what to do.
    """
    if config.adapters.base is None:
        expert_backend(config, device)
    elif config.adapters.aggregate != "segments" and len(tuple(sites)) < config.num_sites:
        rule = "needs all clients in one process: a server computes it"
        raise ConfigError("adapters.aggregate", config.adapters.aggregate, rule)
    names = config.data.sites or (config.data.source,) * config.num_sites
    needed = {names[site] for site in sites}
    needed |= {config.data.held_out} if config.data.held_out else set(names)
    for source in sorted(filter(sources.is_hub, needed)):
        sources.hub_library(source)
    if config.run.tensorboard:
        import_tensorboard()
    if config.run.wandb != "off":
        wandb = import_wandb(config.run.wandb)
        if config.run.wandb == "online":
            log_in(wandb)
