"""Files of one JSON object per line; a bad disk or a crash may have damaged some of the lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lines:
    """The content of a file.

    Attributes:
        objects: per whole line its number (from 1), its text and the object.
        damaged: numbers of the lines without an object. A last line that a kill cut short is left
            out and is not counted.
    """

    objects: list[tuple[int, str, dict[str, Any]]]
    damaged: list[int]


def read_lines(path: Path) -> Lines:
    """Read line by line, so that a damaged line does not affect the others.

    Raises:
        OSError: if the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    found = Lines([], [])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            found.objects.append((number, text, content))
        elif number < len(lines):
            found.damaged.append(number)
    return found
