"""The 100B page: every command that stands in it still prints what stands beside it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fomoe.cli import main

PAGE = Path("docs/projection-100b.md")
BLOCKS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE.read_text(), re.DOTALL)
PRINTED = [(command, output) for command, output in BLOCKS if output]


def test_the_page_has_commands():
    assert len(PRINTED) >= 4


@pytest.mark.parametrize(("command", "output"), PRINTED)
def test_a_command_prints_what_stands_beside_it(capsys, command, output):
    program, *arguments = shlex.split(command)
    assert program == "fomoe"
    assert main(arguments) == 0
    assert capsys.readouterr().out == output


def test_the_plot_is_the_one_the_page_draws(capsys, tmp_path):
    (command,) = [command for command, output in BLOCKS if not output]
    arguments = shlex.split(command.split(" > ")[0])[1:]
    out = tmp_path / "plot.svg"
    arguments[arguments.index("--plot") + 1] = str(out)
    assert main(arguments) == 0
    drawn, shown = (path.read_text() for path in (out, Path("docs/projection-100b.svg")))
    # Legend, labels and ticks; lines may differ in the last digit between versions of the library.
    words = re.compile("<!-- (.*) -->")
    assert words.findall(drawn) == words.findall(shown)
    assert drawn.count("<path") == shown.count("<path")
