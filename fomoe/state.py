"""State tensors by name, as in a checkpoint: whether all are present and finite.

A state that is not finite never becomes finite again, and a missing tensor would silently restart
from zeros. Both are found before a sync commits and before a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# Shape and type of every tensor, by name.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

# What an error calls a tensor, by the first part of its name.
_KINDS = {
    "param": "parameters are",
    "inner": "inner optimizer state is",
    "router": "router biases are",
    "text": "counts of n-grams are",
    "anchor": "anchors are",
    "outer": "outer optimizer state is",
    "merged": "values merged into the base are",
    "residual": "residuals of the codec are",
}


# Kinds of which every rank of a site has a part; the others are equal at all ranks.
RANKED = ("param", "inner", "anchor", "outer", "residual")


def entry(kind: str, *names: object) -> str:
    """Name of a state tensor: `param/<segment>`, `inner/<key>/<segment>`, `anchor/<segment>`,
    `outer/<key>/<segment>`, `residual/<bucket>`, `since/<count>`, `router/<bias>/<layer>`,
    `text/counts`."""
    return "/".join([kind, *map(str, names)])


def of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors of one kind by the rest of their names."""
    start = entry(kind, "")
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def by_key(tensors: Mapping[str, Tensor], kind: str) -> dict[str, dict[str, Tensor]]:
    """An optimizer's tensors, by segment and key."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in of_kind(tensors, kind).items():
        key, _, segment = name.partition("/")
        found.setdefault(segment, {})[key] = tensor
    return found


def divergence(state: Mapping[str, Tensor]) -> str:
    """What is wrong with a site's state, named as in its checkpoint; empty if it is finite."""
    name = not_finite(state)
    if not name:
        return ""
    kind, _, rest = name.partition("/")
    return f"its {_KINDS[kind]} not finite ({rest}); the training diverged"


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of the first tensor with an infinite value or a NaN; empty if there is none."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, {})[name] = tensor.detach()
    for found in by_device.values():
        # The smallest and the largest value in one pass, NaN if any value is: isfinite().all()
        # makes a mask first and takes many times as long on CPU.
        ends = [end.float() for tensor in found.values() for end in torch.aminmax(tensor)]
        finite = torch.isfinite(torch.stack(ends).view(-1, 2)).all(1).tolist()
        if not all(finite):
            return list(found)[finite.index(False)]
    return ""


def optimizer_layout(
    build: Callable[[nn.Parameter], torch.optim.Optimizer],
    shapes: Mapping[str, tuple[int, ...]],
    kind: str,
) -> Layout:
    """What an optimizer keeps for each parameter after its first step, found by a trial step.

    Args:
        build: makes the optimizer of one fp32 parameter.
        shapes: shapes of the parameters, by name.
        kind: first part of the tensors' names, `<kind>/<key>/<parameter>`.
    """
    trial = nn.Parameter(torch.zeros(2, 3))
    trial.grad = torch.zeros(2, 3)
    optimizer = build(trial)
    optimizer.step()
    layout: Layout = {}
    for key, value in optimizer.state[trial].items():
        if value is None:
            continue
        kept = torch.as_tensor(value)
        whole = kept.shape == trial.shape  # else a scalar, such as a count of steps
        for name, shape in shapes.items():
            layout[entry(kind, key, name)] = (shape if whole else tuple(kept.shape)), kept.dtype
    return layout


def misfit(tensors: Mapping[str, Tensor], layout: Layout, *, optional: Layout | None = None) -> str:
    """The first tensor that is missing, of another shape or type, or unknown; empty if all fit."""
    known = {**layout, **(optional or {})}
    for name in layout:
        if name not in tensors:
            return f"it lacks {name}"
    for name, tensor in tensors.items():
        if name not in known:
            return f"it holds {name}, which this run does not have"
        shape, dtype = known[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            own = f"{tensor.dtype} {list(tensor.shape)}"
            return f"{name} is {own}, not {dtype} {list(shape)}".replace("torch.", "")
    return ""
