"""Fragments: parts of the model that a round syncs at different steps (no torch).

As in Streaming DiLoCo (arXiv 2501.18512): P fragments have equally many layers, and every H / P
local steps one of them is synced, so that each is synced once in a round of H. The last is due at
the round's end. What belongs to no layer goes with a layer beside it: the embedding with the first,
the final norm and the head with the last. At the end of the run the others are synced once more, so
that every site has the same model.
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
    """Whether the parts of the model are of different ages within the run.

    The merged model is then that of the anchors: what every holder got when a part was last synced.
    """
    return config.sync.fragments > 1


@dataclass(frozen=True)
class Leg:
    """Some local steps of a round, and the sync that follows them.

    Attributes:
        steps: local steps.
        fragment: synced after them; None: what is due at the round's end.
    """

    steps: int
    fragment: int | None


def legs(config: Config) -> tuple[Leg, ...]:
    """The local steps of a round, cut where something happens between them."""
    number = config.sync.fragments
    every = config.local_steps // number
    return tuple(Leg(every, f if f < number - 1 else None) for f in range(number))


def synced_again(config: Config) -> range:
    """Fragments that the run's last sync adds to the one that is due."""
    return range(config.sync.fragments - 1)
