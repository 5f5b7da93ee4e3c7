"""Building a run: device, data, sites, sync, and what it resumes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from fomoe.config import Config
from fomoe.data.dataset import Data
from fomoe.errors import ConfigError, SiteMismatchError, SyncError
from fomoe.hostmemory import give_back_freed_memory, keep_freed_memory
from fomoe.initial import Initial, open_initial
from fomoe.logs import open_logs
from fomoe.parking import Parking, parks
from fomoe.planning import RunPlan, plan_run
from fomoe.remains import check_resumable
from fomoe.report import Progress
from fomoe.resume import resume, starts_anew
from fomoe.run import Run
from fomoe.rundir import (
    claim_run_dir,
    compare_configs,
    compare_fingerprints,
    remove_run,
    write_run_files,
)
from fomoe.runlock import RunLock
from fomoe.services import check_services
from fomoe.site import Site
from fomoe.summary import Totals
from fomoe.sync.exchange import agreed, gather, share
from fomoe.sync.sync import Sync
from fomoe.sync.transport import Transport
from fomoe.systems import System, system_of


def choose_device(name: str, local_rank: int) -> torch.device:
    """The accelerator of this rank if there is one, else the CPU.

    Raises:
        ConfigError: if this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ConfigError("--device", name, "is not a device of this machine") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def started(
    config: Config,
    transport: Transport,
    *,
    mode: str,
    resume_round: int | None = None,
    device: torch.device,
    show: bool,
) -> Iterator[Run]:
    """A run that is ready for its rounds; a start that is refused changes no file.

    Raises:
        FomoeError: at every site, if the sites were started with different settings, or if the
            run's folder cannot be used as `mode` says.
    """
    agreed(transport, lambda: check_services(config, transport.sites, device))
    how = mode if resume_round is None else f"resume from round {resume_round}"
    compare_configs(config, transport, how)
    if mode == "resume":  # before anything is made or built
        check_resumable(config, transport, resume_round)
    with claim_run_dir(config, transport, mode) as (claimed, lock):
        run = build_run(
            claimed,
            transport,
            lock,
            mode=mode,
            resume_round=resume_round,
            device=device,
            show=show,
        )
        with run.progress:
            yield run


def build_run(
    config: Config,
    transport: Transport,
    lock: RunLock,
    *,
    mode: str,
    resume_round: int | None,
    device: torch.device,
    show: bool,
) -> Run:
    """Build data and sites, and resume if asked; only then write to the folder."""
    run_dir = lock.run_dir
    inside = transport.inside
    sizes = gather(transport, lambda _: str(inside.size).encode())
    plan = plan_run(config, [int(size) for size in sizes])
    own_plan = plan.at_rank(transport.sites[0], inside.rank)
    system = agreed(transport, lambda: system_of(config, device))
    if device.type == "cpu":
        give_back_freed_memory() if inside.shards else keep_freed_memory()

    def read() -> Data:
        kept_in = run_dir if mode == "resume" else None
        return system.read(
            config, transport.sites, tokenizer_dir=kept_in, share=partial(share, transport)
        )

    data = agreed(transport, read)
    compare_fingerprints(data.fingerprints, transport)
    initial = None
    # A run that goes on has its state in its checkpoints, and needs the folder no more.
    if config.init_from is not None and (
        mode != "resume" or starts_anew(run_dir, config, data.fingerprints, transport, resume_round)
    ):
        initial = agreed(transport, lambda: open_initial(config, data.fingerprints["tokenizer"]))
    sites, parkings = agreed(
        transport, lambda: build_sites(own_plan, data, transport, device, system, initial)
    )
    sync = system.sync(own_plan, sites, transport, pin=device.type == "cuda")
    if initial is not None:
        check_equal_start(config, sync)
    first = transport.sites[0] == inside.rank == 0
    progress = Progress(config, num_local_sites=len(sites), show=show and first)
    if config.model.moe_layers:
        progress.notes.append(f"experts: {sites[transport.sites[0]].expert_backend}")
    if parkings:
        progress.notes.append("waiting sites parked")
    totals = {site: Totals() for site in sites}
    run = Run(config, run_dir, plan, transport, data, system, sites, sync, progress, totals)
    run.parkings = parkings
    if mode == "resume":
        resume(run, resume_round, show=show)
        for parking in parkings.values():
            parking.park()
    run.log = open_logs(
        config,
        run_dir,
        transport,
        run_id=lock.run_id,
        first_round=run.first_round,
        resumed=mode == "resume",
    )
    lock.began = True
    if mode == "overwrite":  # before any site writes
        agreed(transport, lambda: None if inside.rank else remove_run(run_dir))
    agreed(transport, lambda: write_run_files(config, run_dir, data, transport))
    return run


def check_equal_start(config: Config, sync: Sync) -> None:
    """Refuse sites that started from different files: their replicas would never be equal.

    Raises:
        SiteMismatchError: at every site.
    """
    try:
        sync.check_replicas()
    except SyncError:
        rule = "is not the same model at all sites"
        raise SiteMismatchError(f"init_from {config.init_from} {rule}") from None


def build_sites(
    plan: RunPlan,
    data: Data,
    transport: Transport,
    device: torch.device,
    system: System,
    initial: Initial | None = None,
) -> tuple[dict[int, Site], dict[int, Parking]]:
    """This process's sites; if sites are parked, each is parked before the next is built.

    Raises:
        CheckpointError: if a file of the initial model turns out to be damaged.
    """
    sites, parkings, own = {}, {}, transport.sites
    parking = parks(plan.config, [plan.memory[site] for site in own], device)
    for site in own:
        sites[site] = system.make_site(plan, site, data.streams[site], transport.inside)
        if initial is not None:
            sites[site].start_from(initial.read, initial.biases)
        if parking:
            parkings[site] = Parking(sites[site], pin=device.type == "cuda")
            parkings[site].park()
    return sites, parkings
