"""What a sync hides behind compute: layers computing, one FIFO link sending, who waits for whom.

A formula knows how many bytes a method sends; only an event model knows how many of them hide. What
is modelled, for one site of a synchronous group:

- A step of T seconds is a forward pass (T/3) over layers 0..L-1 and a backward pass (2T/3) over
  layers L-1..0.
- A sync of a layer is queued when its gradient is ready, and one link sends one transfer at a time
  in that order. The reduction itself costs nothing.
- With an overlap of tau steps, what step s queues must be complete when step s + tau ends, and the
  whole site waits there. Without (tau None) the next forward pass waits, layer by layer.
- The answer is a round of the steady state: rounds before it let the overlap of one reach into the
  next.

Every time is an array over points, and so are H and the steps at which fragments are sent, so that
a grid of questions is one run of this model and equal questions get equal answers. The model is
that of the bandwidth tables of Streaming DiLoCo (arXiv 2501.18512, table 4) and Scaling Laws for
DiLoCo (arXiv 2503.09799, table 6); `fomoe validate` compares with them.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Sends = list[tuple[Array, tuple[int, ...]]]  # (step of the round [P], layers synced after it)


# --------------------------------------------------------------------------------------- schedules


def at_round_end(num_layers: int, local_steps: ArrayLike) -> Sends:
    """All layers after the last step: DiLoCo, and data-parallel at local_steps = 1."""
    return [(np.atleast_1d(np.asarray(local_steps, float)) - 1, tuple(range(num_layers)))]


def strided(num_layers: int, local_steps: ArrayLike, num_fragments: int) -> Sends:
    """F fragments of strided layers, each synced once per round, evenly staggered.

    Fragment p has the layers p, p + F, p + 2F, ... and is sent after step floor(p H / F); fragments
    that fall on one step are sent together.

    Args:
        local_steps: H of every point; all of at least F steps, or all equal.
    """
    steps = np.atleast_1d(np.asarray(local_steps, float))
    sends: dict[tuple[float, ...], tuple[Array, list[int]]] = {}
    for fragment in range(num_fragments):
        at = np.floor(fragment * steps / num_fragments)
        layers = list(range(fragment, num_layers, num_fragments))
        # Distinct fragments fall on one step at all points or at none.
        sends.setdefault(tuple(at.tolist()), (at, []))[1].extend(layers)
    return [(at, tuple(sorted(layers))) for at, layers in sends.values()]


# -------------------------------------------------------------------------------------- simulation


def round_time(
    *,
    layer_s: ArrayLike,
    step_s: ArrayLike,
    local_steps: ArrayLike,
    sends: Sends,
    overlap_steps: int | None,
    fixed_s: ArrayLike = 0.0,
) -> Array:
    """Time of one round in the steady state, seconds, [P].

    Args:
        layer_s: time that the link takes for each layer's sync alone, [L, P].
        step_s: compute time of one local step, [P].
        local_steps: steps per round, H, [P].
        sends: which layers are synced after which step, in order of the steps.
        overlap_steps: steps that a sync may take beside compute (tau); None: nothing overlaps and
            the next forward pass waits per layer.
        fixed_s: link time that every step with a sync costs beside its bytes, [P].
    """
    layers = np.asarray(layer_s, float)
    steps = np.atleast_1d(np.asarray(local_steps, float))
    arrays = np.broadcast_arrays(np.asarray(step_s, float), steps, np.asarray(fixed_s, float))
    shape = np.broadcast_shapes(arrays[0].shape, layers.shape[1:])
    step, steps, fixed = (np.broadcast_to(a, shape) for a in arrays)
    run = _Run(np.broadcast_to(layers, (layers.shape[0], *shape)), step, fixed, overlap_steps)
    rounds = 2 + ceil(((overlap_steps or 0) + 1) / float(steps.min()))
    before = run.done_s
    for index in range(rounds):
        before = run.done_s
        run.round(index * steps, steps, sends)
    return run.done_s - before


class _Run:
    """State of a running simulation; every time is an array over points.

    Attributes:
        at: the step that comes next; now: when it would start without waiting.
        link: when the link is free.
        due: pairs of (step, when the sync that must be complete before it is).
        waits: per layer, the end of its sync; -inf: nothing to wait for.
    """

    def __init__(self, layer_s: Array, step: Array, fixed: Array, overlap: int | None) -> None:
        self.layer_s, self.step_s, self.fixed_s, self.overlap = layer_s, step, fixed, overlap
        num_layers = layer_s.shape[0]
        self.below = [index / num_layers for index in range(num_layers)]
        self.at = self.now = self.link = self.done_s = np.zeros(step.shape)
        self.due: list[tuple[Array, Array]] = []
        self.waits: dict[int, Array] = {}

    def round(self, start: Array, steps: Array, sends: Sends) -> None:
        for at, layers in sends:
            self.go_to(start + at)
            self.backward(layers)
        self.go_to(start + steps, finish=True)
        # Counted from here, a round holds exactly its own bits: the next one's first transfer
        # starts after this one's last step and last transfer.
        self.done_s = np.maximum(self.now, self.link)

    def go_to(self, step: Array, *, finish: bool = False) -> None:
        """Compute up to a step; what is due at the first step of a round is waited for in it."""
        now = self.now + (step - self.at) * self.step_s
        for due, end in self.due:
            past = due < step if finish else due <= step
            now = np.where(past, np.maximum(now, end + (step - due) * self.step_s), now)
        self.due = [pair for pair in self.due if not (pair[0] < step).all()]
        if self.waits:
            # The first step after a sync waits in its forward pass, layer by layer.
            later = step > self.at if finish else step >= self.at
            waited = self.forward(self.now) - self.step_s / 3
            now = np.where(later, np.maximum(now, waited + (step - self.at) * self.step_s), now)
            none = np.full(step.shape, -np.inf)
            self.waits = {n: np.where(later, none, end) for n, end in self.waits.items()}
        self.now, self.at = now, step

    def forward(self, now: Array) -> Array:
        """End of a forward pass whose layers wait for their syncs."""
        at = 0.0
        for layer in sorted(self.waits):
            now = now + self.step_s / 3 * (self.below[layer] - at)
            now = np.maximum(now, self.waits[layer])
            at = self.below[layer]
        return now + self.step_s / 3 * (1 - at)

    def backward(self, layers: tuple[int, ...]) -> None:
        """The step that is next, whose backward pass queues these layers."""
        backward_s, at = 2 * self.step_s / 3, 1.0
        now = self.now + self.step_s / 3
        order = sorted(layers, reverse=True)
        if order:
            ready = now + backward_s * (1 - self.below[order[0]])
            self.link = np.maximum(self.link, ready) + self.fixed_s
        for layer in order:
            now = now + backward_s * (at - self.below[layer])
            at = self.below[layer]
            self.link = np.maximum(self.link, now) + self.layer_s[layer]
            if self.overlap is None:
                self.waits[layer] = self.link
        self.now, self.at = now + backward_s * at, self.at + 1
        if order and self.overlap is not None:
            self.due.append((self.at + self.overlap, self.link))


# ------------------------------------------------------------------------------- rounds of a model


def rounds(
    weights: list[tuple[float, ...]],
    which: NDArray[np.int64],
    *,
    transfer_s: Array,
    step_s: Array,
    fixed_s: Array,
    local_steps: Array,
    fragments: Array,
    overlap_steps: Array,
) -> Array:
    """Round times of points of several models, [P]: those of one schedule are simulated together.

    Args:
        weights: share of the exchange's bytes in each layer, of each model.
        which: model of every point.
        transfer_s: link time of one exchange's bytes; fixed_s: beside them.
        step_s: compute time of a step.
        local_steps, fragments: H and F; H = F = 1 where every step exchanges.
        overlap_steps: tau; -1 for layers that wait one by one.
    """
    time = np.zeros(len(which))
    layers = np.array([len(one) for one in weights])[which]
    # From F steps on a round's fragments fall on different steps, whatever H is.
    merged = np.where(fragments > local_steps, local_steps, 0)
    schedules = np.stack([layers, fragments, overlap_steps, merged]).astype(int)
    for schedule in np.unique(schedules, axis=1).T:
        here = (schedules == schedule[:, None]).all(axis=0)
        num_layers, num_fragments, overlap, _ = map(int, schedule)
        share = np.array([weights[index] for index in which[here]]).T
        time[here] = round_time(
            layer_s=share * transfer_s[here],
            step_s=step_s[here],
            local_steps=local_steps[here],
            sends=strided(num_layers, local_steps[here], num_fragments),
            overlap_steps=None if overlap < 0 else overlap,
            fixed_s=fixed_s[here],
        )
    return time
