"""How well adapters answer: choices by their likelihood, and ROUGE-L of what they generate.

Both are of the held-out pairs, after the run: `fomoe eval RUN --metrics accuracy,rouge-l`.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomoe.adapters.data import Pair, encode_pair, padded
from fomoe.adapters.layers import AdaptedModel
from fomoe.data.tokenizer import Tokenizer
from fomoe.errors import ServiceError

Score = Callable[[AdaptedModel, Sequence[Pair]], float | None]


def scores(
    metrics: Sequence[str],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
) -> dict[str, Score]:
    """Functions of a model with adapters that are put in, and of pairs; None: nothing to score.

    Args:
        metrics: names of `ANSWER_METRICS`.
        seq_len: tokens, of a prompt with its completion.
        max_tokens: of a generated completion.

    Raises:
        ServiceError: if a metric needs a package that is not there.
    """
    found: dict[str, Score] = {}
    if "accuracy" in metrics:
        found["accuracy"] = partial(
            accuracy, tokenizer=tokenizer, seq_len=seq_len, batch_size=batch_size, device=device
        )
    if "rouge-l" in metrics:
        found["rouge_l"] = partial(
            mean_rouge, tokenizer=tokenizer, seq_len=seq_len, max_tokens=max_tokens, device=device,
            rouge=rouge_l(),
        )  # fmt: skip
    return found


# --------------------------------------------------------------------------------------- accuracy


def accuracy(
    adapted: AdaptedModel,
    pairs: Sequence[Pair],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    device: torch.device,
) -> float | None:
    """Share of the questions whose likeliest choice is the right one; None without a question.

    A choice's log-likelihood is the sum over its tokens and the end of the text, as it is trained;
    of equal ones the first counts.
    """
    questions = [pair for pair in pairs if pair.choices]
    if not questions:
        return None
    rows = [
        encode_pair(tokenizer, Pair(pair.prompt, choice, ""), seq_len=seq_len)
        for pair in questions
        for choice in pair.choices
    ]
    values: list[float] = []
    for start in range(0, len(rows), batch_size):
        windows = torch.from_numpy(padded(rows[start : start + batch_size])).to(device)
        values += log_likelihoods(adapted, windows).tolist()
    right, position = 0, 0
    for pair in questions:
        own = values[position : position + len(pair.choices)]
        right += pair.choices[int(np.argmax(own))] == pair.completion
        position += len(own)
    return right / len(questions)


@torch.no_grad()
def log_likelihoods(adapted: AdaptedModel, windows: Tensor) -> Tensor:
    """Of the targets of every coded window, [B]."""
    return -adapted.loss(windows, reduction="none").view(len(windows), -1).sum(1)


# ---------------------------------------------------------------------------------------- ROUGE-L


def rouge_l() -> Callable[[str, str], float]:
    """F-measure of the longest common subsequence of words: (reference, text) to 0..1.

    The package's own words: lower case, letters and digits only, without stemming.

    Raises:
        ServiceError: naming the extra, if the package is not there.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        missing = (error.name or "rouge_score").split(".")[0]
        raise ServiceError(f"rouge-l needs {missing}: pip install 'fomoe[rouge]'") from None
    scorer: Any = RougeScorer(["rougeL"])
    return lambda reference, text: float(scorer.score(reference, text)["rougeL"].fmeasure)


def mean_rouge(
    adapted: AdaptedModel,
    pairs: Sequence[Pair],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    max_tokens: int,
    device: torch.device,
    rouge: Callable[[str, str], float],
) -> float | None:
    """Mean ROUGE-L of the likeliest completions, token by token; None without a pair."""
    if not pairs:
        return None
    total = 0.0
    for pair in pairs:
        prompt = prompt_tokens(tokenizer, pair.prompt, most=max(1, seq_len + 1 - max_tokens))
        found = complete(adapted, prompt.to(device), max_tokens, tokenizer.eos_id)
        total += rouge(pair.completion, tokenizer.decode(found))
    return total / len(pairs)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, most: int) -> Tensor:
    """The last tokens of a prompt, int64; an empty one has the token 0, as in training."""
    tokens = tokenizer.encode(prompt).astype(np.int64)[-most:]
    return torch.from_numpy(tokens if len(tokens) else np.zeros(1, dtype=np.int64))


@torch.no_grad()
def complete(
    adapted: AdaptedModel, prompt: Tensor, max_tokens: int, eos_id: int | None
) -> list[int]:
    """The likeliest token after each other, up to the end of the text, which is left out.

    Args:
        prompt: token ids, [S].
    """
    found: list[int] = []
    cache: dict[str, Any] = {}
    tokens = prompt[None]
    for _ in range(max_tokens):
        out: Any = adapted.model(input_ids=tokens, use_cache=True, **cache)
        token = out.logits[0, -1].argmax()
        if int(token) == eos_id:
            break
        found.append(int(token))
        cache = _cache_of(out)
        # A model without a cache reads everything again.
        tokens = token.view(1, 1) if cache else torch.cat([tokens, token.view(1, 1)], 1)
    return found


def _cache_of(out: Any) -> dict[str, Any]:
    """What a model computed for the next token, under the name that its version has for it."""
    for name in ("cache", "past_key_values"):
        if getattr(out, name, None) is not None:
            return {name: getattr(out, name)}
    return {}
