"""Methods by name: ours, the trainer's, and whose formulas cost which."""

from __future__ import annotations

from fomoe.config import METHODS as CONFIG_METHODS
from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.hints import hint
from fomoe_sim.traffic import METHODS

# Ours that the trainer has no name for: whose config stands for them.
ONLY_OURS = {"streaming": "diloco", "fsdp": "ddp", "ep": "ddp"}
# Config methods whose costs another method's formulas give.
COSTED_AS = {
    "resident-routing": "fomoe",
    "dense": "diloco",
    "diloco-half": "diloco",
    "single": "diloco",
}


def formulas_of(method: str, config: Config | None) -> str:
    """The method whose formulas cost what was asked about: gradients of every step are DDP's."""
    if config is not None and method not in ONLY_OURS and config.sync.average == "gradients":
        return "ddp"
    return COSTED_AS.get(method, method)


def check_method(method: str, *, config: bool = False, flag: str = "--method") -> str:
    """The method, or an error that names the nearest.

    Args:
        config: whether a config is asked about, which has more methods than a preset.
        flag: that named it.
    """
    more = [name for name in CONFIG_METHODS if name not in METHODS]
    if method not in [*METHODS, *more]:
        known = hint(method, [*METHODS, *(more if config else [])])
        raise ConfigError(flag, method, f"is not a method; {known}")
    if method not in METHODS and not config:
        raise ConfigError(flag, method, "is a method of the trainer's: it needs --config")
    return method
