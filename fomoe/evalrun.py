"""`fomoe eval`: the merged model and every site's own one, on the held-out part or on a text.

The same evaluation as during training, from a checkpoint: one site is in memory at a time, and of
the merged model one layer's experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fomoe.adapters.evalrun import evaluate_adapters
from fomoe.build import choose_device
from fomoe.config import Config
from fomoe.data.dataset import build_data, run_tokenizer
from fomoe.data.stream import encode_document
from fomoe.data.tokenizer import Tokenizer
from fomoe.errors import ConfigError, DataError
from fomoe.evaluate import evaluate_local, evaluate_stored
from fomoe.site import Site
from fomoe.state import entry
from fomoe.textfile import TextError, read_text
from fomoe.whole import WholeModel, merged_kinds, open_whole


class _NoText:
    """The data of a site that is only evaluated."""

    def next_batch(self, batch_size: int) -> np.ndarray:
        raise AssertionError("a site that is evaluated takes no step")

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        pass


def evaluate_run(
    run_dir: Path,
    *,
    text: Path | None = None,
    round_idx: int | None = None,
    device: str = "auto",
    metrics: Sequence[str] = (),
    max_tokens: int = 32,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Loss (nats per token), perplexity and bits per byte of the merged model and of every site.

    Args:
        run_dir: a run's folder, with the parts of all sites.
        text: a text file; None: the run's held-out part.
        round_idx: rounds done; None: the newest that is complete.
        device: auto, cpu, cuda or cuda:N.
        metrics: accuracy and rouge-l, of a run with adapters on pairs.
        max_tokens: of a completion that is generated for rouge-l.
        say: called with a line that says why a newer round is refused.

    Raises:
        CheckpointError: if no round is complete.
        ConfigError: for a text or metrics that do not fit the run.
        DataError: if the text cannot be read, or the held-out part is no longer that of the run.
    """
    where = choose_device(device, 0)
    whole = open_whole(run_dir, round_idx, say)
    if whole.config.adapters.base is not None:
        if text is not None:
            raise ConfigError("--text", text, "has no meaning for a run with adapters")
        return evaluate_adapters(whole, where, metrics=metrics, max_tokens=max_tokens)
    if metrics:
        rule = "is of runs with adapters; docs/export.md says how others are evaluated on tasks"
        raise ConfigError("--metrics", ",".join(metrics), rule)
    whole.refuse_copies("is evaluated by the run itself (val_loss_merged)")
    tokenizer = run_tokenizer(whole.config, run_dir, whole.fingerprints.get("tokenizer"))
    windows = held_out_part(whole) if text is None else _windows(whole.config, text, tokenizer)
    targets = windows[:, 1:]
    num_bytes = None if tokenizer is None else sum(map(tokenizer.num_bytes, targets))
    figures = partial(_figures, tokens=targets.size, num_bytes=num_bytes)
    first = _load_site(whole, 0, where, merged=True)
    merged = evaluate_stored(first, whole.plan.segment_plan, whole.read, windows)
    del first
    local = [
        evaluate_local(_load_site(whole, number, where), windows).loss
        for number in range(whole.config.num_sites)
    ]
    return {
        "run_dir": str(run_dir),
        "round": whole.round_idx,
        "text": "held-out part" if text is None else str(text),
        "sequences": len(windows),
        "tokens": targets.size,
        "bytes": num_bytes,
        "merged": figures(merged.loss),
        "sites": [figures(loss) for loss in local],
    }


def _load_site(
    whole: WholeModel, number: int, device: torch.device, *, merged: bool = False
) -> Site:
    """A site with its own parameters, or the merged model's, and router biases, and no optimizer
    state."""
    part = whole.parts[number]
    names = {n: n for kind in ("param", "router") for n in part.kept if n.startswith(f"{kind}/")}
    for segment, kind in merged_kinds(whole.plan) if merged else ():
        if number in segment.holders:
            names[entry("param", segment.name)] = entry(kind, segment.name)
    site = Site(whole.plan, number, stream=_NoText(), device=device)
    tensors = {name: part.read(source) for name, source in names.items()}
    site.load_state(tensors, {**part.values, "data": {}})
    return site


def _figures(loss: float, *, tokens: int, num_bytes: int | None) -> dict[str, float | None]:
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # a number that JSON has
        "bits_per_byte": loss * tokens / math.log(2) / num_bytes if num_bytes else None,
    }


def held_out_part(whole: WholeModel) -> np.ndarray:
    """The run's held-out part, made again from its sources: int64 [sequences, seq_len + 1].

    Raises:
        DataError: if it is no longer that of the run.
    """
    data = build_data(whole.config, (), tokenizer_dir=whole.run_dir)
    for name, own in data.fingerprints.items():
        if name != "data split" and whole.fingerprints.get(name, own) != own:
            raise DataError(
                f"the {name} is no longer that of {whole.run_dir}: its text has changed since; "
                f"--text FILE evaluates on a text"
            )
    return data.held_out


def _windows(config: Config, path: Path, tokenizer: Tokenizer | None) -> np.ndarray:
    """The whole sequences of a text, one after the other; of a short text, the one that it is."""
    if tokenizer is None:
        raise DataError(f"--text {path}: the run was trained on token shards, without a tokenizer")
    try:
        text = read_text(path)
    except TextError as error:
        raise DataError(f"--text {path} {error}") from None
    tokens = encode_document(tokenizer, text).astype(np.int64)
    if len(tokens) < 2:
        raise DataError(f"--text {path} holds no text")
    if int(tokens.max()) >= config.vocab_size:
        raise DataError(f"--text {path}: token {tokens.max()} is not in the run's vocabulary")
    seq_len = min(config.data.seq_len, len(tokens) - 1)
    count = (len(tokens) - 1) // seq_len
    return np.stack([tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])
