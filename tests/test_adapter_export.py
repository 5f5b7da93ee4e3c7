"""Adapters of a run as PEFT's own files, merged into the base, and evaluated from a checkpoint."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapters import base_folder, load_server
from helpers_cli import fomoe, trained
from test_adapter_runs import write_adapter_config
from torch import Tensor

from fomoe.adapters.layers import read_model
from fomoe.load import load_config
from fomoe.report import next_commands


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    trained(write_adapter_config(folder), "inner.lr=0.1")
    return folder / "run"


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(1))


def logits_at(run_dir: Path, rank: int, tokens: Tensor) -> Tensor:
    """Of the run's own layers, with the server's matrices cut to a rank."""
    adapted, matrices = load_server(run_dir)
    adapted.put(matrices, rank)
    with torch.no_grad():
        return adapted.logits(tokens)


def test_the_commands_that_a_run_ends_with_work(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (config,) = map(load_config, run_dir.parent.glob("*.yaml"))
    commands = next_commands(config, str(run_dir))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        outcome = fomoe(*shlex.split(command)[1:])
        assert outcome.status == 0, outcome.err
    assert (tmp_path / "models/run/adapter_config.json").is_file()


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_peft_computes_the_same_at_every_prefix(
    run_dir: Path, tokens: Tensor, rank: int, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    outcome = fomoe("export", run_dir, "--adapter", "--rank", rank, "--out", tmp_path / "a")
    assert outcome.status == 0, outcome.err
    model = peft.PeftModel.from_pretrained(
        read_model("base", base_folder(), torch.float32), tmp_path / "a"
    )
    with torch.no_grad():
        got = model(input_ids=tokens).logits
    expected = logits_at(run_dir, rank, tokens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, logits_at(run_dir, 0, tokens), atol=1e-5)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["lora_alpha"] == 2.0 * rank


@pytest.mark.parametrize("rank", [2, None])
def test_a_merged_base_computes_the_same(
    run_dir: Path, tokens: Tensor, rank: int | None, tmp_path: Path
) -> None:
    words: list[Any] = ["--merge"] if rank is None else ["--merge", "--rank", rank]
    outcome = fomoe("export", run_dir, "--adapter", *words, "--out", tmp_path / "m")
    assert outcome.status == 0, outcome.err
    model = read_model("merged", tmp_path / "m", torch.float32)
    with torch.no_grad():
        got = model(input_ids=tokens).logits
    torch.testing.assert_close(got, logits_at(run_dir, rank or 4, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "words", [["generate", "RUN", "--prompt", "a"], ["train", "quickstart", "init_from=RUN"]]
)
def test_a_run_with_adapters_is_no_model(run_dir: Path, tmp_path: Path, words: list[str]) -> None:
    own = [word.replace("RUN", str(run_dir)) for word in words]
    outcome = fomoe(*own, *([f"run.dir={tmp_path / 'run'}"] if words[0] == "train" else []))
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert f"{run_dir} has adapters and no model" in outcome.err


def test_floras_base_is_exported_merged_only(tokens: Tensor, tmp_path: Path) -> None:
    summary = trained(write_adapter_config(tmp_path, method="flora"), "inner.lr=0.1")
    refused = fomoe("export", tmp_path / "run", "--adapter", "--out", tmp_path / "a")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "--merge writes that" in refused.err
    words = ["--adapter", "--merge", "--out", tmp_path / "m"]
    assert fomoe("export", tmp_path / "run", *words).status == 0
    model = read_model("merged", tmp_path / "m", torch.float32)
    base = read_model("base", base_folder(), torch.float32)
    assert not torch.allclose(model(input_ids=tokens).logits, base(input_ids=tokens).logits)
    again = fomoe("eval", tmp_path / "run", "--json").json
    for rank, loss in summary["val_loss_by_rank"].items():
        assert again["ranks"][rank]["loss"] == pytest.approx(loss)


def test_a_saved_round_is_evaluated_again(tmp_path: Path) -> None:
    summary = trained(write_adapter_config(tmp_path))
    result = fomoe("eval", tmp_path / "run", "--json").json
    assert [figures["loss"] for figures in result["ranks"].values()] == list(
        summary["val_loss_by_rank"].values()
    )
    assert result["energy"] == summary["energy"]
    assert "server at rank 4" in fomoe("eval", tmp_path / "run").out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--adapter", "--rank", "5"], "--rank 5 must be from 1 to 4"),
        (["--rank", "2"], "--rank 2 needs --adapter"),
        (["--merge"], "--merge True needs --adapter"),
        (["--adapter", "--dtype", "bf16"], "--dtype bf16 has no meaning beside --adapter"),
        ([], "has adapters and no model of its own; fomoe export --adapter writes them"),
    ],
)
def test_a_mistake_is_one_line(
    run_dir: Path, tmp_path: Path, words: list[str], reason: str
) -> None:
    outcome = fomoe("export", run_dir, "--out", tmp_path / "a", *words)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert reason in outcome.err
    assert not list(tmp_path.iterdir())
