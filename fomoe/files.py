"""Files in a folder that several processes write, read and prune at once.

A file goes to a temporary name of its own process, is flushed to disk and then renamed, so that a
reader sees the old file or the new one, and a crash or a full disk leaves the old one. Peers make,
list and remove folders at the same time: "already gone" and "not empty yet" are normal here.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fomoe.errors import CheckpointError

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)
_ATTEMPTS = 100


def listing(folder: Path) -> list[str]:
    """Names in a folder, sorted; none if it does not exist (any more)."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        if error.errno in _GONE:
            return []
        raise


def remove(path: Path) -> None:
    """Remove a file, or the folder of a temporary one; a peer may have removed it first."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError as error:
        if error.errno not in _GONE:
            raise


def remove_if_empty(folder: Path) -> None:
    """Remove a folder unless something is in it; a peer may remove it or fill it meanwhile."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in _GONE + _NOT_EMPTY:
            raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one.

    Raises:
        CheckpointError: naming the file, if it cannot be written.
    """
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> CheckpointError:
    """An error that names the file; the system's own error for a full disk does not."""
    reason = error.strerror or error
    return CheckpointError(f"{path} cannot be written: {reason}; checkpoints are kept")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write through a temporary name: flush, rename, flush the folder, which is made if missing.

    Raises:
        OSError: if it cannot be written; what was there is untouched.
    """
    # A folder of its own, since libraries make temporary files beside the one they write.
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _make(own)
        write(own / path.name)
        _flush(own / path.name)
        os.replace(own / path.name, path)
        _flush(path.parent)
    finally:
        remove(own)


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed processes left of temporary files whose names begin with `name`.

    Only the process that writes these files may call it.
    """
    for found in listing(folder):
        if found.startswith(f".{name}.") and found.endswith(".tmp"):
            remove(folder / found)


def _make(folder: Path) -> None:
    """Make a folder and those above it, which a peer may remove while they are still empty."""
    for attempt in range(_ATTEMPTS):
        try:
            return folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE) or attempt == _ATTEMPTS - 1:
                raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
