"""Methods by name: one row of `sim/data/methods.yaml` says all that the formulas need to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_sim.trainer import CONFIG_METHODS, ConfigError, hint, read_data


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train over sites.

    Attributes:
        every_step: whether sites exchange in every step; else once in a round of H.
        placed: whether a site trains only the experts that the placement gives it.
        stores: experts that a site keeps: those placed there, all, or its share of all.
        crosses: what an exchange carries: a mean over `holders`; `server`: own share up, all down;
            `shards`: two gathers and a scatter; `tokens`: tokens to their experts and back.
        hidden: what an exchange hides behind: layers of the backward pass, one whole step,
            `overlap_steps` steps, or nothing.
        skips: whether a token skips the experts that are absent.
        outer_vectors: fp32 vectors of outer optimizer state beside the anchor.
        fetches: fp32 vectors that a returning site needs from the others.
        trained_as: the method of `fomoe train` that runs it; empty: none does.
        config_as: the method whose config stands in for it where `--config` is asked about.
        bits, overlap_steps, layers_per_fragment: its own defaults.
        config_only: a control of the trainer's that only a config can be asked with.
        searched: whether `fomoe plan` looks at it.
        source: of its rule.
    """

    name: str
    every_step: bool = False
    placed: bool = False
    stores: Literal["placed", "all", "share"] = "all"
    crosses: Literal["holders", "server", "shards", "tokens"] = "holders"
    hidden: Literal["layers", "step", "overlap", "nothing"] = "overlap"
    skips: bool = False
    outer_vectors: int = 1
    fetches: int = 2
    trained_as: str = ""
    config_as: str = ""
    bits: float = 32
    overlap_steps: int = 0
    layers_per_fragment: int = 0
    config_only: bool = False
    searched: bool = False
    source: str = ""


METHODS = {name: Method(name=name, **row) for name, row in read_data("methods").items()}
BASELINE = "one-site"  # the same accelerators on one site: the first row of a comparison
PUBLIC = tuple(name for name, row in METHODS.items() if not row.config_only)
SEARCHED = tuple(name for name, row in METHODS.items() if row.searched)
assert set(CONFIG_METHODS) <= set(METHODS), "a method of the trainer's has no row"


def method_of(name: str, *, config: bool = False, flag: str = "--method") -> Method:
    """The row of a method.

    Args:
        config: whether a config is asked about, which has more methods than a preset.
        flag: that named it.

    Raises:
        ConfigError: if there is none; lists the nearest.
    """
    if name not in METHODS:
        names = list(METHODS) if config else list(PUBLIC)
        raise ConfigError(flag, name, f"is not a method; {hint(name, names)}")
    if METHODS[name].config_only and not config:
        raise ConfigError(flag, name, "is a method of the trainer's: it needs --config")
    return METHODS[name]


def unused(method: Method, *, experts: bool) -> dict[str, str]:
    """Options that change nothing for a method, each with what it is that they mean nothing to."""
    found: dict[str, str] = {}
    if not experts:
        found |= dict.fromkeys(("replication", "capacity"), "a model without routed experts")
    elif not method.placed:
        found |= dict.fromkeys(("replication", "capacity"), f"method {method.name}")
    if method.every_step:
        words = f"{method.name}, which communicates in every step"
        found |= dict.fromkeys(("fragments", "overlap_steps", "outer_on"), words)
    return found
