"""Tokenizers: bytes by default, `bpe` trained on the text, or any tokenizer by file or name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fomoe.errors import DataError
from fomoe.textfile import why_no_file

_END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (_END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """Text to token ids.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1.
        eos_id: end-of-text id that follows every document, None if there is none.
        fingerprint: hash that is equal for equal tokenizers.
    """

    vocab_size: int
    eos_id: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; those that end a text have none."""
        ...

    def num_bytes(self, tokens: np.ndarray) -> int:
        """UTF-8 bytes of the text that tokens stand for; an end-of-text token has none."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, and 256 for the end of a text."""

    vocab_size = 257
    eos_id: int | None = 256
    fingerprint = hashlib.sha256(b"byte").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", "surrogatepass")
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    def num_bytes(self, tokens: np.ndarray) -> int:
        return int((tokens < 256).sum())


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        ends = [inner.token_to_id(end) for end in _KNOWN_ENDS]
        self.eos_id = next((end for end in ends if end is not None), None)
        self.fingerprint = hashlib.sha256(inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        ids = self.inner.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.inner.decode(list(tokens), skip_special_tokens=True))

    def num_bytes(self, tokens: np.ndarray) -> int:
        ids = tokens.ravel().tolist()
        tree = json.loads(self.inner.to_str())
        if (tree["decoder"] or {}).get("type") == "ByteLevel":
            # A character is a byte: exact, where decoding a part of a letter is not.
            special = {token["id"] for token in tree["added_tokens"] if token["special"]}
            return sum(len(self.inner.id_to_token(i) or "") for i in ids if i not in special)
        return len(self.inner.decode(ids, skip_special_tokens=True).encode())


class TransformersTokenizer:
    """A transformers tokenizer that has no `tokenizer.json`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.vocab_size: int = len(inner)
        self.eos_id: int | None = inner.eos_token_id
        vocabulary = sorted(inner.get_vocab().items())
        self.fingerprint = hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.inner.encode(text, add_special_tokens=False), dtype=np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.inner.decode(list(tokens), skip_special_tokens=True))

    def num_bytes(self, tokens: np.ndarray) -> int:
        return len(self.inner.decode(tokens.ravel().tolist(), skip_special_tokens=True).encode())


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer: `byte`, a `tokenizer.json`, a folder, or a hub name.

    Raises:
        DataError: if it is not found or not readable.
    """
    if name == "byte":
        return ByteTokenizer()
    path = local_path(name)
    if path is None:
        return _load_from_hub(name)
    if path.is_dir():
        if not (path / "tokenizer.json").exists():
            return _load_transformers(name, path, "it has no tokenizer.json")
        path = path / "tokenizer.json"
    if problem := why_no_file(path):
        raise _refused(name, f"it {problem}")
    from tokenizers import Tokenizer as Library

    try:
        return LibraryTokenizer(Library.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception for every failure
        raise _refused(name, error) from None


def local_path(name: str) -> Path | None:
    """The file or folder that a tokenizer's name means; None for a keyword or a hub name."""
    if name in ("byte", "bpe", "none"):
        return None
    for path in (name, os.path.expanduser(name)):
        if os.path.lexists(path):
            return Path(path)
    is_path = name.endswith(".json") or name.startswith(("/", "~", "."))
    return Path(os.path.expanduser(name)) if is_path else None


def _load_from_hub(name: str) -> Tokenizer:
    from tokenizers import Tokenizer as Library

    try:
        return LibraryTokenizer(Library.from_pretrained(name))
    except Exception as error:  # the library raises plain Exception for every failure
        return _load_transformers(name, name, error)


def _load_transformers(name: str, where: str | Path, reason: object) -> Tokenizer:
    try:
        from transformers import AutoTokenizer

        return TransformersTokenizer(AutoTokenizer.from_pretrained(where))
    except ImportError:
        hint = "with pip install 'fomoe[transformers]' its other formats load too"
        raise _refused(name, f"{_one_line(reason)}; {hint}") from None
    except (OSError, ValueError) as error:
        raise _refused(name, error) from None


def _refused(name: str, reason: object) -> DataError:
    return DataError(f"data.tokenizer {name} cannot be loaded: {_one_line(reason)}")


def _one_line(reason: object) -> str:
    text = " ".join(str(reason).split())
    return text if len(text) <= 240 else text[:237] + "..."


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-level BPE and return its `tokenizer.json`."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=False).encode()


def parse_bpe(data: bytes) -> Tokenizer:
    """Build the tokenizer that `train_bpe` returned.

    Raises:
        DataError: if the bytes, which a run's folder may have kept, are damaged.
    """
    from tokenizers import Tokenizer as Library

    try:
        return LibraryTokenizer(Library.from_str(data.decode()))
    except Exception as error:  # the library raises plain Exception for every failure
        raise DataError(f"the run's tokenizer.json is damaged: {_one_line(error)}") from None
