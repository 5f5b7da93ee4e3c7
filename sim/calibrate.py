"""`fomoe calibrate`: fit step time, link and fixed cost per sync from real runs.

A round of a real run takes `H x step time + fixed cost x syncs + wire bits / effective bandwidth`,
and a step takes `fixed part + FLOPs / speed`. Both lines are fitted alike: their fixed part and
their slope can be told apart only if the runs differ in bytes per sync, or in FLOPs per step; where
they do not, all the time counts as slope and the calibration says so. What was not fitted (other
runs, or the last rounds of each) is predicted and the error is written beside the fit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from fomoe_sim.runs import Round, read_runs
from fomoe_sim.trainer import ConfigError
from fomoe_sim.units import FASTEST_BPS, read_rate, read_record, within

MOST = 1e24  # of any figure of a file
LARGE_ERROR = 0.2  # of the held-out rounds' time: the user is told


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted; a file of it serves `fomoe project --calibration`.

    Attributes:
        runs: folders that were fitted.
        step_time_s: one local step at the slowest site, of `step_flops` FLOPs, the most of a step.
        step_fixed_s: the part of it that does not depend on the FLOPs.
        effective_bps: wire bits per second of the site that sends most; None if the sync time does
            not grow with the bytes (a link too fast to be seen).
        sync_fixed_s: time of one sync beside its bits.
        link_efficiency: effective over the stated bandwidth, None without either.
        separated: whether fixed cost and bandwidth were told apart.
        note: what the fit could not decide, in words; empty if nothing.
        held_out: what was predicted without being fitted.
        num_rounds, held_out_rounds: how many rounds were fitted and predicted.
        round_error, sync_error: median relative error on held-out rounds; None without any.
        payload_error_bytes: largest difference between planned and counted payload of them.
    """

    runs: tuple[str, ...]
    step_time_s: float = within(0, MOST)
    step_flops: float = within(0, MOST)
    step_fixed_s: float = within(0, MOST, 0.0)
    effective_bps: float | None = within(0, FASTEST_BPS)
    sync_fixed_s: float = within(0, MOST)
    link_efficiency: float | None = within(0, MOST, None)
    separated: bool
    note: str = ""
    held_out: str = ""
    num_rounds: int
    held_out_rounds: int = 0
    round_error: float | None = None
    sync_error: float | None = None
    payload_error_bytes: int | None = None

    def step_s(self, step_flops: float) -> float:
        """Predicted time of one step, for its FLOPs at the site that executes most."""
        moving = self.step_time_s - self.step_fixed_s
        return self.step_fixed_s + moving * step_flops / self.step_flops

    def sync_s(self, wire_bytes: float, *, num_syncs: int = 1) -> float:
        """Predicted time of the syncs of one round, for the bytes of all of them together."""
        moving = 8 * wire_bytes / self.effective_bps if self.effective_bps else 0.0
        return num_syncs * self.sync_fixed_s + moving


# --------------------------------------------------------------------------------------------- fit


def split_rounds(rounds: list[Round]) -> tuple[list[Round], list[Round]]:
    """Rounds to fit and rounds to predict: of each run's rounds the last third is held out.

    A run of fewer than three rounds is fitted whole.
    """
    fitted: list[Round] = []
    held_out: list[Round] = []
    for run in dict.fromkeys(r.run for r in rounds):
        own = sorted((r for r in rounds if r.run == run), key=lambda r: r.index)
        keep = len(own) - len(own) // 3
        fitted += own[:keep]
        held_out += own[keep:]
    return fitted, held_out


def without_first(rounds: list[Round]) -> list[Round]:
    """Rounds without each run's first, in which kernels are built and connections are slow.

    A run of one round keeps it.
    """
    later = [r for r in rounds if r.index > 0]
    alone = [r for r in rounds if r.index == 0 and all(o.run != r.run for o in later)]
    return alone + later


def fit(
    rounds: list[Round], held_out: list[Round], *, bandwidth_bps: float | None = None
) -> Calibration:
    """Fit one calibration and check it on rounds that were not fitted.

    Args:
        rounds: to fit, at least one.
        held_out: to predict; may be empty.
        bandwidth_bps: the link's stated bandwidth, if known.

    Raises:
        ConfigError: if the runs moved more bits than the stated bandwidth allows.
    """
    rounds = without_first(rounds)
    fixed, effective, separated, note = fit_link(rounds)
    step_time_s, step_flops, step_fixed_s = fit_step(rounds)
    missing = sorted({site for r in rounds + held_out for site in r.missing_sites})
    if missing:
        files = ", ".join(f"metrics.site{site}.jsonl" for site in missing)
        lacking = f"without {files} in the folder, waiting for those sites counts as sync time"
        note = "; ".join(filter(None, [note, lacking]))
    efficiency = None
    if bandwidth_bps is not None and effective is not None:
        efficiency = effective / bandwidth_bps
        if efficiency > 1 + 1e-6:
            rule = f"is below the {effective:.4g} bit/s that the runs moved"
            raise ConfigError("--bandwidth", f"{bandwidth_bps:.4g} bit/s", rule)
    calibration = Calibration(
        runs=tuple(dict.fromkeys(r.run for r in rounds)),
        step_time_s=step_time_s,
        step_flops=step_flops,
        step_fixed_s=step_fixed_s,
        effective_bps=effective,
        sync_fixed_s=fixed,
        link_efficiency=efficiency,
        separated=separated,
        note=note,
        num_rounds=len(rounds),
    )
    return check(calibration, held_out) if held_out else calibration


def check(calibration: Calibration, held_out: list[Round]) -> Calibration:
    """The same calibration with its errors on rounds that were not fitted."""
    whole, syncs, planned = [], [], []
    for r in held_out:
        sync = calibration.sync_s(r.wire_bytes, num_syncs=r.num_syncs)
        predicted = r.local_steps * calibration.step_s(r.step_flops) + sync
        whole.append(abs(predicted / r.round_s - 1))
        syncs.append(abs(sync / r.sync_s - 1))
        planned.append(abs(r.planned_payload_bytes - r.payload_bytes))
    return replace(
        calibration,
        held_out=", ".join(dict.fromkeys(r.run for r in held_out)),
        held_out_rounds=len(held_out),
        round_error=median(whole),
        sync_error=median(syncs),
        payload_error_bytes=max(planned),
    )


# ------------------------------------------------------------------------------------------- lines


def fit_link(rounds: list[Round]) -> tuple[float, float | None, bool, str]:
    """Fixed cost per sync, effective bandwidth, whether they were told apart, and a note."""
    line = fit_line([(r.num_syncs, 8 * r.wire_bytes, r.sync_s) for r in rounds])
    notes = {
        "one": "all rounds send the same bytes per sync: the fixed cost cannot be told from the "
        "bandwidth and counts as bandwidth; fit runs of different payloads together",
        "flat": "sync time does not grow with the bytes sent: all of it counts as fixed cost",
        "origin": "the best line has a negative fixed cost: it is taken as 0",
        "both": "",
    }
    rate = 1 / line.slope if line.slope else None
    return line.fixed, rate, line.kind != "one", notes[line.kind]


def fit_step(rounds: list[Round]) -> tuple[float, float, float]:
    """Time of the heaviest step, its FLOPs, and its fixed part."""
    line = fit_line([(1, r.step_flops, r.train_s / r.local_steps) for r in rounds])
    most = max(r.step_flops for r in rounds)
    return line.fixed + line.slope * most, most, line.fixed


@dataclass(frozen=True, kw_only=True)
class Line:
    """`fixed x count + slope x amount`; `kind` says what the points could decide: both, one (equal
    amounts: slope only), origin (a fixed part below 0 is taken as 0) or flat (fixed part only)."""

    fixed: float
    slope: float
    kind: str


def fit_line(points: list[tuple[float, float, float]]) -> Line:
    """The line through (count, amount, time) that minimises the relative error.

    Points of equal count and amount are first reduced to their median.
    """
    groups: dict[tuple[float, float], list[float]] = {}
    for count, amount, time_s in points:
        groups.setdefault((count, amount), []).append(time_s)
    counts = np.array([key[0] for key in groups], dtype=float)
    amounts = np.array([key[1] for key in groups], dtype=float)
    times = np.array([median(values) for values in groups.values()])
    through_origin = float(np.sum(amounts / times) / np.sum((amounts / times) ** 2))
    each = amounts / counts
    if each.max() < 1.05 * each.min():
        return Line(fixed=0.0, slope=through_origin, kind="one")
    columns = np.stack([counts / times, amounts / times], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    if slope <= 0:
        return Line(fixed=float(np.median(times / counts)), slope=0.0, kind="flat")
    if fixed < 0:
        return Line(fixed=0.0, slope=through_origin, kind="origin")
    return Line(fixed=float(fixed), slope=float(slope), kind="both")


# -------------------------------------------------------------------------------------------- file


def save_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a calibration as JSON."""
    try:
        Path(path).write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", path, f"cannot be written: {error.strerror}") from None


def load_calibration(path: str | Path) -> Calibration:
    """Read a file that `fomoe calibrate` wrote.

    Raises:
        ConfigError: if it is missing, not JSON, or lacks or adds a field.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("--calibration", path, "does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise ConfigError("--calibration", path, "is not a readable JSON file") from None
    found: Calibration = read_record(Calibration, tree, "--calibration")
    if not found.step_time_s or found.effective_bps == 0:
        raise ConfigError("--calibration", path, "has a step time or bandwidth of 0")
    if not found.step_flops or found.step_fixed_s > found.step_time_s:
        rule = "has a step of 0 FLOPs, or one that is shorter than its fixed part"
        raise ConfigError("--calibration", path, rule)
    return found


# ------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fomoe calibrate`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders to fit")
    parser.add_argument(
        "--hold-out",
        nargs="+",
        default=[],
        metavar="RUN",
        help="run folders to predict and not to fit; else the last third of each run's rounds",
    )
    parser.add_argument("--bandwidth", help="stated bandwidth of the link, as 1Gbit")
    parser.add_argument("--out", metavar="FILE", help="else calibration.json in the first run")
    parser.add_argument("--json", action="store_true", help="print the calibration as JSON")


def run(args: argparse.Namespace) -> int:
    """Fit, check, write and print."""
    rounds = read_runs(args.runs)
    bandwidth = read_rate(args.bandwidth, "--bandwidth") if args.bandwidth else None
    both = {Path(path).resolve() for path in args.runs} & {
        Path(path).resolve() for path in args.hold_out
    }
    if both:
        raise ConfigError("--hold-out", both.pop(), "is also a run to fit")
    held_out = read_runs(args.hold_out)
    if not held_out:
        rounds, held_out = split_rounds(rounds)
    calibration = fit(rounds, held_out, bandwidth_bps=bandwidth)
    out = Path(args.out) if args.out else Path(args.runs[0]) / "calibration.json"
    save_calibration(calibration, out)
    print(json.dumps(asdict(calibration), indent=2) if args.json else text(calibration, out))
    return 0


def text(calibration: Calibration, out: Path) -> str:
    """The calibration as a person reads it."""
    c = calibration
    link = f"{c.effective_bps / 1e6:.4g} Mbit/s" if c.effective_bps else "too fast to be seen"
    share = "" if c.link_efficiency is None else f" ({c.link_efficiency:.3f} of the stated)"
    work = f", {c.step_flops / 1e9:.4g} GFLOP, of which {c.step_fixed_s:.3g} s are fixed"
    lines = [
        f"fitted {c.num_rounds} rounds of {', '.join(c.runs)}",
        f"step time        {c.step_time_s:.5g} s (slowest site{work})",
        f"link             {link}{share}",
        f"fixed per sync   {c.sync_fixed_s:.4g} s",
    ]
    if c.note:
        lines.append(f"note: {c.note}")
    if c.round_error is not None and c.sync_error is not None:
        lines.append(
            f"held out: {c.held_out_rounds} rounds of {c.held_out}: median error of the round time "
            f"{c.round_error:.1%}, of the sync time {c.sync_error:.1%}"
        )
    if c.round_error is not None and c.round_error > LARGE_ERROR:
        lines.append(
            f"note: above {LARGE_ERROR:.0%} the rounds vary by more than their links; calibrate "
            "from 8 rounds or more, on machines that do nothing else"
        )
    if c.payload_error_bytes is not None:
        lines.append(f"held out: planned payload is off by {c.payload_error_bytes} bytes")
    return "\n".join([*lines, f"wrote {out}"])
