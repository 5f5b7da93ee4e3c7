"""Flags that `project` and `plan` share: the model, the sites and our assumptions."""

from __future__ import annotations

import argparse
from math import isfinite

from fomoe.errors import ConfigError
from fomoe_sim.hardware import read_up_down
from fomoe_sim.traffic import EVERY_STEP


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name the model, the sites and our assumptions; `plan` shares them."""
    group = parser.add_argument_group("model and sites")
    group.add_argument("--model", help="model preset, such as deepseek-v3")
    group.add_argument("--config", help="a YAML experiment of fomoe train instead")
    group.add_argument("--cluster", help="YAML description of the sites")
    group.add_argument("--sites", type=int, help="number of equal sites (default 4)")
    group.add_argument("--accelerator", help="of every site (default H100)")
    group.add_argument("--accelerators", type=int, help="per site (default 64; 1 below 1e9)")
    group.add_argument("--price", type=float, help="USD per accelerator-hour")
    group.add_argument("--bandwidth", help="of every site: 1Gbit, or UP/DOWN (default 1Gbit)")
    group.add_argument("--topology", choices=("ring", "star", "tree"))
    group.add_argument("--rtt-ms", type=float, help="round trip between sites (default 40)")
    group = parser.add_argument_group("training")
    group.add_argument("--replication", type=int, help="holders per expert, r (default 2)")
    group.add_argument("--local-steps", type=int, help="steps per round, H (default 32)")
    group.add_argument("--bits", type=int, help="per element on the wire")
    group.add_argument("--fragments", type=int, help="parts synced at staggered steps")
    group.add_argument("--overlap-steps", type=int, help="steps a sync may take beside compute")
    group.add_argument("--tokens", type=float, help="of the run (default 20 per active parameter)")
    group.add_argument("--batch-tokens", type=float, help="per step over all sites (default 4 Mi)")
    group.add_argument("--seq-len", type=int, help="context in tokens")
    group.add_argument("--micro-batch", type=int, help="sequences per accelerator at a time")
    group.add_argument(
        "--states",
        choices=("fp32", "mixed"),
        default="fp32",
        help="16 bytes per parameter, or 18 with bf16 weights and fp32 masters (default fp32)",
    )
    group.add_argument(
        "--recompute",
        choices=("none", "selective", "full"),
        help="activations computed twice (default selective; none for a config)",
    )
    group.add_argument(
        "--outer-on",
        choices=("host", "accelerator", "disk"),
        default="host",
        help="where anchor and outer state live (default host)",
    )
    group.add_argument("--mfu", type=float, help="share of peak FLOP/s while computing")
    group.add_argument("--step-time", type=float, help="seconds of a full step, nothing skipped")
    group.add_argument("--calibration", help="file written by fomoe calibrate")


def check_question(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, once, before anything is computed."""
    if (args.model is None) == (args.config is None):
        given = "both" if args.model else "neither"
        raise ConfigError("--model", given, "is given; name one of --model and --config")
    for flag in ("accelerator", "accelerators", "price"):
        value = getattr(args, flag)
        if args.cluster and value is not None:
            raise ConfigError(f"--{flag}", value, "contradicts --cluster, which states it per site")
    positive = ("sites", "replication", "local_steps", "accelerators", "fragments", "bits")
    for name in (*positive, "tokens", "batch_tokens", "seq_len", "micro_batch", "step_time"):
        value = getattr(args, name)
        if value is not None and not (isfinite(value) and value > 0):
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be above 0")
    for name in ("price", "rtt_ms", "overlap_steps"):
        value = getattr(args, name)
        if value is not None and not (isfinite(value) and value >= 0):
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must not be negative")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ConfigError("--mfu", args.mfu, "must lie in (0, 1]")
    if args.bandwidth:
        read_up_down(args.bandwidth, "--bandwidth")


PLACED = ("fomoe", "spes", "resident-routing")  # methods that replication changes
ROUND_FLAGS = ("fragments", "overlap_steps")


def check_methods(args: argparse.Namespace, methods: list[str], *, experts: bool) -> None:
    """Refuse flags that none of the methods asked about would use.

    Args:
        methods: as the user named them.
        experts: whether the model has routed experts.
    """
    placed = set(PLACED) & set(methods)
    if args.replication is not None and not (placed and experts):
        what = f"method {methods[0]}" if experts else "a model without routed experts"
        raise ConfigError("--replication", args.replication, f"has no meaning for {what}")
    for name in ROUND_FLAGS:
        value = getattr(args, name)
        if value is not None and set(methods) <= set(EVERY_STEP):
            flag = f"--{name.replace('_', '-')}"
            rule = f"has no meaning for {methods[0]}, which communicates in every step"
            raise ConfigError(flag, value, rule)
