"""What differs between pre-training and fine-tuning with adapters; the rounds are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fomoe.adapters.client import Client, evaluate_client
from fomoe.adapters.data import build_client_data
from fomoe.adapters.evaluate import evaluate_server
from fomoe.adapters.layers import load_adapted
from fomoe.adapters.sync import ClientsSync, ServerSync, StackingSync
from fomoe.config import Config
from fomoe.data.dataset import Data, build_data
from fomoe.data.stream import Stream
from fomoe.evaluate import LocalEvaluation, MergedEvaluation, evaluate_local, evaluate_merged
from fomoe.planning import RunPlan
from fomoe.ranks import Ranks
from fomoe.site import Site
from fomoe.sync.ddp import GradientSync
from fomoe.sync.sync import Sync
from fomoe.sync.transport import Transport


@dataclass(frozen=True, kw_only=True)
class System:
    """The parts of a run.

    Attributes:
        read: streams and held-out parts; arguments as of `build_data`.
        make_site: a site of this process, from the plan, its id, its stream and its ranks.
        sync: the class of the sync.
        evaluate_site: one site's own model on the overall held-out part.
        evaluate_whole: the merged model, or the server's adapters.
    """

    read: Callable[..., Data]
    make_site: Callable[[RunPlan, int, Stream, Ranks], Site]
    sync: type[Sync]
    evaluate_site: Callable[[Site, Any], LocalEvaluation]
    evaluate_whole: Callable[[RunPlan, Mapping[int, Site], Transport, Data], MergedEvaluation]


def system_of(config: Config, device: torch.device) -> System:
    """The system that the config asks for; with adapters, the frozen base is read.

    Raises:
        ConfigError: if the base cannot be used.
    """
    adapters = config.adapters
    if adapters.base is None:
        return System(
            read=build_data,
            make_site=lambda plan, site, stream, ranks: Site(
                plan, site, stream=stream, device=device, ranks=ranks
            ),
            sync=GradientSync if config.sync.average == "gradients" else Sync,
            evaluate_site=evaluate_local,
            evaluate_whole=evaluate_merged_data,
        )
    adapted = load_adapted(adapters, device)
    # Reading the base draws numbers; the random state is part of a checkpoint, equal everywhere.
    torch.manual_seed(config.seed)
    syncs = {"segments": ClientsSync, "flora": StackingSync}
    return System(
        read=build_client_data,
        make_site=lambda plan, site, stream, _: Client(
            plan, site, stream=stream, adapted=adapted, device=device
        ),
        sync=syncs.get(adapters.aggregate, ServerSync),
        evaluate_site=evaluate_client,
        evaluate_whole=evaluate_server,
    )


def evaluate_merged_data(
    plan: RunPlan, sites: Mapping[int, Site], transport: Transport, data: Data
) -> MergedEvaluation:
    return evaluate_merged(plan, sites, transport, data.held_out)
