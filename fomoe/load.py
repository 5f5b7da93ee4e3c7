"""From a YAML file, overrides and a method's name to a checked config (no torch)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.hints import near
from fomoe.methods import method_settings
from fomoe.options import parse_options, refuse_other_kinds, yaml_word
from fomoe.overrides import parse_override, set_option
from fomoe.rules import check_config
from fomoe.yamlfile import read_yaml

# In a wheel the experiments lie inside the package; in a checkout they lie beside it.
_PACKAGED = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


def find_config(path: str | Path) -> Path:
    """The file that a path or a bare name means: `quickstart` is an experiment of the package.

    A file of that name in the working folder comes first.

    Raises:
        ConfigError: if it is neither a file nor a packaged name, and a packaged name is near.
    """
    path = Path(path)
    is_name = path.name == str(path) and not path.suffix
    if not is_name or (os.path.lexists(path) and not path.is_dir()):
        return path
    packaged = packaged_configs()
    if path.name in packaged:
        return packaged[path.name]
    if not path.is_dir() and (name := near(path.name, packaged)):
        raise ConfigError("config", path, f"does not exist; did you mean {name}?")
    return path


def packaged_configs() -> dict[str, Path]:
    """The experiments that come with the package, by name."""
    root = next((place for place in _PACKAGED if place.is_dir()), _PACKAGED[0])
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, method: str | None = None
) -> Config:
    """Read a YAML experiment, apply dotted overrides and the method's settings, check every rule.

    Args:
        path: the YAML file, or the name of an experiment that comes with the package.
        overrides: `section.option=value` strings. One that contradicts the method is refused.
        method: run this method instead of the config's; what it sets wins over the overrides, so
            that one command line serves several methods.

    Raises:
        ConfigError: one line naming the field, the value and the rule that it breaks.
    """
    tree = read_yaml(find_config(path))
    explicit: dict[str, Any] = {}
    for override in overrides:
        field, value = parse_override(override, Config)
        set_option(tree, field, value)
        set_option(explicit, field, copy.deepcopy(value))
    if method is not None:
        tree["method"], explicit = method, {}
    return build_config(tree, explicit=explicit)


def build_config(tree: dict[str, Any], *, explicit: dict[str, Any] | None = None) -> Config:
    """Build and check a Config from nested dicts; no method may overrule what `explicit` says."""
    config = parse_options(tree, Config)
    tree = copy.deepcopy(tree)
    settings = method_settings(config)
    for field, value in settings.items():
        set_option(tree, field, value)
    config = parse_options(tree, Config)
    refuse_other_kinds(config)
    for field, value, set_to in _differing(explicit or {}, config.model_dump(mode="json")):
        if field.startswith(tuple(settings)):
            rule = f"contradicts method {config.method}, which sets {yaml_word(set_to)}"
            raise ConfigError(field, value, rule)
    check_config(config)
    return config


def _differing(
    said: dict[str, Any], taken: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name, said value and final value of every option that is said and has another value."""
    for name, value in said.items():
        final = taken.get(name)
        if isinstance(value, dict) and isinstance(final, dict):
            yield from _differing(value, final, f"{prefix}{name}.")
        elif value != final:
            yield f"{prefix}{name}", value, final
