"""Dotted overrides, `section.option=value`, read as the option's type says (no torch).

Text is taken as it is written, whatever characters it contains; numbers, true and false, lists of
numbers, and mappings are YAML.
"""

from __future__ import annotations

import re
from itertools import accumulate
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from fomoe.errors import ConfigError
from fomoe.options import Options, declared_options
from fomoe.yamlfile import parse_yaml

# An item of a list of text: quoted as in YAML if it contains a comma, else up to the comma.
_ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,]*?)\s*(,|$)""", re.DOTALL)


def parse_override(override: str, options: type[Options]) -> tuple[str, Any]:
    """The option's dotted name and its value.

    Args:
        options: the tree of sections that says which type the option has.

    Raises:
        ConfigError: if the form is wrong, or a value that must be YAML is not.
    """
    field, equals, text = override.partition("=")
    if not equals or not field.strip():
        raise ConfigError("override", override, "must have the form section.option=value")
    if field != field.strip():
        rule = f"has spaces around its name; did you mean {field.strip()}={text.strip()}?"
        raise ConfigError("override", repr(override), rule)
    kinds = _kinds(_annotation(options, field))
    if NoneType in kinds and text == "null":
        return field, None
    if str in kinds:
        return field, text
    if "texts" in kinds:
        return field, _read_texts(field, text)
    try:
        return field, parse_yaml(text)
    except ValueError as error:
        raise ConfigError(field, text, f"is not valid YAML: {error}") from None


def set_option(tree: dict[str, Any], field: str, value: Any) -> None:
    """Set an option by its dotted name; missing sections are created."""
    *sections, option = field.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(field, value, f"cannot be set: {section} is not a section")
        node = child
    node[option] = value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _annotation(options: type[Options], field: str) -> Any:
    """The declared type of an option, or None where there is no such option."""
    declared: Any = options
    for part in field.split("."):
        declared = declared_options(declared).get(part)
    return declared


def _kinds(annotation: Any) -> set[Any]:
    """What a declared type allows: `str` for text and keywords, `texts` for a list of text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return set().union(*(_kinds(argument) for argument in arguments))
    if origin is Literal:
        return {type(argument) for argument in arguments}
    if hasattr(annotation, "__metadata__"):
        return _kinds(arguments[0])
    if origin is tuple:
        return {"texts"} if str in _kinds(arguments[0]) else {tuple}
    return {annotation}


def _read_texts(field: str, text: str) -> list[str]:
    """`a,b` or `[a,b]`; an item with a comma is quoted."""
    inner = text[1:-1] if _is_bracketed(text) else text
    items = []
    position, more = 0, True
    while more:
        match = _ITEM.match(inner, position)
        assert match is not None  # the pattern's last alternative matches anything
        item, position, more = match[1], match.end(), match[2] == ","
        quoted = len(item) > 1 and item[0] in "'\"" and item[-1] == item[0]
        items.append(_unquote(field, item) if quoted else item)
    return items if inner.strip() else []


def _is_bracketed(text: str) -> bool:
    """Whether the first bracket closes at the end; `[a].txt,[b]` is a list of patterns."""
    depths = list(accumulate((c == "[") - (c == "]") for c in text))
    return len(text) > 1 and text[0] == "[" and text[-1] == "]" and min(depths[:-1]) > 0


def _unquote(field: str, item: str) -> str:
    try:
        return yaml.safe_load(item)
    except yaml.YAMLError:
        raise ConfigError(field, item, "is not quoted as in YAML") from None
