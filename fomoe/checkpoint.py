"""Checkpoints: one part per site and round, written so that a torn one never passes for whole.

A part is `site-<k>.safetensors` and `site-<k>.json`; `site-<k>.manifest.json` with their sha256 is
written last. Every file is written atomically, so a crash or a full disk leaves earlier checkpoints
as they were. Sites may share the folder: each writes and removes its own parts only.

Of a site of several ranks, each rank saves its rows of every tensor: the first one under these
names and last of all, rank i as `site-<k>.rank-<i>.*`. The rows of all ranks, one after the other,
are the site's tensor, so that any number of ranks can read them again.
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
from safetensors.torch import save_file
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
_MOST_RANKS = 10**5


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
    run_dir: Path,
    round_idx: int,
    site: int,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Write one site's part, or that of one of its ranks; the manifest comes last.

    Raises:
        CheckpointError: if it cannot be written (a full disk, say); earlier ones are untouched.
    """
    folder = round_folder(run_dir, round_idx)
    tensors_name, values_name, manifest_name = _file_names(site, rank)
    try:
        # A manifest of an earlier attempt must not stay beside the files of this one.
        remove(folder / manifest_name)
        remove_temporaries(folder, _stem(site, rank))
        # Segments may share a scalar of their parameter; a file needs one copy each.
        on_cpu = {
            name: tensor.to("cpu").contiguous() if tensor.ndim else tensor.to("cpu", copy=True)
            for name, tensor in tensors.items()
        }
        write_atomically(folder / tensors_name, lambda path: save_file(on_cpu, path))
        _write_text(folder / values_name, json.dumps(values))
        files = {name: _describe(folder / name) for name in (tensors_name, values_name)}
        manifest = {"format": _FORMAT, "round": round_idx, "site": site, "files": files}
        if num_ranks > 1:
            manifest |= {"rank": rank, "ranks": num_ranks}
        _write_text(folder / manifest_name, json.dumps(manifest, indent=1))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"checkpoint of round {round_idx} could not be written to {folder}: {reason}; "
            f"earlier checkpoints are untouched"
        ) from error


def remove_manifest(run_dir: Path, round_idx: int, site: int) -> None:
    """Before the ranks of a site save a round again: what an earlier attempt left is no part."""
    remove(round_folder(run_dir, round_idx) / _file_names(site)[2])


def _stem(site: int, rank: int = 0) -> str:
    return f"site-{site}" if rank == 0 else f"site-{site}.rank-{rank}"


def _file_names(site: int, rank: int = 0) -> tuple[str, str, str]:
    """Tensors, values, manifest."""
    stem = _stem(site, rank)
    return f"{stem}.safetensors", f"{stem}.json", f"{stem}.manifest.json"


def check_part(run_dir: Path, round_idx: int, site: int) -> str:
    """Why a part cannot be used; empty if it is whole, with those of all ranks."""
    problem = _check_rank(run_dir, round_idx, site, 0, None)
    if problem:
        return problem
    num_ranks = _num_ranks(run_dir, round_idx, site)
    for rank in range(1, num_ranks):
        if problem := _check_rank(run_dir, round_idx, site, rank, num_ranks):
            return problem
    return ""


def _check_rank(run_dir: Path, round_idx: int, site: int, rank: int, num_ranks: int | None) -> str:
    """What is wrong with one rank's files; `num_ranks` is that of the first rank's manifest."""
    folder = round_folder(run_dir, round_idx)
    *names, name = _file_names(site, rank)
    try:
        manifest = read_json(folder / name)
        if manifest["format"] != _FORMAT:
            return f"has format {manifest['format']!r}, not {_FORMAT}"
        if (manifest["round"], manifest["site"]) != (round_idx, site):
            return f"its manifest is of round {manifest['round']!r}, site {manifest['site']!r}"
        if (own := manifest.get("ranks", 1)) != (num_ranks or own) or type(own) is not int:
            return f"{name} is of {own!r} ranks, not {num_ranks}"
        if set(manifest["files"]) != set(names):
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


def _num_ranks(run_dir: Path, round_idx: int, site: int) -> int:
    """How many ranks saved a site's part; 1 if its manifest does not say."""
    try:
        found = read_json(round_folder(run_dir, round_idx) / _file_names(site)[2]).get("ranks", 1)
    except (OSError, ValueError, AttributeError):
        return 1
    return found if type(found) is int and 1 <= found <= _MOST_RANKS else 1


class Part:
    """One site's part, whose tensors are read one at a time, wholly or some rows of them.

    It stays readable where a live run removes its files.

    Args:
        check: compare its hash now; else at the first tensor that is read.
        checked: its hash has been compared.

    Attributes:
        values: its small values.
        num_ranks: how many ranks saved it.
        kept: an empty tensor on the meta device for each tensor, by name: its shape and type.

    Raises:
        CheckpointError: if it is missing, torn, altered or not readable.
    """

    def __init__(
        self, run_dir: Path, round_idx: int, site: int, *, check: bool = True, checked: bool = False
    ) -> None:
        self.num_ranks = _num_ranks(run_dir, round_idx, site)
        folder = round_folder(run_dir, round_idx)
        paths = [folder / _file_names(site, rank)[0] for rank in range(self.num_ranks)]
        self._path, self._site = paths[0], site
        self._problem = partial(check_part, run_dir, round_idx, site)
        self._checked = checked
        try:
            # Before the check: what was checked is then what is read.
            self._files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        except _UNREADABLE:
            self._files = []  # the check says more
        if (check and not checked) or not self._files:
            self._check()
        self.values = read_values(run_dir, round_idx, site)
        try:
            self._held: dict[str, list[tuple[Any, int]]] = {}  # files with the name, and their rows
            self.kept: dict[str, Tensor] = {}
            for file in self._files:
                for name in file.keys():  # noqa: SIM118, it is not a mapping
                    self._add(file, name)
        except (*_UNREADABLE, AttributeError) as error:
            raise _not_readable(self._path, site, error) from None

    def _add(self, file: Any, name: str) -> None:
        own = file.get_slice(name)
        shape, dtype = tuple(own.get_shape()), _DTYPES[own.get_dtype()]
        before = self.kept.get(name)
        if before is not None and shape:
            if (shape[1:], dtype) != (tuple(before.shape[1:]), before.dtype):
                raise ValueError(f"{name} has other shapes at other ranks")
            shape = (len(before) + shape[0], *shape[1:])
        self.kept[name] = torch.empty(shape, dtype=dtype, device="meta")
        self._held.setdefault(name, []).append((file, own.get_shape()[0] if shape else 0))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, on the CPU; of a tensor that is no scalar, these rows, or all."""
        if not self._checked:
            self._check()
        try:
            held = self._held[name]
            if rows is None or not self.kept[name].ndim:
                whole = [file.get_tensor(name) for file, _ in held]
                return whole[0] if len(held) == 1 or not whole[0].ndim else torch.cat(whole)
            found, first = [], 0
            for file, count in held:
                low, high = max(rows[0] - first, 0), min(rows[1] - first, count)
                if low < high:
                    found.append(file.get_slice(name)[low:high])
                first += count
            return found[0] if len(found) == 1 else torch.cat(found)
        except _UNREADABLE as error:
            raise _not_readable(self._path, self._site, error) from None

    def read_of_rank(self, name: str, rank: int) -> Tensor:
        """What one rank saved under a name that all ranks have."""
        counts = [count for _, count in self._held[name]]
        return self.read(name, (sum(counts[:rank]), sum(counts[: rank + 1])))

    def _check(self) -> None:
        if problem := self._problem():
            raise CheckpointError(f"checkpoint {self._path.parent}, site {self._site}: {problem}")
        self._checked = True


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
    folder, start = round_folder(run_dir, round_idx), f"{_stem(site)}."
    return any(name.startswith(start) for name in listing(folder))


def has_manifest(run_dir: Path, round_idx: int, site: int) -> bool:
    """Whether a part was saved to the end; it is not checked whether it is still whole."""
    return os.path.lexists(round_folder(run_dir, round_idx) / _file_names(site)[2])


def remove_old(run_dir: Path, newest: int, keep: int, sites: Iterable[int]) -> None:
    """Remove the parts of these sites that are older than the `keep` newest rounds."""
    old = [round_idx for round_idx in saved_rounds(run_dir) if round_idx <= newest][keep:]
    for round_idx in old:
        remove_parts(run_dir, round_idx, sites)


def remove_parts(run_dir: Path, round_idx: int, sites: Iterable[int]) -> None:
    """Remove these sites' parts of a round, manifests first, and the folder once it is empty."""
    folder = round_folder(run_dir, round_idx)
    for site in sites:
        *names, manifest = _file_names(site)
        others = [n for n in listing(folder) if n.startswith(f"{_stem(site)}.rank-")]
        for name in (manifest, *names, *others):
            remove(folder / name)
        remove_temporaries(folder, _stem(site))
    remove_if_empty(folder)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}
