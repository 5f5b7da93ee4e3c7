"""The example's questions for lm-eval: their texts, their answers, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers_cli import trained, write_config

from fomoe.data.tokenizer import ByteTokenizer
from fomoe.evalrun import held_out_part
from fomoe.whole import open_whole

PATH = Path(__file__).resolve().parent.parent / "examples" / "lm_eval_tasks.py"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    trained(write_config(folder))
    return folder / "run"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("lm_eval_tasks_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", [PATH.name, *map(str, words)])
        return int(module.main())

    return run


def test_the_answer_is_what_follows_in_the_held_out_text(
    run_dir: Path, example: Callable[..., int], tmp_path: Path
) -> None:
    assert example(run_dir, "--out", tmp_path / "task") == 0
    settings = yaml.safe_load((tmp_path / "task" / "held_out.yaml").read_text())
    file = Path(settings["dataset_kwargs"]["data_files"]["test"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sequences = held_out_part(open_whole(run_dir, None))[:, 1:]
    assert len(rows) == len(sequences) == 6
    for row, sequence in zip(rows, sequences, strict=True):
        whole = row["text"] + row["choices"][row["answer"]]
        assert whole == ByteTokenizer().decode(sequence.tolist())
        assert len(set(row["choices"])) == 4
    assert len({row["answer"] for row in rows}) > 1
    keys = {settings[name] for name in ("doc_to_text", "doc_to_choice", "doc_to_target")}
    assert keys == set(rows[0])


def test_equal_seeds_give_equal_questions(
    run_dir: Path, example: Callable[..., int], tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert example(run_dir, "--out", tmp_path / name, "--seed", seed, "--choices", 2) == 0
    first, again, other = ((tmp_path / n / "held_out.jsonl").read_text() for n in "abc")
    assert first == again != other


def test_what_cannot_be_asked_is_one_line(
    run_dir: Path,
    example: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "there").mkdir()
    for words, said in (
        ([run_dir, "--out", tmp_path / "there"], "is there already"),
        ([run_dir, "--out", tmp_path / "new", "--choices", 7], "6 held-out texts that differ"),
        ([run_dir, "--out", tmp_path / "new", "--choices", 1], "at least 2"),
        ([tmp_path / "nothing", "--out", tmp_path / "new"], "nothing"),
    ):
        assert example(*words) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
