"""Sources: where text and tokens come from.

A source is `python-stdlib`, a file or glob of text, a file or glob of token shards (`*.bin` in
llm.c's layout, `*.npy`), or `hf:NAME[:CONFIG]`, a hub data set that is streamed.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.errors import DataError

STDLIB = "python-stdlib"
HUB = "hf:"

# Folders of the standard library that hold tests and generated or third-party code.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
# A source of few files is cut, so that a held-out part and one part per site can be made of it.
_FEW_FILES = 32
_FEW_PIECES, _PIECE_CHARACTERS = 64, (256, 16_384)
# llm.c writes 256 int32: a magic number that fixes the token's width, a version, the token count.
_BIN_HEADER = 256
_BIN_DTYPES = {20240520: np.uint16, 20240801: np.uint32}


@dataclass(frozen=True)
class Document:
    """A piece of text that goes whole to one side of the split."""

    text: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()


def read_documents(source: str) -> list[Document]:
    """Read a text source; few files are cut into pieces at line ends.

    Raises:
        DataError: if nothing is there, or it cannot be read.
    """
    paths = _stdlib_files() if source == STDLIB else _match(source)
    texts = [_read_text(path) for path in paths]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"data source {source} holds no text")
    if len(texts) < _FEW_FILES:
        smallest, largest = _PIECE_CHARACTERS
        size = max(smallest, min(largest, sum(map(len, texts)) // _FEW_PIECES))
        texts = [piece for text in texts for piece in _cut(text, size)]
    return [Document(text) for text in texts]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _STDLIB_LEFT_OUT & set(path.relative_to(root).parts[:-1])
    )
    if not files:
        raise DataError(f"data source {STDLIB}: no .py files under {root}")
    return files


def _match(source: str) -> list[Path]:
    matches = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    paths = [path for path in matches if path.is_file()]
    if not paths:
        what = "is a folder; name its files, as in FOLDER/*.txt" if matches else "does not exist"
        raise DataError(f"data source {source} {what}")
    return paths


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"data source {path} cannot be read: {error.strerror}") from None


def _cut(text: str, size: int) -> Iterator[str]:
    """Cut at the line end nearest below each multiple of the piece size; long lines are cut too."""
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            newline = text.rfind("\n", start, stop)
            stop = newline + 1 if newline > start else stop
        yield text[start:stop]
        start = stop


# ------------------------------------------------------------------------------------ token shards


def is_shards(source: str) -> bool:
    return source.endswith((".bin", ".npy"))


def open_shards(source: str) -> list[np.ndarray]:
    """Memory-map token shards as flat integer arrays.

    Raises:
        DataError: if a file is missing, is no shard, or is shorter than its header says.
    """
    return [
        _open_bin(path) if path.suffix == ".bin" else _open_npy(path) for path in _match(source)
    ]


def _open_bin(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=_BIN_HEADER)
    if len(header) < _BIN_HEADER or int(header[0]) not in _BIN_DTYPES:
        raise DataError(f"token shard {path} has no known .bin header")
    dtype = np.dtype(_BIN_DTYPES[int(header[0])]).newbyteorder("<")
    count, offset = int(header[2]), 4 * _BIN_HEADER
    if count < 0:
        raise DataError(f"token shard {path} has a damaged header ({count} tokens)")
    if path.stat().st_size < offset + count * dtype.itemsize:
        raise DataError(f"token shard {path} is shorter than the {count} tokens of its header")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _open_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"token shard {path} cannot be read: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"token shard {path} must be a flat integer array, not {array.dtype}")
    return array


def shard_digest(array: np.ndarray) -> bytes:
    """Digest of a shard's length and its two ends; whole shards may be too large to read."""
    ends = [np.ascontiguousarray(end).tobytes() for end in (array[:500_000], array[-500_000:])]
    return hashlib.sha256(str((len(array), array.dtype.str)).encode() + b"".join(ends)).digest()


# -------------------------------------------------------------------------------------------- hub


def is_hub(source: str) -> bool:
    return source.startswith(HUB)


def hub_rows(dataset: Any, source: str) -> Iterator[dict[str, Any]]:
    """Rows of an opened hub data set.

    Raises:
        DataError: if one cannot be read.
    """
    try:
        yield from dataset
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data source {source} cannot be read: {reason}") from None


def hub_library(source: str) -> Any:
    """The library that reads a hub data set.

    Raises:
        DataError: if the `hub` extra is missing.
    """
    try:
        return import_module("datasets")
    except ImportError:
        raise DataError(
            f"data source {source} needs the datasets library: pip install 'fomoe[hub]'"
        ) from None


def open_hub(source: str, split: str) -> Any:
    """Open a hub data set for streaming; `hf:NAME`, `hf:NAME:CONFIG` or `hf:` and a local folder.

    Raises:
        DataError: if the `hub` extra is missing or the data set cannot be opened.
    """
    datasets = hub_library(source)
    name, _, subset = source.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data source {source} cannot be opened: {reason}") from None
