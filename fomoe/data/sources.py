"""Sources: where text and tokens come from; docs/data.md describes them.

A source is `python-stdlib`, a file or glob of text or JSON Lines, `package:NAME/GLOB` (files of an
installed package), a file or glob of token shards (`*.bin` in llm.c's layout, `*.npy`), or
`hf:NAME[:CONFIG]`, a hub data set that is streamed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.errors import DataError
from fomoe.textfile import TextError, read_text, why_no_file

STDLIB = "python-stdlib"
HUB = "hf:"
PACKAGE = "package:"

# Folders of the standard library that hold tests and generated or third-party code.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_JSON_LINES = (".jsonl", ".ndjson")
_RECORDS = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".feather", ".orc", ".avro")
# A source of few documents is cut, so that a held-out part and one part per site can be made of it.
_FEW_DOCUMENTS = 32
_FEW_PIECES, _PIECE_CHARACTERS = 64, (256, 16_384)
# llm.c writes 256 int32: a magic number that fixes the token's width, a version, the token count.
_BIN_HEADER = 256
_BIN_DTYPES = {20240520: np.uint16, 20240801: np.uint32}


@dataclass(frozen=True)
class Document:
    """A piece of text that the split does not divide."""

    text: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()


def read_documents(source: str, *, text_field: str = "text") -> list[Document]:
    """Read a text source; few documents are cut into pieces at line ends.

    Args:
        text_field: the field of JSON Lines that holds the text.

    Raises:
        DataError: if there is no text, or it cannot be read as text.
    """
    texts = []
    for path in find_files(source):
        if _suffix(path) in _JSON_LINES:
            texts += _read_json_lines(path, text_field)
        else:
            texts.append(_read(path))
    whole = [text for text in texts if text.strip()]
    if not whole:
        what = "it is empty" if not any(texts) else "it has white space only"
        raise DataError(f"data source {source} holds no text: {what}")
    if len(whole) < _FEW_DOCUMENTS:
        smallest, largest = _PIECE_CHARACTERS
        size = max(smallest, min(largest, sum(map(len, whole)) // _FEW_PIECES))
        whole = [piece for text in whole for piece in _cut(text, size)]
    return [Document(text) for text in whole]


def check_source(source: str) -> None:
    """Refuse a source that does not exist, without reading its text or using the network.

    Raises:
        DataError: with the message that reading it would give.
    """
    if is_hub(source):
        hub_library(source)
    elif is_shards(source):
        open_shards(source)
    else:
        find_files(source)


def find_files(source: str) -> list[Path]:
    """Files of a source of text or token shards, without reading them.

    The name of an existing file is used as it is, whatever characters it contains. Any other name
    is a pattern: folders that it matches are skipped, and a file counts once, however many links
    lead to it.

    Raises:
        DataError: if there are none, or one cannot be read as text by its kind or name.
    """
    if source == STDLIB:
        return _stdlib_files()
    if source.startswith(PACKAGE):
        return find_files(_in_package(source))
    home = os.path.expanduser(source)
    named = next((name for name in (source, home) if os.path.lexists(name)), None)
    names = [named] if named is not None else glob.glob(home, recursive=True)
    files: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        real = os.path.realpath(name)
        if real in files:
            continue
        # A link to a parent folder gives ever longer names, until one no longer opens.
        problem = why_no_file(real if os.path.exists(real) else name)
        if problem == "is a folder" and named is None:
            continue
        _check(Path(name), problem)
        files[real] = name
    if not files:
        raise DataError(f"data source {source} {_why_nothing(home, names)}")
    return [Path(name) for name in sorted(files.values())]


def _in_package(source: str) -> str:
    """The pattern of files in an installed package's folder, which is not imported."""
    name, _, pattern = source.removeprefix(PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders or not pattern:
        rule = f"names no folder of an installed package ({PACKAGE}NAME/GLOB)"
        raise DataError(f"data source {source} {rule}")
    return os.path.join(glob.escape(folders[0]), pattern)


def _check(path: Path, problem: str) -> None:
    if problem == "is a folder":
        problem += "; name its files, as in FOLDER/*.txt"
    if not problem and _suffix(path) in _RECORDS:
        problem = (
            "holds records, not text: write the texts as JSON Lines (*.jsonl; data.text_field "
            "names the field), or name its folder as hf:FOLDER"
        )
    if problem:
        raise DataError(f"data source {path} {problem}")


def _why_nothing(pattern: str, matches: list[str]) -> str:
    if matches:
        return "matches folders only; name their files, as in FOLDER/*.txt"
    problem = why_no_file(pattern)
    if glob.has_magic(pattern) and problem == "does not exist":
        return "does not exist, and as a pattern it matches nothing"
    return problem or "does not exist"


def _suffix(path: Path) -> str:
    """The suffix that says what a file holds; `.gz` is passed over."""
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


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


def _read(path: Path, *, keep_newlines: bool = False) -> str:
    try:
        return read_text(path, keep_newlines=keep_newlines)
    except TextError as error:
        raise DataError(f"data source {path} {error}") from None


def _read_json_lines(path: Path, field: str) -> list[str]:
    """The text of every line; a line without text in the field is refused, none is left out."""
    texts = []
    for number, line in enumerate(_read(path, keep_newlines=True).split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(_field_of(line, field))
        except ValueError as error:
            raise DataError(f"data source {path}, line {number}: {error}") from None
    return texts


def _field_of(line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    if field not in row:
        raise ValueError(f"has no field {field} (data.text_field); its fields are {sorted(row)}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field} (data.text_field) is {json.dumps(text)[:40]}, not text")
    if "\0" in text:
        raise ValueError(f"field {field} holds a NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field} holds half of a surrogate pair") from None
    return text


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
        _open_bin(path) if path.suffix == ".bin" else _open_npy(path) for path in find_files(source)
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
    name, _, subset = os.path.expanduser(source.removeprefix(HUB)).partition(":")
    if os.path.isdir(name):
        name = os.path.abspath(name)  # the library has modules of its own named csv, json, text
    try:
        return datasets.load_dataset(name, subset or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data source {source} cannot be opened: {reason}") from None
