"""Time of one local step inside a site: products, what is bound by memory, and traffic that stays.

Nothing here is fitted to a run. A step takes the longer of its compute and of the shards that are
gathered and scattered beside it, plus what nothing can hide: tensor-parallel and expert-parallel
exchanges, the pipeline's bubble, the optimizer. All figures are arrays over candidate layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_sim.cluster import Accelerator
from fomoe_sim.shape import TRAIN, ModelShape, token_work

Array = NDArray[np.float64]

# (low, central, high) of every range; the central figure is used unless a range is asked for.
SCALE = (0.75, 1.0, 1.2)  # of the shares below: what equal models reach on equal accelerators

EXPERT_FIXED = 0.06  # of a full expert layer's time, where nothing runs
VALUE_PASSES = {"fused": 5.0, "eager": 10.0}  # of each kept value through device memory
LOGIT_BYTES = 12.0
WEIGHT_BYTES = 12.0  # read forward and backward, gradient read and written in fp32
OPTIMIZER_BYTES = 28.0  # parameter, gradient and two moments read, all but the gradient written
REACHED = 0.8  # of the nominal rates of memory, NVLink and NICs
FP8_SHARE = 0.75  # of the share of peak that bf16 reaches: casts and scales take the rest
OVERLAP_SHARE = 20 / 132  # of an accelerator's units move tokens then (arXiv 2412.19437, 3.2.2)
GATHER_BYTES = 2.0  # bf16 shards, and gradients that are scattered
# What is computed twice: name -> share of the forward products, of the experts', whole layers.
AGAIN = {
    "none": (0.0, 0.0, 0.0),
    "experts": (0.0, 1.0, 0.0),
    "selective": (0.0, 0.0, 0.0),
    "half": (0.5, 0.5, 0.0),
    "full": (1.0, 1.0, 1.0),
}
RECOMPUTE = tuple(AGAIN)


@dataclass(frozen=True, kw_only=True)
class Inside:
    """How a site computes.

    Attributes:
        seq_len: context in tokens.
        micro_batch: sequences per accelerator and micro-batch; 0: the search chooses.
        recompute: what may be computed twice; several: the search chooses.
        parallel: degrees that are given, as (name, value) pairs.
        states, adam: of the parameters and of the optimizer, see `fomoe_sim.memory`.
        precision: of matrix products; kernels: fused or eager between them.
    """

    seq_len: int
    micro_batch: int = 0
    recompute: tuple[str, ...] = ("selective", "full")
    parallel: tuple[tuple[str, int], ...] = ()
    states: str = "fp32"
    adam: str = "fp32"
    precision: str = "bf16"
    kernels: str = "fused"

    @property
    def element_bytes(self) -> int:
        """Of an activation element."""
        return 4 if self.precision == "fp32" else 2

    def peak(self, device: Accelerator) -> float:
        """FLOP/s of matrix products on the datasheet; 0 where there is no such precision."""
        return {
            "bf16": device.peak_flops,
            "fp32": device.peak_fp32_flops,
            "fp8": device.peak_fp8_flops,
        }[self.precision]

    def rate(self, device: Accelerator) -> float:
        """FLOP/s of which products reach an accelerator's shares."""
        return self.peak(device) * (FP8_SHARE if self.precision == "fp8" else 1.0)


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """What one site computes in a step, and how it may be laid out over its accelerators.

    Attributes:
        tokens: of the site's step.
        executed: share of the top-k assignments that run.
        residents: routed experts per layer that the site holds, mean over layers.
        experts, shared: elements held, of routed experts and of all else; trained: of both.
        counted: bytes of parameters, gradients, optimizer as the trainer counts them; or None.
        outer_bytes: of anchor, outer state and sync buffers that live on the accelerators.
    """

    shape: ModelShape
    device: Accelerator
    count: int
    inside: Inside
    tokens: float
    executed: float
    residents: float
    experts: float
    shared: float
    trained: float
    counted: tuple[float, float, float] | None = None
    outer_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Degrees:
    """Candidate layouts; arrays of one entry each, [C].

    Attributes:
        tp, pp, cp: tensor, pipeline and context parallel ranks of one replica.
        ep: data-parallel ranks that share the routed experts.
        dp: replicas; shard: of them, how many share one copy of the states.
        zero: 3: parameters are gathered for every micro-batch; 1: kept whole, optimizer sharded.
        overlap: 1: tokens on their way to experts hide behind another micro-batch (DualPipe).
        micro: sequences per micro-batch; steps: micro-batches of a step; stages: of a rank.
        recompute: index into `RECOMPUTE`.
    """

    tp: Array
    pp: Array
    cp: Array
    ep: Array
    dp: Array
    shard: Array
    zero: Array
    overlap: Array
    micro: Array
    steps: Array
    stages: Array
    recompute: NDArray[np.int64]


def parts(work: SiteWork, degrees: Degrees, scale: float = 1.0) -> dict[str, Array]:
    """Seconds of one step by what they are spent on, [C] each; see `total`.

    Args:
        scale: of the shares of peak, one of `SCALE`.
    """
    device, inside = work.device, work.inside
    rate = scale * inside.rate(device)
    token = token_work(work.shape, inside.seq_len)
    ranks = degrees.tp * degrees.pp * degrees.cp  # of one replica
    tokens = work.tokens / degrees.dp / ranks  # of one accelerator, as shares of a replica's
    memory = device.memory_bandwidth * REACHED
    forward = tokens * token.products / TRAIN / (rate * device.products)
    # Scores stay in bf16 where products run in fp8.
    bf16 = min(inside.peak(device), device.peak_flops)
    scores = tokens * token.scores / (scale * bf16 * device.scores)
    share = EXPERT_FIXED + (1 - EXPERT_FIXED) * work.executed if work.executed < 1 else 1.0
    experts = tokens * token.experts * share / (rate * device.experts) * _rows(work, degrees)
    again, again_experts, whole = np.array(list(AGAIN.values()))[degrees.recompute].T
    kept = token.kept + token.kept_experts * work.executed
    values = (
        VALUE_PASSES[inside.kernels] * kept * inside.element_bytes
        + 2.5 * LOGIT_BYTES * work.shape.vocab_size
    )
    owned = (work.shared + work.experts) / (degrees.tp * degrees.pp * degrees.shard)
    return {
        "products": forward * (TRAIN + again),
        "attention scores": scores * (1 + whole / TRAIN),
        "experts": experts * (1 + again_experts / TRAIN),
        "values between products": tokens * values * (1 + whole / TRAIN) / memory,
        "optimizer": OPTIMIZER_BYTES * owned / memory,
        **_traffic(work, degrees),
    }


def total(found: dict[str, Array], degrees: Degrees) -> Array:
    """Seconds of one step: the longer of compute and gathered shards, and what nothing hides."""
    names = ("products", "attention scores", "experts", "values between products")
    compute = sum((found[name] for name in names), np.zeros(degrees.tp.shape))
    # What is gathered or reduced once a step hides behind one micro-batch at most.
    once = np.maximum(0.0, found["replicas"] - compute / degrees.steps)
    hidden = degrees.overlap > 0
    compute = np.where(hidden, compute / (1 - OVERLAP_SHARE), compute)
    tokens = found["experts' tokens"]
    beside = np.maximum(found["shards"], np.where(hidden, tokens, 0.0))
    busy = np.maximum(compute, beside) + found["tensor parallel"] + np.where(hidden, 0.0, tokens)
    return busy * (1 + bubble(degrees)) + once + found["optimizer"]


def bubble(degrees: Degrees) -> Array:
    """Idle share of a pipeline that interleaves its stages (arXiv 2104.04473, section 2.2)."""
    return (degrees.pp - 1) / (degrees.steps * degrees.stages)


def _rows(work: SiteWork, degrees: Degrees) -> Any:
    """How much longer products of few rows per expert take."""
    if not work.shape.num_experts or not work.executed:
        return 1.0
    chosen = degrees.micro * work.inside.seq_len / degrees.cp * work.shape.top_k * work.executed
    rows = chosen * degrees.ep / max(work.residents, 1e-9)
    device = work.device
    # Three products of 2 FLOPs per weight and row against the bytes of that weight.
    rate = work.inside.rate(device) * device.experts
    least = WEIGHT_BYTES * rate / (6 * device.memory_bandwidth * REACHED)
    return np.maximum(1 + device.tile_rows / rows, least / rows)


def ring_bytes_per_s(device: Accelerator, ranks: Array, per_node: Array) -> Array:
    """Rate of a ring of ranks, of which a node has so many: NVLink inside, NICs between."""
    inside = ranks <= per_node
    across = np.minimum(device.nvlink, per_node * device.nic)
    if device.node == 1:
        across = np.full(ranks.shape, device.nic)
    return REACHED * np.where(inside, device.nvlink, across)


def _traffic(work: SiteWork, degrees: Degrees) -> dict[str, Array]:
    """Seconds of the traffic inside the site, per accelerator and step."""
    shape, device, element = work.shape, work.device, work.inside.element_bytes
    model = degrees.tp * degrees.pp
    per_node = np.maximum(1.0, device.node / degrees.tp)
    width = GATHER_BYTES * element / 2
    gathered = _gathered(work, degrees)
    ring = ring_bytes_per_s(device, degrees.shard, per_node)
    every = 3 * width * gathered * degrees.steps / ring  # two gathers and a scatter
    once = 2 * width * gathered / ring  # gradients scattered, parameters gathered
    owned = (work.shared + work.experts) / model / degrees.shard
    groups = degrees.dp / degrees.shard
    over = ring_bytes_per_s(device, groups, np.maximum(1.0, per_node / degrees.shard))
    replicas = np.where(groups > 1, 2 * width * owned * (1 - 1 / groups) / over, 0.0)
    tokens = work.tokens / degrees.dp / degrees.cp
    row = shape.d_model * element
    full = degrees.recompute == RECOMPUTE.index("full")
    layers = shape.num_layers / degrees.pp
    tensor = (8 + 4 * full) * (1 - 1 / degrees.tp) * row * tokens * layers
    return {
        "shards": np.where(degrees.zero == 3, every, 0.0),
        "replicas": replicas + np.where(degrees.zero == 3, 0.0, once),
        "tensor parallel": tensor / (REACHED * device.nvlink),
        "experts' tokens": _expert_tokens(work, degrees, tokens / degrees.tp * row, full),
    }


def _gathered(work: SiteWork, degrees: Degrees) -> Array:
    """Elements that a rank lacks of the parameters that it computes with."""
    mine = work.experts / degrees.ep
    rest = np.maximum(0.0, 1 - degrees.ep / degrees.shard)
    shared = work.shared * (1 - 1 / degrees.shard)
    return (shared + mine * rest) / (degrees.tp * degrees.pp)


def _expert_tokens(work: SiteWork, degrees: Degrees, rows_bytes: Array, full: Array) -> Array:
    """Dispatch and combine, forward and backward; a token crosses once to each node it needs."""
    shape, device = work.shape, work.device
    if not shape.num_moe_layers:
        return np.zeros(degrees.ep.shape)
    copies = shape.top_k * work.executed
    nodes = np.maximum(1.0, degrees.ep * degrees.tp / device.node)
    reached = nodes * (1 - (1 - 1 / nodes) ** copies)
    across = np.minimum(reached, copies) * (1 - 1 / nodes) / device.nic
    inside = copies * (1 - 1 / degrees.ep) / device.nvlink
    seconds = np.maximum(across, inside) / REACHED
    passes = (4 + 2 * full) * shape.num_moe_layers / degrees.pp
    return np.where(degrees.ep > 1, passes * rows_bytes * seconds, 0.0)
