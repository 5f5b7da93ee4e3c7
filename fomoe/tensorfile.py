"""A safetensors file written one tensor at a time, so that no more than one is in memory.

The format is a length, a JSON header with every tensor's type, shape and place, and the values
(https://github.com/huggingface/safetensors#format). The library's own writer wants all values at
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fomoe.files import write_atomically

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_ALIGNMENT = 8  # bytes; of the header's end


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to write: its name and shape, its type in the file, and how its values are read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; equal tensors in equal order give equal bytes.

    Raises:
        OSError: if it cannot be written; what was there is untouched.
    """
    write_atomically(path, lambda temporary: _write(temporary, entries, metadata))


def _write(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            tensor = entry.read().to(entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name} is {list(tensor.shape)}"
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def in_shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Cut a list into files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
