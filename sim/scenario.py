"""One question: a model, sites, a method and its options, with the source of every default."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fomoe.memory import SiteMemory
from fomoe_sim.cluster import Cluster
from fomoe_sim.flops import TRAIN, TokenFlops, token_flops
from fomoe_sim.shape import ModelShape
from fomoe_sim.traffic import Floats, Holdings, Traffic, method_traffic

# Model FLOPs utilisation (low, central, high) while a site computes.
MFU_MOE = (0.20, 0.25, 0.30)
MFU_DENSE = (0.38, 0.40, 0.43)
BATCH_TOKENS = 4 * 2**20
ALLOCATOR_SLACK = 0.10
STREAMING_BITS = 4
STREAMING_OVERLAP = 1
LAYERS_PER_FRAGMENT = 3

# What the user did not say, and where our answer comes from.
SOURCES = {
    "mfu (MoE)": "0.25, range 0.20-0.30: below DeepSeek-V3's 0.34 of bf16 peak, which 180 k "
    "H800-hours per 1e12 tokens imply (arXiv 2412.19437) and which computes in FP8",
    "mfu (dense)": "0.40, range 0.38-0.43: Llama-3 405B, 380-430 of 989 TFLOP/s "
    "(arXiv 2407.21783, table 4)",
    "sites": "4 sites, each expert at 2 of them, H = 32, 1 Gbit/s both ways; a preset of 1e9 "
    "parameters or more has 64 H100 per site, else one: choices to start from, no figures",
    "failures": "one per 50,700 accelerator-hours, repaired in 0.28 h: Llama-3 405B's 419 in 54 "
    "days on 16,384 (arXiv 2407.21783, table 5) and its effective training time",
    "batch tokens": "4 Mi tokens per step over all sites: the first batch size of Llama-3 405B "
    "(arXiv 2407.21783, section 3.4)",
    "bits": "32: the trainer sends fp32; streaming 4 (arXiv 2501.18512)",
    "streaming": "fragments of 3 strided layers, one step of overlap (arXiv 2501.18512)",
    "link efficiency, fixed cost": "1/1.15 and 0.07 s per sync: fitted to shaped TCP links "
    "between 4 sites (diloco-measured)",
    "rtt": "40 ms: light in 4,000 km of fibre and back",
    "fp32": "a config with inner.precision fp32 computes at the datasheets' fp32 peak",
    "allocator slack": "10 % of what is allocated: an assumption; no figure is published for a "
    "caching allocator under this load",
    "tokens of the run": "20 per active parameter (arXiv 2203.15556)",
    "egress": "USD 0-0.09 per GB: neoclouds charge nothing, AWS's first Internet tier 0.09 (2026)",
    "states": "fp32: 4 bytes parameter, 4 gradient, 8 Adam per element, as the trainer keeps",
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One configuration to be costed; equal H at all sites.

    Attributes:
        method: whose formulas cost it.
        label: the method as the user named it; a config's may be a setting of another one.
        holdings: who holds which experts under FoMoE's placement.
        replication_factor: mean holders per expert of that placement.
        local_steps: steps per round, H.
        bits: per element on the wire.
        fragments: parts of the model synced at staggered steps; 1: all at the round's end.
        overlap_steps: steps that a sync may take beside compute; 0: the site waits.
        tokens_per_step: of one site.
        mfu: low, central and high share of peak FLOP/s while computing.
        tokens: of the whole run.
        states: bytes per element, see fomoe_sim.memory.
        recompute: which activations are computed twice.
        micro_batch: sequences per accelerator and micro-batch.
        compute_bytes: per activation element, on accelerators; 4: products run in fp32.
        outer_on: where anchor, outer momentum and sync buffers live.
        outer_vectors: fp32 vectors of outer optimizer state.
        step_time_s: of the slowest site, measured instead of computed; None: from FLOPs.
        trainer_states: per site, what `fomoe.memory` counts for a config; None for presets.
        step_time_flops: FLOPs of that step; None: of a full step of this scenario.
        step_fixed_s: the part of it that does not depend on the FLOPs.
        at_least_one, route_scope, execute_target: the router's options, as in a config.
    """

    shape: ModelShape
    cluster: Cluster
    method: str
    label: str
    holdings: Holdings
    replication_factor: float
    local_steps: int
    tokens_per_step: int
    mfu: tuple[float, float, float]
    tokens: float
    bits: float = 32
    fragments: int = 1
    overlap_steps: int = 0
    seq_len: int = 4096
    at_least_one: bool = True
    route_scope: str = "all"
    execute_target: float | None = None
    states: Literal["fp32", "mixed"] = "fp32"
    recompute: Literal["none", "experts", "selective", "full"] = "selective"
    micro_batch: int = 1
    compute_bytes: int = 2
    outer_on: Literal["host", "accelerator", "disk"] = "host"
    outer_vectors: int = 1
    slack: float = ALLOCATOR_SLACK
    step_time_s: float | None = None
    step_time_flops: float | None = None
    step_fixed_s: float = 0.0
    trainer_states: tuple[SiteMemory, ...] | None = None

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes of one exchange at every site."""
        return method_traffic(
            self.shape,
            self.method,
            self.holdings,
            bits=self.bits,
            topology=self.cluster.topology,
            tokens_per_step=self.tokens_per_step,
            at_least_one=self.at_least_one,
            route_scope=self.route_scope,
            execute_target=self.execute_target,
        )

    @cached_property
    def step_at_peak_s(self) -> Floats:
        """Time of one step at each site's peak FLOP/s, recomputation included, [K]."""
        share, flops = self.traffic.executed, self.flops
        work = flops.executed(share)
        # Recomputing runs a forward pass again, of the three passes' worth that a step is.
        again = {"full": work, "experts": flops.experts * share}
        work = work + again.get(self.recompute, 0.0) / TRAIN
        return self.tokens_per_step * work / self.cluster.peak_flops(self.compute_bytes)

    @cached_property
    def flops(self) -> TokenFlops:
        return token_flops(self.shape, self.seq_len)
