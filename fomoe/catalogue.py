"""What every option is: a list, a page and a schema for editors, all from the declared options.

The text below a field in a section's class is its description; a unit stands first, in brackets
(no torch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.hints import near
from fomoe.options import MOST, yaml_word

PAGE, SCHEMA = "options.md", "options.schema.json"
_UNIT = re.compile(r"\[([^\]]+)\] ")


@dataclass(frozen=True)
class Option:
    """One option as a person reads it."""

    name: str
    """Dotted, as in an override."""
    type: str
    """Values in words."""
    default: Any
    unit: str
    """Empty for a plain number, a word or a truth value."""
    meaning: str


def options(section: str = "") -> list[Option]:
    """Every option in the order of the sections, or those of one section, or one by its name.

    Raises:
        ConfigError: if there is no such section or option.
    """
    listed = list(_walk(schema(), ""))
    if not section:
        return listed
    chosen = [o for o in listed if o.name == section or o.name.startswith(f"{section}.")]
    if not chosen:
        parts = [option.name.split(".") for option in listed]
        sections = {".".join(names[:n]) for names in parts for n in range(1, len(names))}
        found = near(section, [*sorted(sections), *(option.name for option in listed)])
        rule = f"did you mean {found}?" if found else f"sections are {', '.join(sorted(sections))}"
        raise ConfigError("section", section, f"is not a section or an option; {rule}")
    return chosen


def as_json(listed: list[Option]) -> str:
    return json.dumps([asdict(option) for option in listed], indent=1)


def schema() -> dict[str, Any]:
    """The JSON schema of a config file; sections stand where they are used."""
    made = Config.model_json_schema()
    tree = _resolved(made, made["$defs"])
    tree.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An experiment of FoMoE",
        **tree,
    }


def page() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "`make docs` makes this page from the code; `fomoe options [SECTION]` prints the same. An",
        "option stands in the YAML file under its sections, or on the command line by its dotted",
        "name: `outer.lr=0.6`. Editors that know YAML schemas complete and check a file that",
        f"begins with `# yaml-language-server: $schema=` and the path of [`{SCHEMA}`]({SCHEMA}).",
    ]
    section = None
    for option in options():
        own = option.name.rpartition(".")[0]
        if own != section:
            section = own
            lines += ["", f"## `{own}`", "", _section_text(own), ""] if own else [""]
            lines += ["| option | type | default | unit | meaning |", "|---|---|---|---|---|"]
        cells = (f"`{option.name}`", option.type, f"`{_default_text(option)}`", option.unit)
        lines.append(f"| {' | '.join((*cells, option.meaning.replace('|', chr(92) + '|')))} |")
    return "\n".join(lines) + "\n"


def write(folder: Path) -> list[Path]:
    """Write the page and the schema into a folder.

    Raises:
        OSError: if they cannot be written.
    """
    texts = {PAGE: page(), SCHEMA: json.dumps(schema(), indent=1) + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def print_options(listed: list[Option]) -> None:
    """One option per paragraph: a table of long texts does not fit a terminal."""
    from fomoe.report import console

    out = console()
    for option in listed:
        unit = f"  [{option.unit}]" if option.unit else ""
        head = f"{option.name} = {_default_text(option)}{unit}  ({option.type})"
        out.print(head, markup=False, style="bold", soft_wrap=True)
        out.print(f"    {option.meaning}", markup=False, soft_wrap=True)


def _default_text(option: Option) -> str:
    if isinstance(option.default, str):
        return option.default
    return json.dumps(option.default) if option.default == {} else yaml_word(option.default)


def _section_text(name: str) -> str:
    tree: Any = schema()
    for part in name.split("."):
        tree = tree["properties"][part]
    return tree["description"]


def _resolved(tree: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references, and without what pydantic adds for its own use."""
    if isinstance(tree, list):
        return [_resolved(item, definitions) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$ref" in tree:
        found = definitions[tree["$ref"].rpartition("/")[2]]
        return _resolved({**found, **{k: v for k, v in tree.items() if k != "$ref"}}, definitions)
    made: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "properties":
            made[key] = {name: _resolved(option, definitions) for name, option in value.items()}
        elif key == "oneOf":
            # A section without a kind fits several kinds.
            kinds = [_resolved(kind, definitions) for kind in value]
            made["anyOf"] = [{**kind, "additionalProperties": False} for kind in kinds]
        elif key == "description":
            made[key] = " ".join(value.split())
        elif key not in ("title", "discriminator"):
            made[key] = _resolved(value, definitions)
    if made.get("type") == "object" and "properties" in made:
        made.pop("default", None)  # its options have their own
    return made


def _walk(tree: dict[str, Any], prefix: str) -> Iterator[Option]:
    # A section's own options come before the sections below it.
    for name, entry in sorted(tree["properties"].items(), key=lambda item: _is_section(item[1])):
        kinds = [kind for kind in entry.get("anyOf", ()) if "properties" in kind]
        if "properties" in entry:
            yield from _walk(entry, f"{prefix}{name}.")
        elif kinds:
            yield from _walk_kinds(kinds, entry["default"]["kind"], f"{prefix}{name}.")
        else:
            yield _option(f"{prefix}{name}", entry)


def _is_section(entry: dict[str, Any]) -> bool:
    return any("properties" in part for part in (entry, *entry.get("anyOf", ())))


def _walk_kinds(kinds: list[dict[str, Any]], default: str, prefix: str) -> Iterator[Option]:
    """Options of a section that has several kinds: `kind` first, then each option once."""
    names = [kind["properties"]["kind"]["const"] for kind in kinds]
    told = " ".join(f"{n}: {k['description']}" for n, k in zip(names, kinds, strict=True))
    yield Option(f"{prefix}kind", " or ".join(names), default, "", told)
    seen = {"kind"}
    for kind in kinds:
        for name, entry in kind["properties"].items():
            if name in seen:
                continue
            seen.add(name)
            owners = [n for n, k in zip(names, kinds, strict=True) if name in k["properties"]]
            option = _option(f"{prefix}{name}", entry)
            if len(owners) < len(names):
                only = f"({' and '.join(owners)} only) "
                option = Option(**{**asdict(option), "meaning": only + option.meaning})
            yield option


def _option(name: str, entry: dict[str, Any]) -> Option:
    text = entry.get("description", "")
    unit = _UNIT.match(text)
    default = {} if entry.get("type") == "object" and "default" not in entry else entry["default"]
    meaning = text[unit.end() :] if unit else text
    return Option(name, _type_text(entry), default, unit[1] if unit else "", meaning)


def _type_text(entry: dict[str, Any]) -> str:
    if "anyOf" in entry:
        texts = [_type_text(choice) for choice in entry["anyOf"]]
        return ", or ".join(texts) if any("," in text for text in texts) else " or ".join(texts)
    if "enum" in entry:
        return " or ".join(entry["enum"])
    kind = str(entry.get("type"))
    if kind == "array":
        items = entry.get("items")
        return f"list of {_type_text(items).replace('integer', 'integers')}" if items else "list"
    names = {"string": "text", "boolean": "true or false", "object": "mapping"}
    return f"{names.get(kind, kind)}{_range_text(entry)}"


def _range_text(entry: dict[str, Any]) -> str:
    """The bounds of a number; the one that no count passes is left out."""
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [
        f"{word} {entry[key]:g}" for key, word in words.items() if entry.get(key, MOST) != MOST
    ]
    return f", {', '.join(bounds)}" if bounds else ""
