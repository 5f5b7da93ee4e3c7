"""Options of federated fine-tuning with adapters (no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fomoe.options import IntTuple, NonNegativeFloat, Options, PositiveFloat, Text, TextTuple

# What the server makes of the clients' adapters; `adapters/server.py` has a function for each but
# the first, which is the sync of pre-training.
Aggregate = Literal[
    "segments",
    "segments-svd",
    "zero-pad-values",
    "zero-pad-deltas",
    "hetlora",
    "flexlora",
    "flora",
]
# What `fomoe eval` adds to the losses of a run on pairs.
ANSWER_METRICS = ("accuracy", "rouge-l")
AdapterMethod = Literal["prelort", "fedit-min", "fedit-max", Aggregate]


class AdaptersConfig(Options):
    """Low-rank adapters that the sites, called clients, train on one frozen base."""

    base: Text | None = None
    """Frozen causal model of transformers, a folder or a hub name; null: pre-training."""
    base_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the base's weights in memory; adapters are always fp32."""
    targets: TextTuple = ("q_proj", "v_proj")
    """Linear layers that are adapted: the last parts of their names, or patterns with *."""
    ranks: IntTuple = ()
    """[dimensions] Rank of every client's adapters, one per site."""
    scale: PositiveFloat = 2.0
    """Factor s of an adapter's product; with another scaling than constant, alpha."""
    scaling: Literal["constant", "alpha/r", "alpha/sqrt(r)"] = "constant"
    """Factor at rank r: scale for every rank, so that a truncation is a prefix; scale / r; or
    scale / sqrt(r)."""
    nesting: Literal["none", "full+1", "sandwich", "all", "rows"] = "sandwich"
    """Ranks of the loss, from the distinct ranks up to the client's own: its own; and a random
    one; smallest, own and a random one; all; or one drawn for every sequence, in one pass."""
    aggregate: Aggregate = "segments"
    """How adapters become one: every range of rows over the clients that have it (segments), or
    a baseline, which needs all clients in one process."""
    prune_keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """[share] Self-pruning of aggregate hetlora: what a client keeps of its rank when the last rows
    have shrunk in a round; null: none."""
    prune_weight: NonNegativeFloat = 0.01
    """Weight of the penalty on the rows that self-pruning would remove."""
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    """[share] Clients that train in a round, drawn from the seed; the others only receive."""
    keep_optimizer: bool = False
    """Whether a client's inner optimizer keeps its state from round to round."""
