"""The structure of the code: who imports whom, and who may touch what."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from fomoe.errors import say_line

ROOT = Path(__file__).parent.parent
PACKAGES = {"fomoe": ROOT / "fomoe", "fomoe_sim": ROOT / "sim"}


def rooms() -> dict[str, ast.Module]:
    """Every module of both packages by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


ROOMS = rooms()


def imports(name: str) -> set[str]:
    """Rooms that a room imports, at its top or inside a function, and other packages."""
    found = set()
    for node in ast.walk(ROOMS[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & ROOMS.keys()
            found |= inner or {node.module}
    return found - {name}


def test_no_room_imports_itself_by_a_detour() -> None:
    """Imports inside functions count: they are how circles are hidden."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(imports(name) & ROOMS.keys()):
            visit(other, [*path, name])
        done.add(name)

    for name in ROOMS:
        visit(name, [])
    assert len(done) == len(ROOMS) > 60


def test_no_import_is_for_types_only() -> None:
    for name, tree in ROOMS.items():
        assert not any(
            isinstance(n, ast.Name) and n.id == "TYPE_CHECKING" for n in ast.walk(tree)
        ), name


def test_the_trainer_does_not_import_the_cost_model() -> None:
    for name in ROOMS:
        if name.startswith("fomoe."):
            assert not any(other.startswith("fomoe_sim") for other in imports(name)), name


def test_the_cost_model_meets_the_trainer_in_one_room() -> None:
    """`fomoe_sim.trainer` alone."""
    own = {n for n in ROOMS if n.startswith("fomoe_sim")}
    meeting = {n for n in own if any(o.split(".")[0] == "fomoe" for o in imports(n))}
    assert meeting == {"fomoe_sim.trainer"}


def test_the_model_knows_no_peers() -> None:
    for name in ROOMS:
        if name.startswith("fomoe.model"):
            rooms_used = {other for other in imports(name) if other.startswith("fomoe.")}
            assert not any(o.startswith(("fomoe.sync", "fomoe.site")) for o in rooms_used), name


def test_only_transports_talk_to_torch_distributed() -> None:
    """And the rooms that bring the sites together for them."""
    users = {n for n in ROOMS if any(o.startswith("torch.distributed") for o in imports(n))}
    assert users == {
        "fomoe.sync.gloo", "fomoe.sync.membership", "fomoe.sync.joining", "fomoe.sync.inside",
    }  # fmt: skip


LIGHT = [
    "errors", "config", "load", "methods", "rules", "placement", "shapes", "segments", "memory",
    "planning", "report", "catalogue", "figures", "records", "reportpage", "study.plan",
    "study.preview", "study.work", "study.results", "study.page", "formats", "theirs",
]  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_planning_needs_no_torch(name: str) -> None:
    """A dry run and the cost model start at once."""
    seen: set[str] = set()

    def visit(room: str) -> None:
        if room not in seen:
            seen.add(room)
            for other in imports(room):
                assert other.split(".")[0] not in ("torch", "safetensors"), (
                    f"{room} imports {other}"
                )
                if other in ROOMS:
                    visit(other)

    visit(f"fomoe.{name}")


def uses(tree: ast.Module, attribute: str) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == attribute for n in ast.walk(tree))


def test_only_the_sync_writes_anchors() -> None:
    """Other rooms save and restore what the sync keeps without knowing what it is."""
    writers = {n for n, tree in ROOMS.items() if uses(tree, "anchors")}
    assert writers == {"fomoe.sync.sync"}


def test_one_room_chooses_the_rule() -> None:
    """A new rule changes `segments.rule_of` and no room that builds a plan."""
    for name, tree in ROOMS.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "fomoe.segments":
                rules = [a.name for a in node.names if a.name.endswith("_rule")]
                assert not rules, f"{name} imports {rules}"


def test_only_the_site_cuts_parameters_by_rows() -> None:
    """`start:stop` of a segment is looked up by `Site.view` and in no other room."""
    for name, tree in ROOMS.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Slice) or (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") == "slice"
            ):
                ends = node.args if isinstance(node, ast.Call) else [node.lower, node.upper]
                of_segment = [
                    e for e in ends
                    if isinstance(e, ast.Attribute) and getattr(e.value, "id", "") == "segment"
                ]  # fmt: skip
                assert not of_segment or name == "fomoe.site", name


def test_lines_on_stderr_are_written_in_one_piece() -> None:
    """By `say_line`: two writes of one site let another site's line in between."""
    for name, tree in ROOMS.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                assert not any(keyword.arg == "file" for keyword in node.keywords), name


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    say_line("one line")
    assert written == ["one line\n"]
