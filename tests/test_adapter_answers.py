"""What adapters answer: choices by their likelihood, and ROUGE-L of generated completions."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_adapters import load_server
from helpers_cli import fomoe, trained
from test_adapter_runs import GROUPS, write_adapter_config, write_pairs
from torch import Tensor, nn

from fomoe.adapters.answers import (
    accuracy,
    complete,
    log_likelihoods,
    mean_rouge,
    prompt_tokens,
    rouge_l,
)
from fomoe.adapters.data import Pair, encode_pair, held_out_pairs, read_pairs
from fomoe.adapters.layers import AdaptedModel
from fomoe.adapters.options import AdaptersConfig
from fomoe.data.tokenizer import ByteTokenizer
from fomoe.errors import DataError
from fomoe.load import load_config

CPU, END = torch.device("cpu"), 256


class Bigrams(nn.Module):
    """A model whose next byte depends on the last one only.

    Args:
        follows: probabilities of what follows a byte; the rest is shared by all other tokens.
    """

    def __init__(self, follows: dict[str, dict[int, float]], *, cache: str = "cache") -> None:
        super().__init__()
        self.cache = cache
        self.logits = torch.zeros(257, 257)
        for byte, given in follows.items():
            rest = (1 - sum(given.values())) / (257 - len(given))
            row = torch.full((257,), math.log(rest))
            for token, share in given.items():
                row[token] = math.log(share)
            self.logits[ord(byte)] = row

    def forward(self, input_ids: Tensor, use_cache: bool = False, **given: Any) -> Any:
        """A cache is the number of tokens that were read; without one all of them come again."""
        assert not given or list(given) == [self.cache]
        seen = given.get(self.cache, 0) + input_ids.shape[1]
        self.read = seen
        more = {self.cache: seen} if self.cache and use_cache else {}
        return SimpleNamespace(logits=self.logits[input_ids], **more)


def adapted(follows: dict[str, dict[int, float]], **more: Any) -> AdaptedModel:
    return AdaptedModel(AdaptersConfig(), Bigrams(follows, **more), ())


# x -> a, b or c; a ends at once, b has a likely second byte, c ends rarely.
X = {"x": {ord("a"): 0.3, ord("b"): 0.5, ord("c"): 0.1}}
A, B = {"a": {END: 0.5}}, {"b": {ord("y"): 0.5, END: 0.2}}
Y = {"y": {END: 0.6, ord("b"): 0.1}}
FOLLOWS = {**X, **A, **B, **Y}
OPTIONS: dict[str, Any] = {"tokenizer": ByteTokenizer(), "seq_len": 8, "device": CPU}


def test_a_choice_has_the_likelihood_of_its_tokens_and_the_end() -> None:
    rows = [encode_pair(ByteTokenizer(), Pair("x", text, ""), seq_len=8) for text in ("a", "b")]
    found = log_likelihoods(adapted(FOLLOWS), torch.tensor([row.tolist() for row in rows]))
    expected = [math.log(0.3 * 0.5), math.log(0.5 * 0.2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_likeliest_choice_counts(batch_size: int) -> None:
    """0.15 for a, 0.10 for b (its first byte alone is likelier), 0.15 = 0.5 x 0.5 x 0.6 for by."""
    model = adapted(FOLLOWS)

    def share(*pairs: Pair) -> float | None:
        return accuracy(model, pairs, batch_size=batch_size, **OPTIONS)

    right, wrong = Pair("x", "a", "", ("b", "a")), Pair("x", "b", "", ("b", "a", "c"))
    no_question = Pair("x", "b", "")
    assert share(right) == 1
    assert share(wrong) == 0
    assert share(right, wrong, no_question, right) == pytest.approx(2 / 3)
    assert share(no_question) is None
    assert share(Pair("x", "by", "", ("by", "b"))) == 1  # 0.15 against 0.10
    assert share(Pair("x", "a", "", ("b", "a", "byb"))) == 1


@pytest.mark.parametrize("cache", ["cache", "past_key_values", ""])
def test_the_likeliest_tokens_follow_up_to_the_end(cache: str) -> None:
    model = adapted(FOLLOWS, cache=cache)
    prompt = prompt_tokens(ByteTokenizer(), "x", most=8)
    assert complete(model, prompt, 9, END) == [ord("b"), ord("y")]
    assert model.model.read == 3  # x, b and y
    assert complete(model, prompt, 1, END) == [ord("b")]
    assert len(complete(model, prompt, 3, None)) == 3  # no token ends the text


def test_a_prompt_keeps_its_end() -> None:
    assert prompt_tokens(ByteTokenizer(), "abc", most=2).tolist() == [ord("b"), ord("c")]
    assert prompt_tokens(ByteTokenizer(), "", most=2).tolist() == [0]


def test_rouge_is_the_common_subsequence_of_words() -> None:
    pytest.importorskip("rouge_score")
    rouge = rouge_l()
    assert rouge("The cat sat.", "the cat ran") == pytest.approx(2 / 3)
    # Three words in order of four and five: P = 3/5, R = 3/4.
    assert rouge("a b c d", "a x b y d") == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert rouge("a b", "") == 0


def test_rouge_is_of_what_is_generated() -> None:
    def same(reference: str, text: str) -> float:
        return float(reference == text)

    pairs = [Pair("x", "by", ""), Pair("a", "", ""), Pair("x", "b", "")]
    found = mean_rouge(adapted(FOLLOWS), pairs, max_tokens=4, rouge=same, **OPTIONS)
    assert found == pytest.approx(2 / 3)
    assert mean_rouge(adapted(FOLLOWS), [], max_tokens=4, rouge=same, **OPTIONS) is None


# ------------------------------------------------------------------------------------ the command


def question_words(folder: Path) -> list[str]:
    """Pairs of which every second one is a question; two colours of three have none."""
    path = write_pairs(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for index, row in enumerate(rows):
        if row["colour"] == GROUPS[0]:
            row["choices"] = [str(index), row["completion"], "none"]
            row["choices"] = list(dict.fromkeys(row["choices"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "data.format=prompt-completion",
        f"data.source={path}",
        "data.seq_len=24",
        "data.client_field=colour",
        "data.held_out_fraction=0.3",
        "num_sites=3",
        "adapters.ranks=[1,2,4]",
    ]


def test_a_run_is_evaluated_at_every_rank_and_client(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    trained(write_adapter_config(tmp_path), *question_words(tmp_path))
    run_dir = tmp_path / "run"
    words = ("eval", run_dir, "--metrics", "accuracy,rouge-l", "--max-tokens", 4)
    result = fomoe(*words, "--json").json
    assert list(result["ranks"]) == ["1", "2", "4"]
    for figures in (*result["ranks"].values(), *result["clients"]):
        assert 0 <= figures["rouge_l"] <= 1
    asked = [figures["accuracy"] is not None for figures in result["clients"]]
    groups = sorted(GROUPS)  # client i has the i-th value
    assert asked == [group == GROUPS[0] for group in groups]
    plain = fomoe("eval", run_dir, "--json").json
    assert "accuracy" not in plain["ranks"]["1"]
    assert plain["ranks"]["1"]["loss"] == result["ranks"]["1"]["loss"]
    # The same questions by hand, from the saved matrices: one choice at a time, without padding.
    config = load_config(run_dir / "config.yaml")
    overall, own = held_out_pairs(config)
    adapted, matrices = load_server(run_dir)
    for rank, figures in result["ranks"].items():
        adapted.put(matrices, int(rank))
        assert figures["accuracy"] == by_hand(adapted, overall)
    rank = config.adapters.ranks[groups.index(GROUPS[0])]
    adapted.put(matrices, rank)
    number = groups.index(GROUPS[0])
    assert result["clients"][number]["accuracy"] == by_hand(adapted, own[number])
    table = fomoe(*words).out
    assert "accuracy" in table
    assert "ROUGE-L" in table


@torch.no_grad()
def by_hand(adapted: AdaptedModel, pairs: list[Pair]) -> float:
    right, questions = 0, [pair for pair in pairs if pair.choices]
    for pair in questions:
        scores = {}
        for choice in pair.choices:
            prompt, answer = list(pair.prompt.encode()), [*choice.encode(), END]
            logits = adapted.logits(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            scores[choice] = sum(
                float(logits[place, token]) for place, token in zip(places, answer, strict=True)
            )
        right += max(scores, key=lambda choice: scores[choice]) == pair.completion
    return right / len(questions)


def test_what_cannot_be_scored_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_adapter_config(tmp_path)
    pairs = write_pairs(tmp_path)
    words = ["data.format=prompt-completion", f"data.source={pairs}", "data.seq_len=24"]
    trained(path, *words, "rounds=1")
    run_dir = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    for more, reason in (
        (["--metrics", "accuracy"], "--metrics accuracy needs pairs with the field choices"),
        (["--metrics", "rouge-l"], "rouge-l needs rouge_score: pip install 'fomoe[rouge]'"),
        (["--metrics", "bleu"], "--metrics bleu is no metric"),
        (["--max-tokens", "5"], "--max-tokens 5 needs --metrics rouge-l"),
        (["--metrics", "rouge-l", "--max-tokens", "0"], "--max-tokens 0 must be from 1"),
    ):
        outcome = fomoe("eval", run_dir, *more)
        assert outcome.status in (1, 2)
        assert outcome.err.count("\n") == 1
        assert reason in outcome.err, outcome.err
    trained(path, "rounds=1", f"run.dir={tmp_path / 'text'}")
    outcome = fomoe("eval", tmp_path / "text", "--metrics", "accuracy")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "--metrics accuracy needs a run on pairs" in outcome.err


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ('"a"', "has no list of texts in its field choices"),
        ('["a", 3]', "has no list of texts in its field choices"),
        ('["a"]', "must have two choices or more, all different"),
        ('["a", "a", "b"]', "must have two choices or more, all different"),
        ('["b", "c"]', "has a completion that is none of its choices"),
    ],
)
def test_wrong_choices_are_named(tmp_path: Path, choices: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "x", "completion": "a", "choices": {choices}}}\n')
    with pytest.raises(DataError, match=f"line 1: {reason}"):
        read_pairs(str(path), None)


def test_choices_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"prompt": "x", "completion": "a"}
    path.write_text(json.dumps(row | {"choices": ["b", "a"]}) + "\n" + json.dumps(row) + "\n")
    (pair,) = read_pairs(str(path), None)  # one pair, as it is one to train on
    assert pair.choices == ("b", "a")
