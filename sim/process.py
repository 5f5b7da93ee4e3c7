"""Peak memory of the trainer's process of one site on CPU, above what its imports take.

The figures of `fomoe_sim.memory` are for sharded sites of accelerators; this is the single process
that `fomoe train` runs on a CPU, whose heap keeps what a step or a sync has freed: all states, and
the larger of the two. `docs/validation.md` compares it with measured processes.
"""

from __future__ import annotations

from fomoe_sim.activations import FLOAT32, activations_per_token, dispatch_per_token
from fomoe_sim.scenario import Scenario
from fomoe_sim.shape import ModelShape

# A run of a model of a few thousand parameters takes this above its imports: threads, kernels'
# workspaces, text and code that is loaded when first used.
RUNTIME_BYTES = 100e6
# Pieces of the heap that later buffers do not quite fit.
HEAP_FACTOR = 1.1
# Of every synced parameter in fp32: its pseudo-gradient and the sum over holders, and the freed
# pieces that they do not fit into.
SYNC_COPIES = 3.5
# Logits, their softmax and its gradient, in fp32.
LOGIT_COPIES = 3
# What the head's matrix keeps beside itself, allocated where logits were freed, so that the next
# ones need new room: gradient, two moments, anchor, outer momentum.
HEAD_STATES = 5
# Attention by blocks on CPU (`fomoe/model/attention.py`): the longest sequence, rows of a block.
BLOCKS_LONGEST, BLOCK_ROWS = 512, 64


def process_peak_bytes(scenario: Scenario, site: int = 0) -> int:
    """Predicted peak of one site's CPU process, in bytes; for configs, which know their states."""
    assert scenario.trainer_states is not None, "only a config's states are counted"
    states = scenario.trainer_states[site]
    synced = states.parameters if scenario.traffic.every_step else states.anchor
    work = max(HEAP_FACTOR * _step_bytes(scenario, site), SYNC_COPIES * synced)
    if scenario.cpu_compute_bytes != FLOAT32:  # autocast keeps a copy of every weight for the step
        work += states.parameters * scenario.cpu_compute_bytes / FLOAT32
    return round(RUNTIME_BYTES + states.total + work)


def attention_shares(shape: ModelShape, seq: int) -> float:
    """fp32 bytes per token that a layer's attention keeps beyond torch's, which stores no scores.

    Where it runs by blocks it keeps each row's shares of the positions that its block sees, and its
    output once instead of twice.
    """
    attention = shape.attention
    if attention.latent or attention.kv_heads != attention.heads or seq > BLOCKS_LONGEST:
        return 0.0
    ends = [min(first + BLOCK_ROWS, seq) for first in range(0, seq, BLOCK_ROWS)]
    seen = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) / seq
    return FLOAT32 * attention.heads * (seen - attention.head_dim)


def _step_bytes(scenario: Scenario, site: int) -> float:
    """What a micro-batch keeps for the backward pass, one layer's gradients, and the logits."""
    shape, size = scenario.shape, scenario.cpu_compute_bytes
    executed = shape.top_k * float(scenario.traffic.executed[site])

    def kept(recompute: str, *, gathered: bool) -> float:
        sizes = {"executed": executed, "element_bytes": size, "recompute": recompute}
        activations = activations_per_token(shape, **sizes)  # type: ignore[arg-type]
        if size == FLOAT32:
            layers = 1 if recompute == "full" else shape.num_layers
            activations += layers * attention_shares(shape, scenario.seq_len)
        return activations + dispatch_per_token(shape, gathered=gathered, **sizes)  # type: ignore[arg-type]

    gradients = kept("none", gathered=True) / shape.num_layers
    tokens = scenario.micro_batch * scenario.seq_len
    logits = tokens * LOGIT_COPIES * FLOAT32 * shape.vocab_size
    head = HEAD_STATES * FLOAT32 * shape.vocab_size * shape.d_model
    layers = tokens * (kept(scenario.recompute, gathered=False) + gradients)
    return layers + logits + min(head, logits)
