"""The lines of a study's results, and the page that is made from them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import fomoe
from helpers_study import called, lines, write_study

from fomoe.errors import ConfigError
from fomoe.study import figure, results
from fomoe.study.page import mean_text, put_section, sent_per_token
from fomoe.study.plan import Study, load_study

# ------------------------------------------------------------------------------------------- lines


def line_of(study: Study) -> dict[str, Any]:
    run = study.runs[0]
    config = run.config.model_dump(mode="json", exclude={"run"})
    return {"overrides": dict(run.overrides), "config": json.loads(json.dumps(config))}


def test_a_line_is_of_the_same_experiment(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    config, line = study.runs[0].config, line_of(study)
    assert results.same_experiment(line, config)
    del line["config"]["router"]["z_loss"]  # an option that is newer than the line
    assert results.same_experiment(line, config)
    line["config"]["router"]["old"] = 3  # one that exists no more
    assert results.same_experiment(line, config)
    line["overrides"]["router.old"] = 3
    assert not results.same_experiment(line, config)


@pytest.mark.parametrize(
    "change",
    [{"rounds": 9}, {"model": {"top_k": 1}}, {"rounds": "9"}, {"model": 3}],
)
def test_a_line_of_another_experiment(tmp_path: Path, change: dict[str, Any]) -> None:
    study = load_study(write_study(tmp_path))
    line = line_of(study)
    line["config"] |= change
    assert not results.same_experiment(line, study.runs[0].config)
    assert not results.same_experiment({"config": [], "overrides": {}}, study.runs[0].config)


def test_a_line_that_was_cut_short_spoils_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    results.append_result(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    results.append_result(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2\n{"a": 3}\n'
    assert results.read_results(path) == [{"a": 1}, {"a": 3}]
    assert "damaged lines left out: 2" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- page


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def cells(page: str, arm: str) -> list[str]:
    (row,) = re.findall(rf"^\| {re.escape(arm)} \|.*$", page, re.M)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_the_page_has_the_mean_the_spread_and_the_paired_lead(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_matplotlib(monkeypatch)
    path, page = write_study(tmp_path), tmp_path / "page.md"
    assert fomoe("study", path).status == 0
    called(calls)
    outcome = fomoe("study", path, "--report", page)
    assert outcome.status == 0, outcome.err
    assert "no figure, the tables are complete: a figure needs matplotlib" in outcome.err
    text = page.read_text()
    # 1.5 and 2.0 against 1.25 and 1.875: leads 0.25 and 0.125, sd 0.125 / sqrt(2)
    assert cells(text, "**all**") == [
        *("**all**", "2", "1.7500 ± 0.3536", "control", "2.5000", "1.00x", "1.00x"),
        *("2.0 kB, 1.00x", "1.0 kB, 1.00x", "every \\| expert"),
    ]
    assert cells(text, "plain") == [
        *("plain", "2", "1.5625 ± 0.4419", "+0.1875 ± 0.0884", "2.5000", "0.50x", "0.50x"),
        *("1.5 kB, 0.75x", "750 B, 0.75x", ""),
    ]
    assert "Does it pay?" in text
    assert "same text" not in text
    assert called(calls) == []


def test_the_page_waits_for_nothing(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms without results are named, and lines of other configs do not count."""
    without_matplotlib(monkeypatch)
    path, page = write_study(tmp_path), tmp_path / "page.md"
    assert fomoe("study", path, "--report", page).status == 0
    assert "No arm has been run." in page.read_text()
    assert fomoe("study", path, "--only", "plain", "rounds=1").status == 0
    outcome = fomoe("study", path, "--report", page)
    assert "2 lines left out" in outcome.err
    assert "No arm has been run." in page.read_text()
    assert fomoe("study", path, "--report", page, "rounds=1").status == 0
    assert cells(page.read_text(), "plain")[:4] == ["plain", "2", "1.5625 ± 0.4419", "-"]
    assert "\nNot run: all.\n" in page.read_text()
    with (tmp_path / "results.jsonl").open("a") as file:
        other = lines(tmp_path)[0] | {"arm": "all", "text_sha256": "f" * 64, "overrides": {}}
        other["config"] = json.loads(json.dumps(load_study(path, ["rounds=1"]).runs[0].config
            .model_dump(mode="json", exclude={"run"})))  # fmt: skip
        file.write(json.dumps(other) + "\n")
    assert fomoe("study", path, "--report", page, "rounds=1").status == 0
    assert "The arms of seed 0 did not all read the same text" in page.read_text()


def test_bytes_per_token_are_those_of_all_sites_over_the_run() -> None:
    line = {
        "payload_bytes_per_site_per_round": 600,
        "tokens": 2000,
        "config": {"num_sites": 4, "rounds": 5},
    }
    assert sent_per_token(line) == 600 * 4 * 5 / 2000


def test_what_a_person_writes_around_a_section_stays() -> None:
    page = put_section("# Mine\n\nwords\n", "a", "one", "p")
    page = put_section(page, "b", "two", "p") + "\nafter\n"
    again = put_section(page, "a", "three", "p")
    assert again == page.replace("one", "three")
    assert again.startswith("# Mine\n\nwords\n")
    assert again.endswith("\nafter\n")
    with pytest.raises(ConfigError, match="has no line <!-- end of study a -->"):
        put_section(page.replace("<!-- end of study a -->", ""), "a", "x", "p")


def test_one_value_has_no_spread() -> None:
    assert mean_text([1.25]) == "1.2500"
    assert mean_text([0.5, -0.5], signed=True) == "+0.0000 ± 0.7071"
    assert mean_text([]) == "-"


def test_the_figure_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arms = [
        figure.Shown("all", [1e3, 2e3], [[1.5, 1.25], [1.0, 1.75]]),
        figure.Shown("half", [500.0, 1e3], [[1.6, 1.5]]),
    ]
    assert arms[0].mean.tolist() == [1.25, 1.5]
    assert arms[0].spread.tolist() == pytest.approx([0.125**0.5, 0.125**0.5])
    assert arms[1].spread.tolist() == [0.0, 0.0]
    for over in ("flops", "bytes"):
        shown = arms if over == "bytes" else [figure.Shown("half", [0.5], [[1.5]])]
        assert figure.draw(tmp_path / "a.svg", "Tiny", over, {"": shown})
        first = (tmp_path / "a.svg").read_text()
        assert figure.draw(tmp_path / "a.svg", "Tiny", over, {"": shown})
        assert (tmp_path / "a.svg").read_text() == first
        assert "half" in first
        assert "NaN" not in first
