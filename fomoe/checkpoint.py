"""Checkpoints: one part per site and round, written so that a torn one never passes for whole.

A part is `site-<k>.safetensors` and `site-<k>.json`; `site-<k>.manifest.json` with their sha256 is
written last. Every file is written atomically, so a crash or a full disk leaves earlier checkpoints
as they were. Sites may share the folder: each writes and removes its own parts only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe.errors import CheckpointError
from fomoe.files import (
    listing,
    remove,
    remove_if_empty,
    remove_temporaries,
    write_atomically,
)

_FORMAT = 1
_ROUND = "round-"


def round_folder(run_dir: Path, round_idx: int) -> Path:
    """Folder of the checkpoint taken after `round_idx` rounds."""
    return run_dir / "checkpoints" / f"{_ROUND}{round_idx:06d}"


def saved_rounds(run_dir: Path) -> list[int]:
    """Rounds that have a checkpoint folder, newest first; they may not be whole.

    Raises:
        CheckpointError: if the folder exists but cannot be listed: that is not the same as none.
    """
    folder = run_dir / "checkpoints"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        if not run_dir.is_dir():
            return []
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None
    numbers = [name.removeprefix(_ROUND) for name in names if name.startswith(_ROUND)]
    rounds = [int(number) for number in numbers if number.isascii() and number.isdigit()]
    return sorted((r for r in rounds if round_folder(run_dir, r).name in names), reverse=True)


def all_parts(run_dir: Path) -> list[Path]:
    """Every file of every part, whole or not, of all sites."""
    folders = [round_folder(run_dir, round_idx) for round_idx in saved_rounds(run_dir)]
    return [
        folder / name
        for folder in folders
        for name in listing(folder)
        if name.startswith(("site-", ".site-"))
    ]


def save_part(
    run_dir: Path, round_idx: int, site: int, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Write one site's part; the manifest comes last.

    Raises:
        CheckpointError: if it cannot be written (a full disk, say); earlier ones are untouched.
    """
    folder = round_folder(run_dir, round_idx)
    tensors_name, values_name = _file_names(site)
    try:
        # A manifest of an earlier attempt must not stay beside the files of this one.
        remove(folder / f"site-{site}.manifest.json")
        remove_temporaries(folder, f"site-{site}")
        # Segments may share a scalar of their parameter; a file needs one copy each.
        on_cpu = {
            name: tensor.to("cpu").contiguous() if tensor.ndim else tensor.to("cpu", copy=True)
            for name, tensor in tensors.items()
        }
        write_atomically(folder / tensors_name, lambda path: save_file(on_cpu, path))
        _write_text(folder / values_name, json.dumps(values))
        files = {name: _describe(folder / name) for name in _file_names(site)}
        manifest = {"format": _FORMAT, "round": round_idx, "site": site, "files": files}
        _write_text(folder / f"site-{site}.manifest.json", json.dumps(manifest, indent=1))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"checkpoint of round {round_idx} could not be written to {folder}: {reason}; "
            f"earlier checkpoints are untouched"
        ) from error


def _file_names(site: int) -> tuple[str, str]:
    return f"site-{site}.safetensors", f"site-{site}.json"


def check_part(run_dir: Path, round_idx: int, site: int) -> str:
    """Why a part cannot be used; empty if it is whole."""
    folder = round_folder(run_dir, round_idx)
    name = f"site-{site}.manifest.json"
    try:
        manifest = read_json(folder / name)
        if manifest["format"] != _FORMAT:
            return f"has format {manifest['format']!r}, not {_FORMAT}"
        if (manifest["round"], manifest["site"]) != (round_idx, site):
            return f"its manifest is of round {manifest['round']!r}, site {manifest['site']!r}"
        if set(manifest["files"]) != set(_file_names(site)):
            return "its manifest does not name its files"
        for name, expected in manifest["files"].items():
            if _describe(folder / name) != expected:
                return f"{name} is torn or was altered (its sha256 differs from the manifest)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is not readable"
    return ""


class Part:
    """One site's part, whose tensors are read one at a time.

    It stays readable where a live run removes its files.

    Args:
        check: compare its hash now; else at the first tensor that is read.

    Attributes:
        values: its small values.
        kept: an empty tensor on the meta device for each tensor, by name: its shape and type.

    Raises:
        CheckpointError: if it is missing, torn, altered or not readable.
    """

    def __init__(self, run_dir: Path, round_idx: int, site: int, *, check: bool = True) -> None:
        self._path, self._site = round_folder(run_dir, round_idx) / _file_names(site)[0], site
        self._problem = partial(check_part, run_dir, round_idx, site)
        self._checked = False
        try:
            # Before the check: what was checked is then what is read.
            self._file: Any = safe_open(self._path, framework="pt") if self._path.exists() else None
        except _UNREADABLE:
            self._file = None  # the check says more
        if check or self._file is None:
            self._check()
        self.values = read_values(run_dir, round_idx, site)
        try:
            names = self._file.keys()
            slices = {name: self._file.get_slice(name) for name in names}
            self.kept = {
                name: torch.empty(own.get_shape(), dtype=_DTYPES[own.get_dtype()], device="meta")
                for name, own in slices.items()
            }
        except (*_UNREADABLE, AttributeError) as error:
            raise _not_readable(self._path, site, error) from None

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if not self._checked:
            self._check()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except _UNREADABLE as error:
            raise _not_readable(self._path, self._site, error) from None
        return tensor

    def _check(self) -> None:
        if problem := self._problem():
            raise CheckpointError(f"checkpoint {self._path.parent}, site {self._site}: {problem}")
        self._checked = True


def read_tensors(run_dir: Path, round_idx: int, site: int) -> dict[str, Tensor]:
    """The tensors of a part, on the CPU; it is not checked whether the part is whole.

    Raises:
        CheckpointError: if the file is not a readable safetensors file.
    """
    path = round_folder(run_dir, round_idx) / _file_names(site)[0]
    try:
        return load_file(path)
    except _UNREADABLE as error:
        raise _not_readable(path, site, error) from None


def read_values(run_dir: Path, round_idx: int, site: int) -> dict[str, Any]:
    """The small values of a part, with its `config`; it is not checked whether the part is whole.

    Raises:
        CheckpointError: if the file is not a readable mapping with a config.
    """
    path = round_folder(run_dir, round_idx) / _file_names(site)[1]
    try:
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise ValueError("it holds no config")
    except _UNREADABLE as error:
        raise _not_readable(path, site, error) from None
    return values


_DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
# Errors that the readers of JSON and of safetensors raise for a damaged file.
_UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError)


def _not_readable(path: Path, site: int, error: Exception) -> CheckpointError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
    return CheckpointError(f"checkpoint {path.parent}, site {site}: {path.name}: {reason}")


def read_json(path: Path) -> Any:
    """Read a small JSON file; damaged text of any kind raises ValueError."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def has_part(run_dir: Path, round_idx: int, site: int) -> bool:
    """Whether any file of a site's part exists, whole or not."""
    names = (*_file_names(site), f"site-{site}.manifest.json")
    return any(os.path.lexists(round_folder(run_dir, round_idx) / name) for name in names)


def has_manifest(run_dir: Path, round_idx: int, site: int) -> bool:
    """Whether a part was saved to the end; it is not checked whether it is still whole."""
    return os.path.lexists(round_folder(run_dir, round_idx) / f"site-{site}.manifest.json")


def remove_old(run_dir: Path, newest: int, keep: int, sites: Iterable[int]) -> None:
    """Remove the parts of these sites that are older than the `keep` newest rounds."""
    old = [round_idx for round_idx in saved_rounds(run_dir) if round_idx <= newest][keep:]
    for round_idx in old:
        remove_parts(run_dir, round_idx, sites)


def remove_parts(run_dir: Path, round_idx: int, sites: Iterable[int]) -> None:
    """Remove these sites' parts of a round, manifests first, and the folder once it is empty."""
    folder = round_folder(run_dir, round_idx)
    for site in sites:
        for name in (f"site-{site}.manifest.json", *_file_names(site)):
            remove(folder / name)
        remove_temporaries(folder, f"site-{site}")
    remove_if_empty(folder)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}
