"""Runs with adapters from the command line: a resume, records, comparisons, and bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same_bits
from helpers_adapters import adapter_options, base_folder
from helpers_cli import Outcome, fomoe, records, trained, write_texts
from safetensors.torch import load_file

from fomoe.adapters.data import (
    Pair,
    PairStream,
    build_client_data,
    deal,
    encode_pair,
    padded,
    read_pairs,
)
from fomoe.comparison import read_methods
from fomoe.data.tokenizer import ByteTokenizer
from fomoe.errors import ConfigError, DataError
from fomoe.load import load_config
from fomoe.overrides import set_option
from fomoe.services import check_services

GROUPS = ("red", "green", "blue")


def write_pairs(folder: Path, count: int = 60) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}", "colour": GROUPS[i % 3]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_adapter_config(folder: Path, **more: Any) -> Path:
    """Four clients on small texts, two rounds of two steps."""
    tree: dict[str, Any] = {"num_sites": 4, "local_steps": 2, "rounds": 2}
    options = adapter_options(
        data__source=write_texts(folder / "texts"),
        data__seq_len=16,
        data__held_out_sequences=6,
        data__held_out_fraction=0.1,
        inner__batch_size=2,
        run__dir=str(folder / "run"),
        **more,
    )
    for name, value in options.items():
        set_option(tree, name, value)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def parts(run_dir: Path) -> dict[str, Any]:
    folder = max((run_dir / "checkpoints").iterdir())
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    "words",
    [
        ["method=prelort", "adapters.participation=0.5"],
        ["method=prelort", "adapters.keep_optimizer=true", "sync.codec=int4"],
        ["method=flora", "adapters.participation=0.5"],
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, words: list[str]) -> None:
    """The same clients take part, at the same ranks, on the same text."""
    whole = write_adapter_config(tmp_path)
    words = [*words, "inner.schedule_steps=8"]
    trained(whole, *words, "rounds=4")
    other = f"run.dir={tmp_path / 'other'}"
    trained(whole, *words, "rounds=2", other)
    trained(whole, *words, "rounds=4", other, "--resume")
    assert_same_bits(parts(tmp_path / "other"), parts(tmp_path / "run"))
    merged = [r["val_loss_by_rank"] for r in records(tmp_path / "run", "merged")]
    assert [r["val_loss_by_rank"] for r in records(tmp_path / "other", "merged")][-1:] == merged


def test_records_and_summary(tmp_path: Path) -> None:
    summary = trained(write_adapter_config(tmp_path))
    assert list(summary["val_loss_by_rank"]) == ["1", "2", "4"]
    assert summary["val_loss_merged"] == summary["val_loss_by_rank"]["4"]
    assert summary["val_loss_local"] == pytest.approx(
        [summary["val_loss_by_rank"][str(rank)] for rank in (1, 2, 2, 4)]
    )
    assert sum(summary["energy"]) == pytest.approx(1)
    errors = [row["product_error"] for row in records(tmp_path / "run", "merged")]
    assert 0 < summary["product_error"] == errors[-1]
    assert summary["passes_per_step"] == (1 + 2 + 2 + 3) / 4
    width = 4 * (16 + 16) * 4
    assert summary["payload_bytes_per_site_per_round_by_site"] == [width, *[2 * width] * 3]
    steps = records(tmp_path / "run", "step")
    assert len(steps) == 4 * 2 * 2


def test_another_base_is_refused_on_resume(tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_folder(), tmp_path / "base"))
    config = write_adapter_config(tmp_path, adapters__base=str(base))
    trained(config)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    outcome = fomoe("train", config, "--resume", "rounds=3")
    assert outcome.status == 1
    assert "frozen base" in outcome.err


def test_methods_are_compared(tmp_path: Path) -> None:
    config = write_adapter_config(tmp_path)
    outcome = fomoe("compare", config, "--methods", "prelort,fedit-min,zero-pad-deltas", "--json")
    assert outcome.status == 0, outcome.err
    prelort, smallest, padded_deltas = outcome.json
    assert list(smallest["val_loss_by_rank"]) == ["1"]
    assert smallest["passes_per_step"] == padded_deltas["passes_per_step"] == 1
    assert prelort["passes_per_step"] == 2
    words = ["--methods", "segments,fedit-max", "--seeds", "0,1", "--overwrite"]
    told = fomoe("compare", config, *words).out
    assert "mean and deviation of 2 seeds" in " ".join(told.split())
    assert "rank 1" in told
    assert "passes/step" in told
    assert told.count("±") == 3 + 1  # the one at every rank, the other at the largest


def test_a_family_of_methods_is_all_of_them() -> None:
    assert read_methods("prelort,fedit,zero-pad,hetlora") == [
        *("prelort", "fedit-min", "fedit-max", "zero-pad-values", "zero-pad-deltas", "hetlora")
    ]
    with pytest.raises(ConfigError, match="--methods fedit-min is given twice"):
        read_methods("fedit,fedit-min")
    with pytest.raises(ConfigError, match=r"--methods zeropad is not a method; .*zero-pad"):
        read_methods("zeropad")


def test_a_dry_run_says_who_holds_which_dimensions(tmp_path: Path) -> None:
    told = fomoe("train", write_adapter_config(tmp_path), "--dry-run").out
    assert "2 to 3" in told
    assert "1, 2, 3" in told
    assert "Resident experts" not in told


def test_a_baseline_with_a_server_needs_one_process(tmp_path: Path) -> None:
    config = load_config(write_adapter_config(tmp_path, method="flexlora"))
    with pytest.raises(ConfigError, match="needs all clients in one process"):
        check_services(config, (0,), torch.device("cpu"))


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("adapters.ranks=[1,2]", "adapters.ranks [1, 2] must have one rank for each of the 4"),
        ("adapters.ranks=[0,1,2,4]", "has the rank 0; every rank must be from 1"),
        ("adapters.ranks=[1,2,2,99]", "adapters.ranks 99 exceeds the size 16 x 16"),
        ("adapters.targets=q_prj", "adapters.targets q_prj names no matrix of adapters.base; did"),
        ("adapters.base=/nowhere", "adapters.base /nowhere is no folder"),
        ("adapters.base=null", "method prelort needs the frozen base"),
        ("method=diloco", "method diloco does not train adapters"),
        ("model.d_model=8", "model.d_model 8 has no meaning beside adapters.base"),
        ("router.lb_loss=0.5", "router.lb_loss 0.5 has no meaning"),
        ("data.tokenizer=bpe", "data.tokenizer bpe must be the base's own"),
        ("data.client_field=x", "data.client_field x is for data.format prompt-completion"),
        ("data.dirichlet_alpha=1", "data.dirichlet_alpha 1.0 needs data.client_field"),
        ("adapters.participation=0", "adapters.participation 0"),
        ("adapters.aggregate=flexlora sync.codec=int8", "sync.codec int8 must be fp32 for"),
        ("adapters.aggregate=flexlora", "outer.optimizer SGD must be SGD with lr 1"),
        ("run.park=always", "run.park always has no meaning"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, word: str, reason: str) -> None:
    outcome = fomoe("train", write_adapter_config(tmp_path, outer__momentum=0.5), *word.split())
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert reason in outcome.err


def test_uniform_weights_do_not_fit_sampling(tmp_path: Path) -> None:
    config = write_adapter_config(tmp_path, adapters__participation=0.5)
    outcome = fomoe("train", config, "sync.weight=uniform")
    assert "sync.weight uniform counts clients that do not take part" in outcome.err


def test_a_kept_optimizer_does_not_fit_sampling(tmp_path: Path) -> None:
    config = write_adapter_config(tmp_path, adapters__participation=0.5)
    outcome = fomoe("train", config, "adapters.keep_optimizer=true")
    assert outcome.err.count("\n") == 1
    assert "adapters.keep_optimizer true does not fit" in outcome.err


@pytest.mark.parametrize(
    "word", ["adapters.scale=3.0", "data.format=prompt-completion", "data.client_field=x"]
)
def test_pre_training_has_no_adapters(tmp_path: Path, word: str) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("num_sites: 2\n")
    outcome = fomoe("train", path, word, "--dry-run")
    assert outcome.status == 2
    assert "needs adapters.base" in outcome.err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.json", "is no model of transformers: config.json: No such file"),
        ("model.safetensors", "has neither model.safetensors nor"),
    ],
)
def test_a_base_that_lacks_a_file_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    base = Path(shutil.copytree(base_folder(), tmp_path / "base"))
    (base / name).unlink()
    config = write_adapter_config(tmp_path, adapters__base=str(base))
    outcome = fomoe("train", config)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert reason in outcome.err


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_folder(), tmp_path / "base"))
    (base / "model.safetensors").write_bytes(b"\xff" * 20)
    outcome = fomoe("train", write_adapter_config(tmp_path, adapters__base=str(base)))
    assert outcome.status == 2
    assert "has a damaged file model.safetensors" in outcome.err


# ------------------------------------------------------------------------- prompts and completions


def pair_words(tmp_path: Path) -> list[str]:
    return [
        "data.format=prompt-completion",
        f"data.source={write_pairs(tmp_path)}",
        "data.seq_len=24",
    ]


def test_pairs_are_trained_on_and_resumed(tmp_path: Path) -> None:
    words = [*pair_words(tmp_path), "data.client_field=colour", "data.dirichlet_alpha=5"]
    config = write_adapter_config(tmp_path)
    summary = trained(config, *words, "inner.schedule_steps=4")
    assert None not in summary["val_loss_by_client"]
    other = f"run.dir={tmp_path / 'other'}"
    trained(config, *words, "inner.schedule_steps=4", "rounds=1", other)
    trained(config, *words, "inner.schedule_steps=4", other, "--resume")
    assert_same_bits(parts(tmp_path / "other"), parts(tmp_path / "run"))


def test_a_pair_learns_its_completion_and_the_end() -> None:
    pair = Pair("ab", "cd", "")
    code = [-1 - ord("a"), -1 - ord("b"), ord("c"), ord("d"), 256]
    assert encode_pair(ByteTokenizer(), pair, seq_len=8).tolist() == code
    assert encode_pair(ByteTokenizer(), pair, seq_len=3).tolist() == code[1:]
    assert encode_pair(ByteTokenizer(), pair, seq_len=2).tolist() == [code[1], ord("c"), ord("d")]
    empty = encode_pair(ByteTokenizer(), Pair("", "cd", ""), seq_len=8)
    assert empty.tolist() == [-1, *code[2:]]


def test_padding_is_no_target() -> None:
    rows = padded([np.array([-5, 3]), np.array([-5, 3, 4])])
    assert rows.tolist() == [[-5, 3, -1], [-5, 3, 4]]


def test_every_epoch_has_every_pair_once() -> None:
    rows = [np.array([-1, k]) for k in range(6)]
    stream = PairStream(rows, seed=0, client=0)
    epochs = [stream.next_batch(6)[:, 1].tolist() for _ in range(2)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def dealt(tmp_path: Path, *words: str) -> list[list[Pair]]:
    config = load_config(write_adapter_config(tmp_path), [*pair_words(tmp_path), *words])
    return deal(config, read_pairs(config.data.source, config.data.client_field))


def test_pairs_are_split_by_field_or_shares(tmp_path: Path) -> None:
    by_chance = dealt(tmp_path)
    assert [len(own) for own in by_chance] == [15] * 4
    even = dealt(tmp_path, "data.client_field=colour", "data.dirichlet_alpha=1000")
    skewed = dealt(tmp_path, "data.client_field=colour", "data.dirichlet_alpha=0.5", "seed=3")
    for split in (by_chance, even, skewed):
        assert len({pair.digest for own in split for pair in own}) == 60
    assert max(map(len, even)) - min(map(len, even)) < 6
    assert max(map(len, skewed)) - min(map(len, skewed)) > 10


def test_a_field_gives_each_client_its_values(tmp_path: Path) -> None:
    config = load_config(
        write_adapter_config(tmp_path, num_sites=3, adapters__ranks=[1, 2, 4]),
        [*pair_words(tmp_path), "data.client_field=colour"],
    )
    split = deal(config, read_pairs(config.data.source, "colour"))
    assert [{pair.group for pair in own} for own in split] == [{g} for g in sorted(GROUPS)]


def test_a_client_without_pairs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="client 3 gets 0 of the 60 pairs"):
        dealt(tmp_path, "data.client_field=colour")


def test_held_out_pairs_are_not_trained_on(tmp_path: Path) -> None:
    words = [*pair_words(tmp_path), "data.held_out_fraction=0.2", "data.held_out_sequences=99"]
    config = load_config(write_adapter_config(tmp_path), words)
    data = build_client_data(config, range(4))

    def texts(rows: Any) -> set[bytes]:
        return {np.where(r < 0, -1 - r, r)[r != -1].astype(np.uint16).tobytes() for r in rows}

    held = texts(data.held_out)
    assert held == set().union(*(texts(own) for own in data.own_held_out.values()))
    assert len(held) == 12
    for stream in data.streams.values():
        assert not held & texts(stream.examples)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "line 61: is no JSON object"),
        ("{", "line 61: is no JSON object"),
        ('{"prompt": "a"}', "line 61: has no text in its field completion"),
        ('{"prompt": "a", "completion": ""}', "line 61: has an empty completion"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path: Path, line: str, reason: str) -> None:
    words = pair_words(tmp_path)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(line + "\n")
    outcome: Outcome = fomoe("train", write_adapter_config(tmp_path), *words)
    assert outcome.status == 1
    assert reason in outcome.err


@pytest.mark.parametrize(
    "words", [["sync.codec=int8"], ["method=flexlora", "adapters.participation=0.5"]]
)
def test_the_cost_model_has_the_bytes_that_a_run_counts(tmp_path: Path, words: list[str]) -> None:
    summary = trained(write_adapter_config(tmp_path), *words)
    outcome = fomoe("project", "--config", tmp_path / "run" / "config.yaml", "--json")
    assert outcome.status == 0, outcome.err
    rows = json.loads(outcome.out)
    assert [row["lora_rank"] for row in rows] == [1, 2, 2, 4]
    for kind in ("payload", "wire"):
        counted = summary[f"{kind}_bytes_per_site_per_round_by_site"]
        assert [row[f"{kind}_bytes_per_round"] for row in rows] == counted
        assert [row[f"{kind}_bytes"] for row in rows] == [2 * number for number in counted]
    assert [row["params"] for row in rows] == summary["params_per_site_by_site"]


def test_the_cost_model_compares_methods_of_adapters(tmp_path: Path) -> None:
    path = write_adapter_config(tmp_path)
    words = ("project", "--config", path, "--compare", "fedit-min,fedit-max")
    outcome = fomoe(*words, "--bandwidth", "8kbit/1Mbit", "--csv")
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader(outcome.out.splitlines()))
    assert [(row["method"], row["lora_rank"]) for row in rows] == [
        *[("fedit-min", "1")] * 4,
        *[("fedit-max", "4")] * 4,
    ]
    for row in rows:
        # fp32 rows of two layers' q and v, in a ring of four; the slower way is 1 kB/s.
        wire = 4 * int(row["lora_rank"]) * 2 * 2 * (16 + 16) * 2 * 3 / 4
        assert float(row["wire_bytes_per_round"]) == wire
        assert float(row["link_s_per_round"]) == pytest.approx(wire / 1000)
    outcome = fomoe(*words)
    assert [line.split()[:3] for line in outcome.out.splitlines()[1:3]] == [
        ["fedit-min", "0", "1"],
        ["fedit-min", "1", "1"],
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--compare", "prelort,diloco"], "--compare diloco does not train adapters"),
        (["--local-steps", "8"], "--local-steps 8 has no meaning for a config with adapters"),
        (["--sweep", "bits=4,8"], "has no meaning for a config with adapters"),
        (["--wide"], "--wide True has no meaning for a config with adapters"),
    ],
)
def test_what_the_cost_model_cannot_say_of_adapters(
    tmp_path: Path, words: list[str], reason: str
) -> None:
    outcome = fomoe("project", "--config", write_adapter_config(tmp_path), *words)
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert reason in outcome.err


def test_a_merge_writes_the_servers_matrices(tmp_path: Path) -> None:
    trained(write_adapter_config(tmp_path))
    assert fomoe("merge", tmp_path / "run").status == 0
    tensors = load_file(tmp_path / "run/merged/model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(4, 16)}
