"""Fragments: parts of the model that a round syncs at different steps (no torch).

As in Streaming DiLoCo (arXiv 2501.18512): P fragments have equally many layers, and every H / P
local steps one of them is synced, so that each is synced once in a round of H. The last is due at
the round's end. What belongs to no layer goes with a layer beside it: the embedding with the first,
the final norm and the head with the last. At the end of the run the others are synced once more, so
that every site has the same model.

A sync may run beside tau local steps. Its result is then mixed with the site's own values, as
alpha x own + (1 - alpha) x what all holders got, which is the new anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.config import Config
from fomoe.shapes import ParameterSpec


def fragment_of_layer(config: Config, layer: int) -> int:
    """The fragment of a layer."""
    number = config.sync.fragments
    if config.sync.fragment_order == "strided":
        return layer % number
    return layer * number // config.model.num_layers


def fragment_of(config: Config, spec: ParameterSpec) -> int:
    """The fragment of a parameter."""
    if spec.layer is not None:
        return fragment_of_layer(config, spec.layer)
    return 0 if spec.name == "embedding.weight" else config.sync.fragments - 1


def streams(config: Config) -> bool:
    """Whether a site's parameters differ from the anchors at a round's end.

    The merged model is then that of the anchors: what every holder got when a part was last synced.
    """
    return config.sync.fragments > 1 or config.sync.overlap_steps > 0


@dataclass(frozen=True)
class Leg:
    """Some local steps of a round, and what follows them before the next.

    Attributes:
        steps: local steps.
        begins: the fragment whose sync begins after them.
        ends: the fragment whose sync ends after them; that of the last ends with the round.
    """

    steps: int
    begins: int | None = None
    ends: int | None = None


def legs(config: Config, round_idx: int) -> tuple[Leg, ...]:
    """The local steps of a round, cut where something happens between them.

    A sync that overlaps with steps begins so many steps before it is due, so that none is under way
    between two rounds. The run's last one begins when it is due: its result is the model.
    """
    number, beside = config.sync.fragments, config.sync.overlap_steps
    every = config.local_steps // number
    found: list[Leg] = []
    for fragment in range(number):
        last = fragment == number - 1
        ends = None if last else fragment
        if beside and not (last and round_idx + 1 == config.rounds):
            found += [Leg(every - beside, begins=fragment), Leg(beside, ends=ends)]
        else:
            found.append(Leg(every, begins=ends, ends=ends))
    return tuple(found)


def synced_again(config: Config) -> range:
    """Fragments that the run's last sync adds to the one that is due."""
    return range(config.sync.fragments - 1)
