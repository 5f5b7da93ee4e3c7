"""YAML as people expect it, dotted overrides, and one-line errors for both (no torch)."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from fomoe.errors import ConfigError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; every failure names the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError("config", str(path), f"does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"cannot be read: {_one_line(error)}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), f"is not valid YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("config", str(path), "must hold a mapping of options")
    return tree


def parse_override(override: str) -> tuple[str, Any]:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise ConfigError("override", override, "must have the form section.option=value")
    try:
        return field, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(field, text, f"is not valid YAML: {_one_line(error)}") from None


def set_option(tree: dict[str, Any], field: str, value: Any) -> None:
    *sections, option = field.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(field, value, f"cannot be set: {section} is not a section")
        node = child
    node[option] = value


class _Loader(yaml.SafeLoader):
    """YAML with the number and truth words people expect, and no silently repeated keys.

    YAML 1.1, which PyYAML follows, reads `3e-4` as text and `off` as false.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {key!r} must be text")
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float", ":int"))
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|nan))$"
    ),
    list("-+0123456789."),
)
# YAML 1.1 also takes 1:30 for ninety and 010 for eight.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
