"""Memory of an accelerator, part by part, over candidate layouts.

A config's states are those that the trainer counts. What lies on the hosts depends on bits and
fragments, see `fomoe_sim.sites.host_parts`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fomoe_sim.shape import expert_elements, layer_elements
from fomoe_sim.step import LOGIT_BYTES, RECOMPUTE, Degrees, SiteWork

Array = NDArray[np.float64]
FLOAT32 = 4

# Bytes per element: parameter, gradient, master weight. `fp32` is what the trainer keeps; `mixed`
# is bf16 weights with fp32 accumulation and master copy (arXiv 1710.03740).
STATES = {"fp32": (4, 4, 0), "mixed": (2, 4, 4)}
# Both Adam moments: fp32, bf16 (DeepSeek-V3, arXiv 2412.19437), 8 bits (arXiv 2110.02861).
ADAM = {"fp32": 8, "bf16": 4, "8bit": 2}
SLACK = 0.10  # of what changes within a step: pieces that the allocator cannot reuse
CONTEXT_BYTES = 1.5e9  # CUDA context, library workspaces and NCCL buffers, outside the allocator
RESERVED = "context"  # the one part that an allocator's own reading leaves out


def accelerator_parts(work: SiteWork, degrees: Degrees) -> dict[str, Array]:
    """Bytes on the fullest accelerator by part, [C] each."""
    tokens = degrees.micro * work.inside.seq_len / degrees.cp
    kept = np.stack([_kept(work, tokens, index) for index in range(len(RECOMPUTE))])
    mine = kept[degrees.recompute, np.arange(len(tokens))] / degrees.tp
    # A pipeline's first stage holds one micro-batch of every stage; interleaving adds to it.
    deep = 1 + (degrees.pp - 1) / (degrees.pp * degrees.stages)
    sizes = {
        **_states(work, degrees),
        **_unsharded(work, degrees),
        "activations": mine * np.where(degrees.pp > 1, deep, 1.0),
        "routing": _routing(work, degrees, tokens),
        "logits": tokens * work.shape.vocab_size * (LOGIT_BYTES) / degrees.tp,
    }
    changing = ("gathered layers", "unsharded gradients", "activations", "routing", "logits")
    return {
        **sizes,
        "outer states": np.full(len(tokens), work.outer_bytes / work.count),
        "allocator slack": SLACK * sum((sizes[name] for name in changing), np.zeros(len(tokens))),
        RESERVED: np.full(len(tokens), CONTEXT_BYTES),
    }


def _states(work: SiteWork, degrees: Degrees) -> dict[str, Array]:
    """What training keeps between steps: sharded, or (zero 1) with whole weights and gradients."""
    parameter, gradient, master = STATES[work.inside.states]
    adam = float(ADAM[work.inside.adam])
    held = work.shared + work.experts
    trained = work.trained / held
    model = degrees.tp * degrees.pp
    # Expert states are spread over the ranks that share experts, and over their shards.
    wide = np.maximum(degrees.ep, degrees.shard)
    sharded = (work.shared / degrees.shard + work.experts / wide) / model
    whole = (work.shared + work.experts / degrees.ep) / model
    weights = np.where(degrees.zero == 3, sharded, whole)
    if work.counted is not None:
        per_element = [size / held for size in work.counted]
        return {
            "parameters": per_element[0] * weights,
            "gradients": per_element[1] * weights,
            "inner optimizer": per_element[2] * sharded,
        }
    return {
        "parameters": parameter * weights,
        "gradients": gradient * trained * weights,
        "inner optimizer": adam * trained * sharded,
        "master weights": master * trained * sharded,
    }


def _unsharded(work: SiteWork, degrees: Degrees) -> dict[str, Array]:
    """Whole layers that a rank of a sharded replica gathers, and the gradients that it scatters."""
    shape = work.shape
    layer = max(shape.layer_shared) + work.experts / max(1, shape.num_moe_layers) / degrees.ep
    tables = shape.vocab_size * shape.d_model * (1 if shape.tied else 2)
    element = work.inside.element_bytes
    rest = np.where((degrees.zero == 3) & (degrees.shard > 1), 1.0, 0.0) / degrees.tp
    return {
        "gathered layers": rest * element * (2 * layer + tables),
        # In compute precision as they come, in fp32 as they are reduced.
        "unsharded gradients": rest * (element + FLOAT32) * (layer + tables),
    }


def _kept(work: SiteWork, tokens: Array, index: int) -> Array:
    """Bytes of activations of all layers for one micro-batch under one recomputation."""
    shape, recompute = work.shape, RECOMPUTE[index]
    executed = shape.top_k * work.executed
    if recompute == "full":
        # The input of every layer, and one whole layer while it is computed again.
        last = [layer_elements(shape, i, "none") for i in (0, shape.num_layers - 1)]
        last[1] += expert_elements(shape, executed, "none") if shape.num_moe_layers else 0.0
        elements = shape.d_model * shape.num_layers + max(last)
    else:
        layers = [layer_elements(shape, i, recompute) for i in (0, shape.num_layers - 1)]
        dense, moe = shape.num_dense, shape.num_moe_layers
        elements = dense * layers[0] + moe * layers[1]
        if moe:
            elements += moe * expert_elements(shape, executed, recompute)
        if recompute == "experts" and moe:
            elements += expert_elements(shape, executed, "none")
    return tokens * work.inside.element_bytes * elements


def _routing(work: SiteWork, degrees: Degrees, tokens: Array) -> Array:
    """Logits and probabilities in fp32, ids and gates of the choices, per MoE layer."""
    shape = work.shape
    if not shape.num_experts:
        return np.zeros(len(tokens))
    each = 2 * FLOAT32 * shape.num_experts + shape.top_k * (8 + FLOAT32)
    again = degrees.recompute == RECOMPUTE.index("full")
    return tokens * each * np.where(again, 1, shape.num_moe_layers) / degrees.tp
