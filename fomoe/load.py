"""From a YAML file, overrides and a method's name to a checked config (no torch)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.methods import method_settings
from fomoe.options import parse_options, yaml_word
from fomoe.overrides import parse_override, set_option
from fomoe.rules import check_config
from fomoe.yamlfile import read_yaml


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, method: str | None = None
) -> Config:
    """Read a YAML experiment, apply dotted overrides and the method's settings, check every rule.

    Args:
        path: the YAML file.
        overrides: `section.option=value` strings. One that contradicts the method is refused.
        method: run this method instead of the config's; what it sets wins over the overrides, so
            that one command line serves several methods.

    Raises:
        ConfigError: one line naming the field, the value and the rule that it breaks.
    """
    tree = read_yaml(path)
    explicit: dict[str, Any] = {}
    for override in overrides:
        field, value = parse_override(override, Config)
        set_option(tree, field, value)
        explicit[field] = value
    if method is not None:
        tree["method"], explicit = method, {}
    return build_config(tree, explicit=explicit)


def build_config(tree: dict[str, Any], *, explicit: dict[str, Any] | None = None) -> Config:
    """Build and check a Config from nested dicts; `explicit` are options no method may overrule."""
    config = parse_options(tree, Config)
    given = config.model_dump(mode="json")
    tree = copy.deepcopy(tree)
    for field, value in method_settings(config).items():
        set_option(tree, field, value)
    config = parse_options(tree, Config)
    taken = config.model_dump(mode="json")
    for field, value in (explicit or {}).items():
        if _option(given, field) != (set_to := _option(taken, field)):
            rule = f"contradicts method {config.method}, which sets {yaml_word(set_to)}"
            raise ConfigError(field, value, rule)
    check_config(config)
    return config


def _option(tree: dict[str, Any], field: str) -> Any:
    value: Any = tree
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
