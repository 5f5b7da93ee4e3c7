"""The name that a misspelt one most likely means; a far-fetched hint helps nobody (no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterable


def near(name: str, names: Iterable[str]) -> str | None:
    """The valid name that a wrong one most likely means; None if none is near.

    Of dotted names the last parts are compared: a few slips of the keys within a section, the
    same name in another section, or some words of one name only (`model.layers`).
    """
    section, own = _split(name)
    slips, words = [], []
    for candidate in names:
        other_section, other = _split(candidate)
        here = section == other_section
        distance = _slips(own, other)
        if distance <= _allowed(own, section=section, here=here):
            slips.append((distance, not here, candidate))
        elif (here or not section) and _is_part(own, other):
            words.append((not here, len(_words(other)), candidate))
    if slips:
        return min(slips, key=lambda slip: slip[:2])[-1]
    closest = [word for word in words if word[:2] == min(words)[:2]]
    return closest[0][-1] if len(closest) == 1 else None


def hint(name: str, names: Iterable[str]) -> str:
    """`did you mean X?` if a name is near, otherwise the list of names."""
    names = list(names)
    found = near(name, names)
    return f"did you mean {found}?" if found else f"choose from {', '.join(names)}"


def _allowed(own: str, *, section: str, here: bool) -> int:
    """Most slips of a name: fewer for a short one or another section, since more names are near."""
    if not here:
        return int(len(own) > 3)
    return int(bool(section) or len(own) > 2) + (len(own) > 5) + (len(own) > 9)


def _split(name: str) -> tuple[str, str]:
    section, _, own = name.lower().replace("-", "_").rpartition(".")
    return section, own


def _is_part(own: str, other: str) -> bool:
    return _words(own) < _words(other) or (len(own) > 3 and other.startswith(own))


def _words(name: str) -> set[str]:
    return set(re.split("[_ ]", name))


def _slips(left: str, right: str) -> int:
    """Letters left out, added, changed, or swapped with their neighbour."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(right, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]
