"""Every command in the README and the docs parses; its configs and options are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fomoe import cli
from fomoe.comparison import read_methods, read_seeds
from fomoe.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What starts `fomoe train` with the words that follow; with how many words of its own.
TRAINERS = {"launch/local.sh": 0, "launch/site.sh": 3}
# Options that only a page's own patch adds, which tests/test_extending.py runs.
PATCHED = re.compile(r"router\.temperature|kind=shuffled|codec=int16")


def commands(page: Path) -> list[str]:
    """The commands of a page's shell blocks, one line each, as they stand there."""
    found = []
    fences = re.findall(r"^```(bash|console)\n(.*?)^```", page.read_text(), re.M | re.S)
    for language, block in fences:
        variables = dict(re.findall(r"^(\w+)='(.*)'$", block, re.M))
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # what a command has printed
            line = line.removeprefix("$ ")
            for name, value in variables.items():
                line = line.replace(f'"${name}"', shlex.quote(value))
            found += [part.strip() for part in line.split(" && ")]
    return found


def fomoe_words(line: str) -> list[str] | None:
    """The words after `fomoe`, or None where a line starts something else."""
    words = shlex.split(line.split(" > ")[0], comments=True)
    words = words[1:] if words[:1] == ["sudo"] else words
    if words[:1] == ["fomoe"]:
        return words[1:]
    if words and words[0] in TRAINERS:
        return ["train", *words[1 + TRAINERS[words[0]] :]]
    if words[:1] == ["torchrun"]:
        return words[words.index("fomoe") + 1 :]
    return None


LINES = {
    f"{page.name}: {line}": words
    for page in PAGES
    for line in commands(page)
    if not PATCHED.search(line) and (words := fomoe_words(line))
}


def test_the_pages_have_commands() -> None:
    assert sum(key.startswith("README.md: fomoe") for key in LINES) >= 20
    assert {words[0] for words in LINES.values()} >= {"train", "compare", "export", "report"}


@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_a_command_is_one(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args, rest = cli.build_parser(words[0]).parse_known_args(words)
    cli._take_overrides(args, rest)
    methods = {"train": [None], "compare": read_methods(getattr(args, "methods", None) or "fomoe")}
    for method in methods.get(words[0], []):
        try:
            cli.load(args.config, args.overrides, method=method)
        except ConfigError as error:
            # Another command of the page makes the base.
            assert error.field == "adapters.base"  # noqa: PT017
    read_seeds(getattr(args, "seeds", None) or "0")
    for word in words:
        if word.startswith("configs/"):
            assert Path(word).is_file()


def test_make_has_every_target_that_is_named() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.M)
    }
    assert {"quickstart", "test", "check"} <= named <= set(targets)
