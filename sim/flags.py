"""Flags that `project` and `plan` share: the model, the sites and our assumptions."""

from __future__ import annotations

import argparse

from fomoe.errors import ConfigError
from fomoe_sim.hardware import read_up_down
from fomoe_sim.ranges import check_flags, flag_of
from fomoe_sim.traffic import EVERY_STEP


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name the model, the sites and our assumptions; `plan` shares them."""
    group = parser.add_argument_group("model and sites")
    group.add_argument("--model", help="model preset, such as deepseek-v3")
    group.add_argument("--config", help="a YAML experiment of fomoe train instead")
    group.add_argument("--cluster", help="YAML description of the sites")
    group.add_argument("--sites", type=int, help="number of equal sites (default 4)")
    group.add_argument("--accelerator", help="of every site (default H100)")
    group.add_argument(
        "--accelerators", type=int, help="per site (default 64; 1 below 1e9 or with --config)"
    )
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
        choices=("none", "experts", "selective", "full"),
        help="activations computed twice (default selective; a config's own model.recompute)",
    )
    group.add_argument(
        "--outer-on",
        choices=("host", "accelerator", "disk"),
        help="where anchor and outer state live (default host)",
    )
    group.add_argument("--mfu", type=float, help="share of peak FLOP/s while computing")
    group.add_argument(
        "--step-time", type=float, help="seconds of a full step, recomputation included"
    )
    group.add_argument("--calibration", help="file written by fomoe calibrate")


def check_question(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, once, before anything is computed."""
    check_flags(args)
    if (args.model is None) == (args.config is None):
        given = "both" if args.model else "neither"
        raise ConfigError("--model", given, "is given; name one of --model and --config")
    if args.cluster:
        rule = "contradicts --cluster, which states it per site"
        _refuse(args, ("accelerator", "accelerators", "price"), rule)
    if args.step_time is not None:
        _refuse(args, ("mfu",), "contradicts --step-time, which is measured and needs none")
    if args.calibration:
        rule = "contradicts --calibration, whose fixed cost per sync contains it"
        _refuse(args, ("rtt_ms",), rule)
        rule = "contradicts --calibration, which has a step time"
        _refuse(args, ("step_time",), rule)
        if args.config:
            _refuse(args, ("mfu", "accelerator", "accelerators"), f"{rule} of the fitted sites")
    if args.bandwidth:
        read_up_down(args.bandwidth, "--bandwidth")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], rule: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ConfigError(flag_of(name), getattr(args, name), rule)


PLACED = ("fomoe", "spes", "resident-routing")  # methods that replication changes
ROUND_FLAGS = ("fragments", "overlap_steps")
METHOD_FLAGS = ("replication", *ROUND_FLAGS, "outer_on", "topology")


def ignored_flags(method: str, *, experts: bool) -> dict[str, str]:
    """Options that change nothing for a method, each with what it is that they mean nothing to."""
    ignored: dict[str, str] = {}
    if not experts:
        ignored["replication"] = "a model without routed experts"
    elif method not in PLACED:
        ignored["replication"] = f"method {method}"
    if method in EVERY_STEP:
        every_step = f"{method}, which communicates in every step"
        ignored |= dict.fromkeys((*ROUND_FLAGS, "outer_on"), every_step)
    if method == "spes":
        ignored["topology"] = "spes, whose sites exchange through a server of its own"
    return ignored


def check_methods(
    args: argparse.Namespace, methods: list[str], *, experts: bool, axes: tuple[str, ...] = ()
) -> None:
    """Refuse options that none of the methods asked about would use.

    Args:
        methods: as the user named them.
        experts: whether the model has routed experts.
        axes: options that --sweep varies.
    """
    for name in METHOD_FLAGS:
        if name in axes:
            flag, value = "--sweep", name
        elif getattr(args, name) is not None:
            flag, value = flag_of(name), getattr(args, name)
        else:
            continue
        reasons = [ignored_flags(method, experts=experts).get(name) for method in methods]
        if reasons and all(reasons):
            raise ConfigError(flag, value, f"has no meaning for {reasons[0]}")
