"""The frozen base as files: its folder, its matrices and its fingerprint (no torch).

Names and shapes come from the headers of its safetensors files, so that a dry run needs neither
torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from fomoe.errors import ConfigError
from fomoe.hints import near

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is known of a base from its files.

    Attributes:
        folder: where they lie.
        vocab_size: tokens of its embedding.
        matrices: [out, in] of every matrix, by the name of its module.
    """

    folder: Path
    vocab_size: int
    matrices: dict[str, tuple[int, int]]

    def targets(self, patterns: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """The matrices that these patterns name, in the files' order.

        Raises:
            ConfigError: naming a pattern that matches none.
        """
        found: dict[str, tuple[int, int]] = {}
        for pattern in patterns:
            own = {n: s for n, s in self.matrices.items() if _matches(n, pattern)}
            if not own:
                last = sorted({name.rpartition(".")[2] for name in self.matrices})
                like = near(pattern, last)
                more = f"did you mean {like}?" if like else f"there are {', '.join(last)}"
                rule = f"names no matrix of adapters.base; {more}"
                raise ConfigError("adapters.targets", pattern, rule)
            found |= own
        return {name: shape for name, shape in self.matrices.items() if name in found}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def read_base(name: str) -> Base:
    """The base in a folder, or in the hub's cache.

    Raises:
        ConfigError: if it is no causal model of transformers in safetensors files.
    """
    folder = _folder(name)
    stamps = tuple(
        path.stat().st_mtime_ns
        for path in (folder / "config.json", *sorted(folder.glob("*.safetensors")))
        if path.is_file()
    )
    return _read(name, folder, stamps)


def base_fingerprint(name: str) -> str:
    """sha256 of the base's settings and weights; sites compare it before they train."""
    folder = read_base(name).folder
    digest = hashlib.sha256()
    for path in (folder / "config.json", *_weight_files(name, folder)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError("adapters.base", name, "is no folder and no name on the hub")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except ImportError:
        rule = "is no folder; a name on the hub needs the extra: pip install 'fomoe[transformers]'"
        raise ConfigError("adapters.base", name, rule) from None
    except Exception as error:  # the library has no common kind of error
        reason = " ".join(str(error).split())[:200]
        rule = f"is no folder, and the hub does not give it: {reason}"
        raise ConfigError("adapters.base", name, rule) from None


@lru_cache(maxsize=8)
def _read(name: str, folder: Path, stamps: tuple[int, ...]) -> Base:
    settings = _json(name, folder / "config.json")
    vocab_size = settings.get("vocab_size") or settings.get("text_config", {}).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError("adapters.base", name, "has a config.json without vocab_size")
    matrices: dict[str, tuple[int, int]] = {}
    for path in _weight_files(name, folder):
        for tensor, entry in _header(name, path).items():
            shape = entry.get("shape", []) if isinstance(entry, dict) else []
            if tensor.endswith(".weight") and len(shape) == 2:
                matrices[tensor.removesuffix(".weight")] = (shape[0], shape[1])
    return Base(folder=folder, vocab_size=vocab_size, matrices=matrices)


def _weight_files(name: str, folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        shards = set(_json(name, folder / _INDEX).get("weight_map", {}).values())
        return [folder / shard for shard in sorted(shards)]
    raise ConfigError("adapters.base", name, f"has neither {_SINGLE} nor {_INDEX}")


def _header(name: str, path: Path) -> dict[str, Any]:
    """The names, types and shapes at the start of a safetensors file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _LONGEST_HEADER:
                raise ValueError
            return dict(json.loads(file.read(size)))
    except OSError as error:
        raise ConfigError("adapters.base", name, f"lacks {path.name}: {error.strerror}") from None
    except ValueError:
        rule = f"has a damaged file {path.name}"
        raise ConfigError("adapters.base", name, rule) from None


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        reason = f"is no model of transformers: {path.name}: {error.strerror}"
        raise ConfigError("adapters.base", name, reason) from None
    except (ValueError, TypeError):
        raise ConfigError("adapters.base", name, f"has a damaged {path.name}") from None
