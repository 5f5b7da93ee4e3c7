"""`fomoe compare`: several methods, and seeds, on the same text, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fomoe.config import ADAPTER_METHODS, METHODS, Config
from fomoe.errors import ConfigError, say_line
from fomoe.hints import hint
from fomoe.launch import Launch
from fomoe.ready import check_ready

# A name that stands for several methods.
FAMILIES = {
    "fedit": ("fedit-min", "fedit-max"),
    "zero-pad": ("zero-pad-values", "zero-pad-deltas"),
}


def read_methods(text: str) -> list[str]:
    """`ddp,fomoe` as names; a family (`fedit`, `zero-pad`) is all of its methods.

    Raises:
        ConfigError: if one is no method, or stands twice.
    """
    known = METHODS + ADAPTER_METHODS
    methods = [name for word in text.split(",") for name in FAMILIES.get(word, (word,))]
    for method in methods:
        if method not in known:
            rule = f"is not a method; {hint(method, (*known, *FAMILIES))}"
            raise ConfigError("--methods", method, rule)
        if methods.count(method) > 1:
            raise ConfigError("--methods", method, "is given twice")
    return methods


def read_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers.

    Raises:
        ConfigError: if one is no whole number from 0, or stands twice.
    """
    seeds = []
    for word in text.split(","):
        if not (word.isascii() and word.isdecimal()):
            raise ConfigError("--seeds", word or "''", "must be a whole number from 0")
        if int(word) in seeds:
            raise ConfigError("--seeds", word, "is given twice")
        seeds.append(int(word))
    return seeds


def settings(
    load: Callable[[str], Config], methods: Sequence[str], seeds: Sequence[int]
) -> list[Config]:
    """The config of every run: methods in order, the seeds of one method after each other.

    Args:
        load: a method's config, with `run.dir` set.
        seeds: empty: the config's own, without a folder for it.
    """
    configs = []
    for method in methods:
        config = load(method)
        assert config.run.dir is not None  # the command line gives one
        for seed in seeds or [config.seed]:
            name = f"{method}-seed-{seed}" if seeds else method
            run = config.run.model_copy(update={"dir": str(Path(config.run.dir) / name)})
            configs.append(config.model_copy(update={"run": run, "seed": seed}))
    return configs


def compare(
    configs: Sequence[Config], *, mode: str, device: str, launch: Launch
) -> list[dict[str, Any]]:
    """Train one config after the other; all are checked before the first one trains.

    Raises:
        FomoeError: for the first that cannot run; those before it are kept.
    """
    from fomoe.training import train

    for config in configs:
        check_ready(config)
    summaries = []
    for config in configs:
        seeds = {other.seed for other in configs}
        say_line(f"== {config.method}" + (f", seed {config.seed}" if len(seeds) > 1 else ""))
        summaries.append(train(config, mode=mode, device=device, launch=launch))
    return summaries
