"""The list of options, the page and the schema made from it, and experiments by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cli import fomoe

from fomoe import catalogue
from fomoe.config import Config
from fomoe.load import find_config, packaged_configs
from fomoe.options import option_names

ROOT = Path(__file__).parent.parent


def test_every_option_is_listed_and_described() -> None:
    listed = {option.name: option for option in catalogue.options()}
    assert set(listed) == set(option_names(Config))
    for name, option in listed.items():
        assert len(option.meaning) > 15, f"{name} has no description (CONTRIBUTING: a new option)"
        assert option.meaning.endswith("."), name
        assert option.type, name


def test_sections_are_described() -> None:
    for name, info in Config.model_fields.items():
        assert info.description, name


@pytest.mark.parametrize("name", [catalogue.PAGE, catalogue.SCHEMA])
def test_the_page_and_the_schema_are_those_of_the_code(name: str, tmp_path: Path) -> None:
    assert fomoe("options", "--write", tmp_path).status == 0
    made, kept = ((folder / name).read_text() for folder in (tmp_path, ROOT / "docs"))
    assert made == kept, "make docs"


def test_options_say_default_unit_and_meaning() -> None:
    (timeout,) = fomoe("options", "sync.timeout_s", "--json").json
    assert timeout == {
        "name": "sync.timeout_s",
        "type": "number, at least 1, at most 1e+06",
        "default": 600.0,
        "unit": "seconds",
        "meaning": "Longest wait for a peer that sends nothing.",
    }
    told = fomoe("options", "placement").out
    assert "placement.kind = cyclic  (cyclic or common or " in told
    assert "(common only) Experts that every site holds." in told


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["inner.l"], "section inner.l is not a section or an option"),
        (["modle"], "did you mean model?"),
        (["outer.momentm"], "did you mean outer.momentum?"),
        (["model", "--write", "docs"], "section model cannot stand beside --write"),
        (["--write", "no/such/folder"], "No such file or directory no/such/folder/options.md"),
    ],
)
def test_what_is_no_section_is_one_line(words: list[str], reason: str) -> None:
    outcome = fomoe("options", *words)
    assert outcome.status != 0
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err


def test_help_says_where_the_options_are() -> None:
    assert "fomoe options" in " ".join(fomoe("train", "--help").out.split())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_schema_accepts_what_is_shipped(path: Path) -> None:
    assert not list(_misfits(yaml.safe_load(path.read_text()), catalogue.schema(), ""))


def test_the_schema_refuses_a_misspelt_option() -> None:
    assert list(_misfits({"outer": {"rate": 1}}, catalogue.schema(), "")) == ["outer.rate"]


def _misfits(tree: dict[str, Any], schema: dict[str, Any], prefix: str) -> Any:
    """Names that the schema does not allow; types are pydantic's own matter."""
    allowed: dict[str, Any] = {}
    for part in (schema, *schema.get("anyOf", ())):
        allowed |= part.get("properties", {})
    for name, value in tree.items():
        if name not in allowed:
            yield f"{prefix}{name}"
        elif isinstance(value, dict):
            yield from _misfits(value, allowed[name], f"{prefix}{name}.")


# ------------------------------------------------------------------------------ experiments by name


def test_an_experiment_of_the_package_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = fomoe("train", "quickstart", "--dry-run", "--json")
    assert planned.status == 0, planned.err
    assert planned.json["num_sites"] == 4
    assert set(packaged_configs()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == packaged_configs()["quickstart"]
    Path("quickstart").mkdir()  # a folder is no file
    assert find_config("quickstart") == packaged_configs()["quickstart"]
    Path("quickstart").rmdir()
    Path("quickstart").write_text("num_sites: 2\n")
    assert find_config("quickstart") == Path("quickstart")
    assert find_config("./quickstart.yaml") == Path("quickstart.yaml")


def test_a_misspelt_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fomoe("train", "quickstrat")
    assert outcome.status == 2
    assert (
        outcome.err == "fomoe: error: config quickstrat does not exist; did you mean quickstart?\n"
    )
