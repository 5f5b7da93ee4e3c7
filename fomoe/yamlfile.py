"""YAML as people expect it, and one-line errors for it (no torch)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fomoe.errors import ConfigError
from fomoe.hints import near
from fomoe.textfile import TextError, read_text, why_no_file


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; every failure names the file."""
    path = Path(path)
    problem = why_no_file(path, pipes=True)
    if problem == "does not exist":
        files = [p.name for p in path.parent.glob("*.y*ml")]
        found = near(path.name, files)
        problem += f"; did you mean {path.parent / found}?" if found else ""
    if problem:
        raise ConfigError("config", path, problem)
    try:
        tree = parse_yaml(read_text(path, pipes=True))
    except TextError as error:
        raise ConfigError("config", path, str(error)) from None
    except ValueError as error:
        raise ConfigError("config", path, f"is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("config", path, "must hold a mapping of options")
    return tree


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: one line about what is wrong and where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    """YAML with numbers and booleans as people expect them, and no silently repeated keys.

    YAML 1.1, which PyYAML follows, reads `3e-4` as text, `off` as false and `2026-01-02` as a
    date; no option is a date. Merge keys (`<<: *base`) are read.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._open: list[str] = []  # anchors of the enclosing collections

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise _problem(f"*{event.anchor} contains itself", event.start_mark)
            return super().compose_node(parent, index)
        self._open.append(event.anchor or "")
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping whose keys are words, each given once; its merge keys are applied.

        Merged here, where every base is complete, it is the same in every version of PyYAML.
        """
        node = super().compose_mapping_node(anchor)
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag not in (_TEXT, _MERGE):
                word = key.value if isinstance(key, yaml.ScalarNode) else "that is not a word"
                raise _problem(f"key {word} must be text", key.start_mark)
            if key.value in own:
                raise _problem(f"key {key.value!r} appears twice", key.start_mark)
            own[key.value] = (key, value)
            if key.tag == _MERGE:
                bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for base in bases:  # the first one that has a key decides
                    if not isinstance(base, yaml.MappingNode):
                        raise _problem("<< must name a mapping, or a list of them", key.start_mark)
                    merged = {k.value: (k, v) for k, v in base.value} | merged
        own = {name: pair for name, pair in own.items() if pair[0].tag != _MERGE}
        node.value = list((merged | own).values())
        return node


def _problem(text: str, mark: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, text, mark)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_DROPPED = (":bool", ":float", ":int", ":timestamp", ":value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(_DROPPED)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Tags that a file may name: those of the types that options have.
_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.endswith((":str", ":int", ":float", ":bool", ":null", ":seq", ":map"))
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
