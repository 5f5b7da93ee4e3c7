"""Peak memory of the trainer's process of one site on CPU, above what its imports take.

The figures of `fomoe_sim.memory` are for sharded sites of accelerators; this is the single process
that `fomoe train` runs on a CPU, whose allocator hands little back to the system: what a step and a
sync need is counted on top of all states.
"""

from __future__ import annotations

from fomoe_sim.activations import FLOAT32, activations_per_token, dispatch_per_token
from fomoe_sim.scenario import Scenario

# A run of a model of a few thousand parameters takes 138 MB above its imports (fp32, one thread,
# torch 2.13): threads, kernels' workspaces, text and code that is loaded when first used.
RUNTIME_BYTES = 135e6
# The heap keeps freed buffers, in pieces that later ones do not quite fit: fitted to six runs of
# 0.1 to 24 million parameters, whose peaks it gives within 5 %.
HEAP_FACTOR = 1.45


def process_peak_bytes(scenario: Scenario, site: int = 0) -> int:
    """Predicted peak of one site's CPU process, in bytes; for configs, which know their states.

    The larger of a training step and a sync: a step keeps all activations and the logits, a sync a
    flat copy of every pseudo-gradient and its sum over holders.
    """
    assert scenario.trainer_states is not None, "only a config's states are counted"
    states = scenario.trainer_states[site]
    shape, size = scenario.shape, scenario.cpu_compute_bytes
    tokens = scenario.micro_batch * scenario.seq_len
    executed = shape.top_k * float(scenario.traffic.executed[site])
    recompute = scenario.recompute
    kept = activations_per_token(
        shape, executed=executed, element_bytes=size, recompute=recompute
    ) + dispatch_per_token(
        shape, executed=executed, element_bytes=size, recompute=recompute, gathered=False
    )
    logits = shape.vocab_size * (size + 2 * FLOAT32)
    step = tokens * HEAP_FACTOR * (kept + logits)
    if size != FLOAT32:  # autocast keeps a copy of every weight for the step
        step += states.parameters * size / FLOAT32
    sync = 2 * states.anchor
    return round(RUNTIME_BYTES + states.total + max(step, sync))
