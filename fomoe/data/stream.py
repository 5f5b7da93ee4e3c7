"""One deterministic, resumable stream of token sequences per site."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np

from fomoe.data.sources import hub_rows
from fomoe.data.tokenizer import Tokenizer
from fomoe.errors import DataError


class Stream(Protocol):
    """Endless sequences, with a small state that restores the exact position."""

    def next_batch(self, batch_size: int) -> np.ndarray:
        """The next sequences, int64 [batch_size, seq_len + 1]: inputs and shifted targets."""
        ...

    def state(self) -> dict[str, int]: ...

    def load_state(self, state: dict[str, int]) -> None: ...


class TokenStream:
    """Windows over token blocks in memory or on disk, in a new order every epoch.

    Args:
        blocks: flat integer arrays; a window never crosses from one to the next.
        seq_len: tokens per sequence; a window has one more, for the targets.
        seed: decides the order, with the shard's number and the epoch.
        shard: number of this part of the text.
        name: how errors name this text.

    Raises:
        DataError: if no block is as long as one window.
    """

    def __init__(
        self, blocks: list[np.ndarray], *, seq_len: int, seed: int, shard: int, name: str
    ) -> None:
        self.blocks = [block for block in blocks if len(block) > seq_len]
        self.seq_len, self.seed, self.shard = seq_len, seed, shard
        if not self.blocks:
            tokens = sum(len(block) for block in blocks)
            raise DataError(
                f"{name} has {tokens} tokens, but one sequence needs "
                f"data.seq_len + 1 = {seq_len + 1}"
            )
        counts = [(len(block) - 1) // seq_len for block in self.blocks]
        self.ends = np.cumsum(counts)
        self.position = 0  # sequences taken since the start
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def num_windows(self) -> int:
        return int(self.ends[-1])

    def window(self, index: int, shift: int = 0) -> np.ndarray:
        """Window `index` of all blocks, moved on by `shift` tokens, or fewer near a block's end."""
        block = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[block - 1]) if block else 0
        tokens = self.blocks[block]
        used = (int(self.ends[block]) - first) * self.seq_len + 1
        start = (index - first) * self.seq_len + min(shift, len(tokens) - used)
        return tokens[start : start + self.seq_len + 1].astype(np.int64)

    def next_batch(self, batch_size: int) -> np.ndarray:
        rows = []
        for _ in range(batch_size):
            epoch, index = divmod(self.position, self.num_windows)
            if epoch != self._epoch:
                self._start_epoch(epoch)
            rows.append(self.window(int(self._order[index]), self._shift))
            self.position += 1
        return np.stack(rows)

    def _start_epoch(self, epoch: int) -> None:
        generator = np.random.Generator(np.random.PCG64([self.seed, self.shard, epoch]))
        self._order = generator.permutation(self.num_windows)
        self._shift = int(generator.integers(self.seq_len)) if epoch else 0
        self._epoch = epoch

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class HubStream:
    """Every num_shards-th document of a streamed data set, packed into sequences.

    Args:
        dataset: a streaming `datasets` split, the held-out documents already skipped.
        source: its name, for errors.
        field: the column that holds the text.
        shard, num_shards: this site takes documents shard, shard + num_shards, ...
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Tokenizer,
        *,
        source: str,
        field: str,
        seq_len: int,
        shard: int,
        num_shards: int,
    ) -> None:
        self.dataset, self.source = dataset, source
        self.tokenizer, self.field = tokenizer, field
        self.seq_len, self.shard, self.num_shards = seq_len, shard, num_shards
        self.load_state({"epoch": 0, "document": 0, "token": 0})

    def _read(self) -> Iterator[np.ndarray]:
        first = self.shard + self.document * self.num_shards
        rows = islice(hub_rows(self.dataset.skip(first), self.source), 0, None, self.num_shards)
        for row in rows:
            yield encode_document(self.tokenizer, hub_text(row, self.field))

    def next_batch(self, batch_size: int) -> np.ndarray:
        return np.stack([self._next_window() for _ in range(batch_size)])

    def _next_window(self) -> np.ndarray:
        """One window; the last token of a window is the first of the next."""
        need = self.token + self.seq_len + 1
        while sum(map(len, self._pending)) < need:
            tokens = next(self._reader, None)
            if tokens is None:
                self._next_epoch()
                need = self.token + self.seq_len + 1
            else:
                self._pending.append(tokens)
        window = np.concatenate(self._pending)[self.token : need].astype(np.int64)
        self.token += self.seq_len
        while self._pending and self.token >= len(self._pending[0]):
            self.token -= len(self._pending.pop(0))
            self.document += 1
        return window

    def _next_epoch(self) -> None:
        if self.document == 0 and self.token == 0:
            tokens = sum(map(len, self._pending))
            raise DataError(
                f"the hub data set gives shard {self.shard} {tokens} tokens, but one sequence "
                f"needs data.seq_len + 1 = {self.seq_len + 1}"
            )
        self.load_state({"epoch": self.epoch + 1, "document": 0, "token": 0})

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "document": self.document, "token": self.token}

    def load_state(self, state: dict[str, int]) -> None:
        self.epoch, self.document, self.token = state["epoch"], state["document"], state["token"]
        self._pending: list[np.ndarray] = []
        self._reader = self._read()


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Tokens of one document, with the end-of-text token where the tokenizer has one."""
    tokens = tokenizer.encode(text)
    if tokenizer.eos_id is None:
        return tokens
    return np.append(tokens, np.asarray(tokenizer.eos_id, dtype=tokens.dtype))


def hub_text(row: dict[str, Any], field: str) -> str:
    """The text column of a row.

    Raises:
        DataError: if there is none; it names the columns.
    """
    if not isinstance(row.get(field), str):
        raise DataError(
            f"data.text_field {field} is not a text column; the columns are {sorted(row)}"
        )
    return row[field]
