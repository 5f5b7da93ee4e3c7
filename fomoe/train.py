"""A run from start to end: build everything, then rounds of local steps and a sync.

The same code serves a proxy run (all sites in this process) and a distributed run (this process is
one site): only the transport differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from fomoe.report import Progress
from fomoe.rundir import (
    agreed,
    check_same_experiment,
    claim_run_dir,
    compare_configs,
    compare_fingerprints,
    find_checkpoint,
    remove_run,
    write_run_files,
)
from fomoe.site import STEP_FIELDS, RoundRouting, Site, learning_rate
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
    divergence,
)
from fomoe.sync.transport import Transport, check_agreement, failure_text


@dataclass
class Run:
    """Everything a run works with; built once, then changed only by the rounds."""

    config: Config
    run_dir: Path
    plan: RunPlan
    transport: Transport
    data: Data
    sites: dict[int, Site]
    outer: OuterOptimizer
    progress: Progress
    totals: dict[int, Totals]
    probes: dict[int, torch.Tensor] = field(default_factory=dict)
    local_losses: dict[int, float] = field(default_factory=dict)
    merged: MergedEvaluation | None = None
    first_round: int = 0
    parkings: dict[int, Parking] = field(default_factory=dict)  # of sites that park while waiting
    counts_before: dict[int, Counts] = field(default_factory=dict)  # at the round's start

    def parkings_of(self, site: int) -> list[Parking]:
        return [self.parkings[site]] if site in self.parkings else []


def train(
    config: Config,
    *,
    mode: str = "new",
    device: str = "auto",
    interface: str | None = None,
    launch: Launch | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run an experiment and return its summary.

    Args:
        config: the experiment; `run.dir` must be set.
        mode: new, resume, overwrite or next-free: what to do with the run's folder.
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
        run = build_run(config, transport, mode=mode, device=where, show=show)
        with run.progress:
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


def build_run(
    config: Config, transport: Transport, *, mode: str, device: torch.device, show: bool
) -> Run:
    """Compare what the sites were started with, build data and sites, resume if asked."""
    compare_configs(config, transport, mode)
    config, run_dir = claim_run_dir(config, transport, mode)
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
        agreed(transport, lambda: resume(run))
        for parking in parkings.values():
            parking.park()
    elif mode == "overwrite":
        remove_run(run_dir, transport.sites)
    write_run_files(config, run_dir, data, transport)
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
    metrics = Metrics(config, run.run_dir, transport.sites, first_round=run.first_round)
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
    return divergence(run.sites[site].parameters) or unplanned_bytes(
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
                "config": run.config.model_dump(mode="json"),
                "fingerprints": run.data.fingerprints,
                "totals": run.totals[site_idx].state(),
                "counts": run.transport.counts[site_idx].state(),
                "val_loss_local": run.local_losses.get(site_idx),
            }
            checkpoint.save_part(run.run_dir, rounds_done, site_idx, tensors, values)

    agreed(run.transport, save)
    checkpoint.remove_old(run.run_dir, rounds_done, settings.keep_checkpoints, run.sites)


def resume(run: Run) -> None:
    """Load the newest round that is whole at all sites; without one, start at round 0."""
    found = find_checkpoint(run.run_dir, run.transport, run.progress.say)
    if found is None:
        run.progress.say(f"{run.run_dir} holds no complete checkpoint; starting at round 0")
        return
    if found > run.config.rounds:
        rule = f"is below the {found} rounds that {run.run_dir} has done"
        raise ConfigError("rounds", run.config.rounds, rule)
    run.first_round = found
    for site_idx, site in run.sites.items():
        tensors, values = checkpoint.load_part(run.run_dir, found, site_idx)
        folder = checkpoint.round_folder(run.run_dir, found)
        check_same_experiment(values, run.config, run.data.fingerprints, folder)
        site.load_state(tensors, values)
        run.outer.load_state_of(site_idx, tensors)
        torch.set_rng_state(tensors["rng"])
        run.totals[site_idx].load_state(values["totals"])
        run.transport.counts[site_idx].load_state(values["counts"])
        if "probe" in tensors:
            run.probes[site_idx] = tensors["probe"]
        if values["val_loss_local"] is not None:
            run.local_losses[site_idx] = values["val_loss_local"]
    run.progress.resumed(found)
