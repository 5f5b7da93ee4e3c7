"""How a site lays a step out over its accelerators: degrees that fit and take the least step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fomoe_sim import memory, step
from fomoe_sim.options import DEGREES
from fomoe_sim.step import RECOMPUTE, SCALE, Degrees, Inside, SiteWork
from fomoe_sim.trainer import ConfigError

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MICRO = (1, 2, 4)
MOST_STAGES = 8  # of a rank's layers, interleaved
NODE, REPLICAS = -1, 0  # one copy of the states in each node, or over all replicas


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One choice of degrees for a site.

    Attributes:
        step_s: seconds of a step at the low, central and high share of peak.
        seconds: of the central one by what they are spent on.
        parts: bytes of the fullest accelerator by part.
        degrees: by name, with `micro`, `recompute` and `bubble`.
    """

    step_s: tuple[float, float, float]
    seconds: dict[str, float]
    parts: dict[str, float]
    degrees: dict[str, int | str]

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def words(self) -> str:
        """The degrees that are not 1, as people write them."""
        shown = [f"{n}{self.degrees[n]}" for n in ("tp", "pp", "cp", "ep") if self.degrees[n] != 1]
        whole = self.degrees["zero"] == 1
        shards = f"{'zero1 ' if whole else 'fsdp'}{self.degrees['shard']}"
        return " ".join([*shown, shards] if self.degrees["shard"] != 1 else shown) or "one device"


@lru_cache(maxsize=4096)
def choose(work: SiteWork) -> Layout:
    """The layout that fits and takes the least time; if none fits, the one that lacks the least.

    Raises:
        ConfigError: if the step has fewer sequences than any layout has replicas.
    """
    shape, inside = work.shape, work.inside
    degrees = candidates(
        (work.count, work.device.node),
        (shape.attention.heads, shape.num_layers, max(1, int(work.residents))),
        work.tokens / inside.seq_len,
        inside,
    )
    seconds = step.parts(work, degrees)
    step_s = step.total(seconds, degrees)
    sizes = memory.accelerator_parts(work, degrees)
    used = sum(sizes.values(), np.zeros(step_s.shape))
    fits = used <= work.device.memory_bytes
    best = int(np.where(fits, step_s, np.inf).argmin() if fits.any() else used.argmin())
    return _layout(work, degrees, best, seconds, sizes)


def at(work: SiteWork, layout: Layout) -> Layout:
    """The same degrees for other work, of a site that differs a little."""
    fixed = replace(
        work.inside,
        parallel=tuple((name, int(layout.degrees[name])) for name in DEGREES),
        micro_batch=int(layout.degrees["micro"]),
        recompute=(str(layout.degrees["recompute"]),),
    )
    return choose(replace(work, inside=fixed))


def _layout(work: SiteWork, degrees: Degrees, best: int, seconds: dict, sizes: dict) -> Layout:
    one = Degrees(**{name: value[best : best + 1] for name, value in vars(degrees).items()})
    three = [float(step.total(step.parts(work, one, scale), one)[0]) for scale in SCALE]
    named: dict[str, int | str] = {name: int(vars(one)[name][0]) for name in DEGREES}
    named |= {"dp": int(one.dp[0]), "micro": int(one.micro[0]), "stages": int(one.stages[0])}
    named["recompute"] = RECOMPUTE[int(one.recompute[0])]
    named["micro_batches"] = int(one.steps[0])
    return Layout(
        step_s=(three[0], three[1], three[2]),
        seconds={name: float(value[best]) for name, value in seconds.items()}
        | {"pipeline bubble": float(step.bubble(one)[0])},
        parts={name: float(value[best]) for name, value in sizes.items() if value[best]},
        degrees=named,
    )


@lru_cache(maxsize=4096)
def candidates(
    devices: tuple[int, int], model: tuple[int, int, int], sequences: float, inside: Inside
) -> Degrees:
    """Every layout of a site's accelerators that keeps to what is given.

    Args:
        devices: accelerators of the site, and of one node.
        model: heads, layers, and routed experts per layer at the site.
        sequences: of the site's step.
    """
    (count, node), (heads, layers, residents) = devices, model
    given = dict(inside.parallel)
    axes = (
        _sizes(given.get("tp"), min(node, heads)),
        _sizes(given.get("pp"), layers),
        (inside.micro_batch,) if inside.micro_batch else MICRO,
        _sizes(given.get("ep"), residents),
        (given["shard"],) if "shard" in given else (NODE, REPLICAS),
        (given["zero"],) if "zero" in given else (3, 1),
        [RECOMPUTE.index(name) for name in inside.recompute],
    )
    every = [axis.ravel().astype(float) for axis in np.meshgrid(*axes, indexing="ij")]
    tp, pp, micro, ep, chosen, zero, kind = every
    cp = np.full(len(tp), float(given.get("cp", 1)))
    dp, in_node = count / (tp * pp * cp), np.maximum(1, node // tp)
    shard = np.where(chosen == NODE, in_node, np.where(chosen == REPLICAS, dp, chosen))
    keep = (dp % 1 == 0) & (dp % ep == 0) & (dp % shard == 0)
    keep &= (dp * micro <= sequences * (1 + 1e-9)) & ((chosen != NODE) | (in_node < dp))
    if "tp" not in given:
        # Tensor ranks lie inside a node and share the heads.
        keep &= (node % tp == 0) & (heads % tp == 0)
    if "zero" not in given:
        keep &= (zero == 3) | ((shard == dp) & (dp > 1))
    if not keep.any():
        degrees = ", ".join(f"{name} {value or 'all'}" for name, value in inside.parallel)
        rule = (
            f"leaves accelerators idle: {count} of them take {sequences:g} sequences"
            + (f" with {degrees}, which must divide them" if degrees else "")
            + " (--batch-tokens, --micro-batch, --seq-len, --parallel)"
        )
        raise ConfigError("--batch-tokens", f"{sequences:g} sequences per site", rule)
    stages = np.where(pp > 1, np.clip(layers // pp, 1, MOST_STAGES), 1.0)
    columns = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": dp, "shard": shard, "zero": zero}
    columns |= {"micro": micro, "steps": -(-sequences // (dp * micro)), "stages": stages}
    columns["overlap"] = np.full(len(tp), float(given.get("overlap", 0)))
    return Degrees(
        **{name: column[keep] for name, column in columns.items()},
        recompute=kind[keep].astype(np.int64),
    )


def _sizes(given: int | None, most: int) -> tuple[int, ...]:
    return (given,) if given else tuple(size for size in SIZES if size <= most)
