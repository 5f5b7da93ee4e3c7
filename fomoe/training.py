"""A run from start to end: rounds of local steps and a sync.

The same code serves a proxy run (all sites in this process) and a distributed run (this process is
one site): only the transport differs.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fomoe.build import choose_device, started
from fomoe.config import Config
from fomoe.counting import RoundRouting
from fomoe.errors import ConfigError
from fomoe.evaluate import MergedEvaluation, topk_agreement
from fomoe.fragments import Leg, legs
from fomoe.gathering import gather_rows
from fomoe.launch import Launch, launch_from_environment
from fomoe.metrics import Metrics, Unwritten
from fomoe.parking import unparked
from fomoe.planning import lanes_of
from fomoe.resume import save_round
from fomoe.rules import check_ranks
from fomoe.run import Run
from fomoe.site import STEP_FIELDS, learning_rate
from fomoe.summary import merged_record, round_record, summarize
from fomoe.sync.ddp import GradientSync
from fomoe.sync.exchange import agreed
from fomoe.sync.joining import open_transport
from fomoe.sync.links import links_line, measure_links, probes
from fomoe.sync.sync import Sync
from fomoe.sync.transport import failure_text


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
        launch: which site this process is; by default read from the environment.
        show: print progress.

    Raises:
        FomoeError: for a user's mistake and for a failed sync.
    """
    if config.run.dir is None:
        raise ConfigError("run.dir", "null", "must be set to the folder that the run will write")
    launch = launch or launch_from_environment(num_sites=config.num_sites)
    # A problem of this site alone is reported before the site waits for the others.
    check_ranks(config, launch.ranks, launch.site)
    where = choose_device(device, launch.local_rank)
    transport = open_transport(
        launch,
        config.num_sites,
        lanes=partial(lanes_of, config),
        timeout_s=config.sync.timeout_s,
        join_s=config.sync.join_timeout_s,
        interface=interface,
        parallel=config.inner.parallel,
        device=where,
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
    transport.inside.close()
    return summary


def run_rounds(run: Run) -> dict[str, Any]:
    """The rounds: local steps, sync, evaluation, metrics, checkpoint."""
    config, transport = run.config, run.transport
    kind = Metrics if transport.inside.rank == 0 else Unwritten
    metrics = agreed(
        transport,
        lambda: kind(run.run_dir, transport.sites, first_round=run.first_round, log=run.log),
    )
    if metrics.num_damaged:
        run.progress.warn(f"{metrics.path}: damaged lines dropped: {metrics.num_damaged}")
    try:
        if probes(config.sync.probe, transport):
            run.links = measure_links(transport.lanes[0])  # that of all first ranks
            run.progress.say(links_line(run.plan, run.links))
        for round_idx in range(run.first_round, config.rounds):
            records, train_s, gradient_s = run_local_steps(run, round_idx)
            started = time.perf_counter()
            routing = synchronize(run)
            hashes = run.sync.check_replicas() if config.sync.verify_replicas else {}
            sync_s = time.perf_counter() - started + gradient_s
            timed, run.sync.timed = run.sync.timed, []
            for site in run.sites:
                run.totals[site].add(routing[site], train_s[site], sync_s)
            agreement = evaluate_sites(run, round_idx)
            evaluated = run.local_losses if evaluation_is_due(config, round_idx) else {}
            counts_after = run.site_counts()
            for site in run.sites:
                records.append(
                    round_record(
                        run.plan,
                        site,
                        round_idx,
                        routing=routing[site],
                        counts_before=run.counts_before[site],
                        counts_after=counts_after[site],
                        train_s=train_s[site],
                        sync_s=sync_s,
                        timed=timed,
                        remote=transport.remote,
                        val_loss_local=evaluated.get(site),
                        probe_agreement=agreement.get(site),
                        replica_hashes=hashes,
                    )
                )
            if is_due(config.run.eval_merged_every, round_idx, config.rounds):
                run.merged = merged_loss(run)
                if transport.members[0] in transport.sites:
                    records.append(merged_record(run.merged, round_idx))
            metrics.write(records)
            if is_due(config.run.checkpoint_every, round_idx, config.rounds):
                save_round(run, round_idx + 1)
            run.progress.round_done(round_idx, records)
    finally:
        metrics.close()
    run.merged = run.merged or merged_loss(run)
    return summarize(
        run.plan,
        transport,
        run.totals,
        run.site_counts(),
        run.data,
        run.local_losses,
        run.merged,
        run.run_dir,
        run.links,
    )


def run_local_steps(
    run: Run, round_idx: int
) -> tuple[list[dict[str, Any]], dict[int, float], float]:
    """H local steps at every site of this process, and the syncs that are due before the last.

    Returns:
        Step records, seconds of local training per site, seconds of averaging in between.
    """
    config = run.config
    run.counts_before = run.site_counts()
    vectors: dict[int, list[torch.Tensor]] = {site: [] for site in run.sites}
    seconds = dict.fromkeys(run.sites, 0.0)
    averaged_s = 0.0
    if isinstance(run.sync, GradientSync):
        for _ in range(config.local_steps):
            averaged_s += _step_together(run, run.sync, round_idx, vectors, seconds)
    else:
        for leg in legs(config, round_idx):
            for index, site in run.sites.items():
                started = time.perf_counter()
                with unparked(run.parkings_of(index), optimizer=True):
                    on_step = run.progress.step_callback(index, round_idx)
                    vectors[index] += site.run_local_steps(leg.steps, on_step)
                finish_device_work(site.device)
                seconds[index] += time.perf_counter() - started
            started = time.perf_counter()
            sync_between(run.sync, leg)
            averaged_s += time.perf_counter() - started
    first_step = round_idx * config.local_steps
    records = [
        {
            "kind": "step",
            "round": round_idx,
            "step": first_step + step,
            "site": site,
            "lr": learning_rate(config.inner, first_step + step, config.schedule_horizon),
            "tokens": config.tokens_per_step[site],
            **dict(zip(STEP_FIELDS, values, strict=True)),
        }
        for site, steps in vectors.items()
        if steps  # a client that does not take part in the round has none
        for step, values in enumerate(torch.stack(steps).tolist())
    ]
    return records, seconds, averaged_s


def sync_between(sync: Sync, leg: Leg) -> None:
    """What follows some local steps within a round.

    Raises:
        SyncError: as in `synchronize`.
    """
    if leg.begins is not None and leg.begins == leg.ends:
        sync.sync_fragment(leg.begins)
    elif leg.begins is not None:
        sync.begin(leg.begins)
    elif leg.ends is not None:
        sync.end(leg.ends)


def _step_together(
    run: Run,
    sync: GradientSync,
    round_idx: int,
    vectors: dict[int, list[torch.Tensor]],
    seconds: dict[int, float],
) -> float:
    """One step of all sites with averaged gradients; returns the seconds spent averaging."""
    losses = {}
    for index, site in run.sites.items():
        started = time.perf_counter()
        losses[index] = site.backward()
        finish_device_work(site.device)
        seconds[index] += time.perf_counter() - started
    started = time.perf_counter()
    sync.average_gradients()
    averaged_s = time.perf_counter() - started
    for index, site in run.sites.items():
        started = time.perf_counter()
        vectors[index].append(site.apply(losses[index]))
        seconds[index] += time.perf_counter() - started
        run.progress.step_callback(index, round_idx)(vectors[index][-1])
    return averaged_s


def finish_device_work(device: torch.device) -> None:
    """Wait for queued kernels, once per site and round, so that times cover finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronize(run: Run) -> dict[int, RoundRouting]:
    """The sync that ends a round: it is committed at all sites, or at none.

    At the end of the run every other fragment is synced once more before it.

    Raises:
        SyncError: saying what is lost, if a site fails or its state is not finite.
    """
    for fragment in run.sync.synced_again():
        run.sync.sync_fragment(fragment)
    prepared = run.sync.prepare()
    run.sync.commit(run.sync.exchange(prepared))
    for site in run.sites.values():
        gather_rows(site, run.plan)
    return prepared.routing


def evaluate_sites(run: Run, round_idx: int) -> dict[int, float]:
    """Evaluate each site's own model if it is due; returns the agreement of the probe's top-k."""
    agreement = {}
    if evaluation_is_due(run.config, round_idx):
        for site_idx, site in run.sites.items():
            with unparked(run.parkings_of(site_idx), optimizer=False):
                result = run.system.evaluate_site(site, run.data.held_out)
            run.local_losses[site_idx] = result.loss
            if site_idx in run.probes:
                agreement[site_idx] = topk_agreement(run.probes[site_idx], result.probe_LTK)
            run.probes[site_idx] = result.probe_LTK
    return agreement


def evaluation_is_due(config: Config, round_idx: int) -> bool:
    """Whether each site evaluates its own model after this round."""
    return is_due(config.run.eval_every, round_idx, config.rounds)


def merged_loss(run: Run) -> MergedEvaluation:
    with run.sync.whole(), unparked(run.parkings.values(), optimizer=False):
        found = run.system.evaluate_whole(run.plan, run.sites, run.transport, run.data)
    return replace(found, more=found.more | run.sync.figures())


def is_due(every: int, round_idx: int, rounds: int) -> bool:
    """Whether something done every n rounds (0: at the end only) is due after this one."""
    return round_idx + 1 == rounds or (every > 0 and (round_idx + 1) % every == 0)
