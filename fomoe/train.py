"""A run from start to end: build everything, then rounds of local steps and a sync.

The same code serves a proxy run (all sites in this process) and a distributed run (this process is
one site): only the transport differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fomoe import checkpoint
from fomoe.config import Config
from fomoe.data.dataset import Data, build_data
from fomoe.errors import ConfigError, SyncError
from fomoe.evaluate import MergedEvaluation, evaluate_local, evaluate_merged, topk_agreement
from fomoe.hostmemory import keep_freed_memory
from fomoe.launch import Launch, launch_from_environment
from fomoe.metrics import Metrics
from fomoe.parking import Parking, parks, unparked
from fomoe.planning import RunPlan, plan_run
from fomoe.remains import check_resumable
from fomoe.report import Progress
from fomoe.resume import resume
from fomoe.run import Run
from fomoe.rundir import (
    agreed,
    claim_run_dir,
    compare_configs,
    compare_fingerprints,
    remove_run,
    write_run_files,
)
from fomoe.runlock import RunLock
from fomoe.services import check_services, open_log
from fomoe.site import STEP_FIELDS, RoundRouting, Site, learning_rate
from fomoe.state import divergence
from fomoe.summary import (
    Counts,
    Totals,
    merged_record,
    round_record,
    summarize,
    unplanned_bytes,
)
from fomoe.sync.joining import open_transport
from fomoe.sync.outer import (
    OuterOptimizer,
    average_gradients,
    average_pseudo_gradients,
    check_replicas,
)
from fomoe.sync.transport import Transport, check_agreement, failure_text


def train(
    config: Config,
    *,
    mode: str = "new",
    resume_round: int | None = None,
    device: str = "auto",
    interface: str | None = None,
    launch: Launch | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run an experiment and return its summary.

    Args:
        config: the experiment; `run.dir` must be set.
        mode: new, resume, overwrite or next-free: what to do with the run's folder.
        resume_round: with mode resume, go back to this round; None: the newest that all sites have.
        device: auto, cpu, cuda or cuda:N.
        interface: network interface for traffic between sites.
        launch: where this process stands, by default what the environment says.
        show: print progress.

    Raises:
        FomoeError: for every mistake of a user and every failed sync.
    """
    launch = launch or launch_from_environment(num_sites=config.num_sites)
    # What is wrong at this site alone is told before it waits for the others.
    where = choose_device(device, launch.local_rank)
    transport = open_transport(
        launch, config.num_sites, timeout_s=config.sync.timeout_s, interface=interface
    )
    try:
        with started(
            config, transport, mode=mode, resume_round=resume_round, device=where, show=show
        ) as run:
            summary = run_rounds(run)
    except BaseException as error:
        transport.close(failure_text(error))
        raise
    transport.close()
    return summary


def choose_device(name: str, local_rank: int) -> torch.device:
    """The accelerator of this rank if there is one, else the CPU.

    Raises:
        ConfigError: if a device is asked for that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ConfigError("--device", name, "is no device of this machine") from None
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
    """A run that is ready for its rounds; the order keeps every byte where a start is refused.

    Raises:
        FomoeError: at every site, if what the sites were started with differs, or if the run's
            folder cannot be used as `mode` says.
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
    """Build data and sites, resume if asked; only then the folder is written to."""
    run_dir = lock.run_dir
    plan = plan_run(config)
    if device.type == "cpu":
        keep_freed_memory()

    def read() -> Data:
        kept_in = run_dir if mode == "resume" else None
        return build_data(config, transport.sites, tokenizer_dir=kept_in, share=transport.share)

    data = agreed(transport, read)
    compare_fingerprints(data.fingerprints, transport)
    sites, parkings = build_sites(config, plan, data, transport.sites, device)
    parameters = {site: s.parameters for site, s in sites.items()}
    outer = OuterOptimizer(config, plan.plan, parameters, pin=device.type == "cuda")
    progress = Progress(config, num_local_sites=len(sites), show=show and transport.sites[0] == 0)
    if config.model.moe_layers:
        progress.notes.append(f"experts: {sites[transport.sites[0]].expert_backend}")
    if parkings:
        progress.notes.append("waiting sites parked")
    totals = {site: Totals() for site in sites}
    run = Run(config, run_dir, plan, transport, data, sites, outer, progress, totals)
    run.parkings = parkings
    if mode == "resume":
        resume(run, resume_round, show=show)
        for parking in parkings.values():
            parking.park()
    run.log = open_log(config, run_dir, transport)
    lock.began = True
    if mode == "overwrite":  # before any site writes
        agreed(transport, lambda: remove_run(run_dir))
    agreed(transport, lambda: write_run_files(config, run_dir, data, transport))
    return run


def build_sites(
    config: Config, plan: RunPlan, data: Data, own: Sequence[int], device: torch.device
) -> tuple[dict[int, Site], dict[int, Parking]]:
    """This process's sites; each is parked before the next is built, if they are to be parked."""
    sites, parkings = {}, {}
    parking = parks(config, [plan.memory[site] for site in own], device)
    for site in own:
        sites[site] = Site(
            config,
            site,
            residents=plan.placement.residents(site),
            trained=plan.placement.trained(site),
            stream=data.streams[site],
            device=device,
        )
        if parking:
            parkings[site] = Parking(sites[site], pin=device.type == "cuda")
            parkings[site].park()
    return sites, parkings


def run_rounds(run: Run) -> dict[str, Any]:
    """The rounds: local steps, sync, evaluation, metrics, checkpoint."""
    config, transport = run.config, run.transport
    metrics = agreed(
        transport,
        lambda: Metrics(run.run_dir, transport.sites, first_round=run.first_round, log=run.log),
    )
    if metrics.num_damaged:
        run.progress.warn(f"{metrics.path}: damaged lines dropped: {metrics.num_damaged}")
    try:
        for round_idx in range(run.first_round, config.rounds):
            records, train_s, gradient_s = run_local_steps(run, round_idx)
            started = time.perf_counter()
            routing = synchronize(run)
            hashes = verify_replicas(run)
            sync_s = time.perf_counter() - started + gradient_s
            for site in run.sites:
                run.totals[site].add(routing[site], train_s[site], sync_s)
            agreement = evaluate_sites(run, round_idx)
            for site in run.sites:
                records.append(
                    round_record(
                        run.plan,
                        site,
                        round_idx,
                        routing=routing[site],
                        counts_before=run.counts_before[site],
                        counts_after=transport.counts[site].state(),
                        train_s=train_s[site],
                        sync_s=sync_s,
                        val_loss_local=run.local_losses.get(site),
                        probe_agreement=agreement.get(site),
                        replica_hashes=hashes,
                    )
                )
            if is_due(config.run.eval_merged_every, round_idx, config.rounds):
                run.merged = merged_loss(run)
                if transport.members[0] in transport.sites:
                    records.append(merged_record(run.merged, round_idx))
            metrics.write(records)
            save_checkpoint(run, round_idx + 1)
            run.progress.round_done(round_idx, records)
    finally:
        metrics.close()
    run.merged = run.merged or merged_loss(run)
    return summarize(
        run.plan, transport, run.totals, run.data, run.local_losses, run.merged, run.run_dir
    )


def run_local_steps(
    run: Run, round_idx: int
) -> tuple[list[dict[str, Any]], dict[int, float], float]:
    """H local steps at every site of this process.

    Returns:
        Step records, seconds of local training per site, seconds spent averaging gradients.
    """
    config, averaged_s = run.config, 0.0
    run.counts_before = count_bytes(run)
    vectors: dict[int, list[torch.Tensor]] = {site: [] for site in run.sites}
    seconds = dict.fromkeys(run.sites, 0.0)
    first_step = round_idx * config.local_steps
    # Averaging gradients ties the sites together at every step; else each runs its steps alone.
    together = config.sync.average == "gradients"
    turns, length = (config.local_steps, 1) if together else (1, config.local_steps)
    for _ in range(turns):
        losses = {}
        for site_idx, site in run.sites.items():
            started = time.perf_counter()
            if together:
                losses[site_idx] = site.backward()
            else:
                on_step = run.progress.step_callback(site_idx, round_idx)
                with unparked(run.parkings_of(site_idx), optimizer=True):
                    vectors[site_idx] += site.run_local_steps(length, on_step)
            finish_device_work(site.device)
            seconds[site_idx] += time.perf_counter() - started
        if together:
            started = time.perf_counter()
            parameters = {site: s.parameters for site, s in run.sites.items()}
            average_gradients(run.plan.plan, parameters, run.transport)
            averaged_s += time.perf_counter() - started
            for site_idx, site in run.sites.items():
                started = time.perf_counter()
                vectors[site_idx].append(site.apply(losses[site_idx]))
                seconds[site_idx] += time.perf_counter() - started
                run.progress.step_callback(site_idx, round_idx)(vectors[site_idx][-1])
    records = [
        {
            "kind": "step",
            "round": round_idx,
            "step": first_step + step,
            "site": site,
            "lr": learning_rate(config.inner, first_step + step, config.schedule_steps),
            "tokens": config.tokens_per_step,
            **dict(zip(STEP_FIELDS, values, strict=True)),
        }
        for site, steps in vectors.items()
        for step, values in enumerate(torch.stack(steps).tolist())
    ]
    return records, seconds, averaged_s


def finish_device_work(device: torch.device) -> None:
    """Wait for queued kernels, once per site and round, so that times are of work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronize(run: Run) -> dict[int, RoundRouting]:
    """Average over holders, agree that all is well at every site, then step the anchors."""
    config = run.config
    routing = {site: s.end_round() for site, s in run.sites.items()}

    if config.sync.average == "parameters":
        counts = {site: s.round_counts(routing[site]) for site, s in run.sites.items()}
        run.counts_before = count_bytes(run)
        # Before a site has said that it is well, no other commits.
        with _uncommitted("at any site"):
            means = average_pseudo_gradients(
                config, run.plan.plan, run.outer, run.transport, counts
            )
        with _uncommitted("at this site"):
            check_agreement(run.transport, partial(problem_of, run))
            run.outer.step(means)
            # A finite mean may still overflow in the step: no site publishes or saves such anchors.
            check_agreement(run.transport, lambda site: divergence(run.outer.state_of(site)))
        run.outer.publish()
    else:  # gradients were averaged at every step; the parameters are what they are
        check_agreement(run.transport, partial(problem_of, run))
    if config.router.balance != "loss" and config.model.moe_layers:
        selected = [
            torch.frombuffer(bytearray(message), dtype=torch.int64)
            for message in run.transport.gather(
                lambda site: routing[site].selected_LE.numpy().tobytes()
            )
        ]
        total_LE = torch.stack(selected).sum(0).view_as(next(iter(routing.values())).selected_LE)
        for site in run.sites.values():
            site.move_balance_bias(total_LE)
    return routing


def problem_of(run: Run, site: int) -> str:
    """Why this round must not be committed, seen from one site of this process; or nothing."""
    after = run.transport.counts[site].state()
    return divergence(run.sites[site].state()[0]) or unplanned_bytes(
        run.plan, site, run.counts_before[site], after
    )


def count_bytes(run: Run) -> dict[int, Counts]:
    """Bytes counted so far, of the sites of this process."""
    return {site: run.transport.counts[site].state() for site in run.sites}


@contextmanager
def _uncommitted(where: str) -> Iterator[None]:
    """Say of a failure that what was being averaged is lost, and that nothing else is."""
    try:
        yield
    except SyncError as error:
        raise SyncError(
            f"{error}; nothing of this sync is committed {where}, --resume continues from the "
            f"newest checkpoint"
        ) from error


def verify_replicas(run: Run) -> dict[int, str]:
    """Hashes of the replicas held here, equal at all holders or the run stops."""
    if not run.config.sync.verify_replicas:
        return {}
    parameters = {site: s.parameters for site, s in run.sites.items()}
    return check_replicas(run.plan.plan, parameters, run.transport)


def evaluate_sites(run: Run, round_idx: int) -> dict[int, float]:
    """Each site's own model where it is due; returns the agreement of its probe's top-k."""
    agreement = {}
    if is_due(run.config.run.eval_every, round_idx, run.config.rounds):
        for site_idx, site in run.sites.items():
            with unparked(run.parkings_of(site_idx), optimizer=False):
                result = evaluate_local(site, run.data.held_out)
            run.local_losses[site_idx] = result.loss
            if site_idx in run.probes:
                agreement[site_idx] = topk_agreement(run.probes[site_idx], result.probe_LTK)
            run.probes[site_idx] = result.probe_LTK
    return agreement


def merged_loss(run: Run) -> MergedEvaluation:
    with unparked(run.parkings.values(), optimizer=False):
        return evaluate_merged(
            run.config, run.sites, run.plan.plan, run.transport, run.data.held_out
        )


def is_due(every: int, round_idx: int, rounds: int) -> bool:
    """Whether something done every n rounds (0: at the end only) is due after this one."""
    return round_idx + 1 == rounds or (every > 0 and (round_idx + 1) % every == 0)


# ------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(run: Run, rounds_done: int) -> None:
    """Every site's part, where one is due; then the oldest are removed."""
    settings = run.config.run
    if not is_due(settings.checkpoint_every, rounds_done - 1, run.config.rounds):
        return

    def save() -> None:
        for site_idx, site in run.sites.items():
            tensors, values = site.state()
            tensors |= run.outer.state_of(site_idx)
            tensors["rng"] = torch.get_rng_state()
            if site_idx in run.probes:
                tensors["probe"] = run.probes[site_idx]
            values |= {
                "round": rounds_done,
                "site": site_idx,
                "config": run.config.model_dump(mode="json"),
                "fingerprints": run.data.fingerprints,
                "totals": run.totals[site_idx].state(),
                "counts": run.transport.counts[site_idx].state(),
                "val_loss_local": run.local_losses.get(site_idx),
            }
            checkpoint.save_part(run.run_dir, rounds_done, site_idx, tensors, values)

    agreed(run.transport, save)
    try:
        checkpoint.remove_old(run.run_dir, rounds_done, settings.keep_checkpoints, run.sites)
    except OSError as error:  # the round is saved: no reason to end the run
        run.progress.warn(f"{error.filename} cannot be removed: {error.strerror}")
