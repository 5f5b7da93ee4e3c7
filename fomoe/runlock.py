"""One run per folder: a lock that dies with its process.

Every process of a run holds a shared `flock` on `run.lock` in the folder for as long as it lives;
the kernel drops it when the process ends, however it ends. The last line of the file names the run
that holds it: processes of that run are let in, another run is refused. Readers take no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fomoe.errors import CheckpointError
from fomoe.files import remove, remove_if_empty

LOCK_NAME = "run.lock"
PATIENCE_S = 2.0  # a process that was just killed may need a moment to end
_PAUSE_S = 0.02
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class FolderInUseError(CheckpointError):
    """Another run is alive in the folder."""


@dataclass
class RunLock:
    """A run's lock on its folder.

    Attributes:
        run_dir: the folder.
        held: false where the file system has no locks.
        run_id: names this start of the run; equal at all sites.
        began: whether the run has begun to write; a start that is refused before that leaves the
            folder as it was.
    """

    run_dir: Path
    held: bool
    run_id: str = ""
    began: bool = False
    _descriptor: int = field(default=-1, repr=False)

    def release(self) -> None:
        """Release the lock.

        The run's last process removes the lock file, and the folder if the run made it and left it
        empty.
        """
        if not self.held:
            return
        descriptor, path = self._descriptor, self.run_dir / LOCK_NAME
        self.held = False
        # The run has ended, so a lock file that remains does no harm.
        with suppress(OSError):
            if _lock(descriptor, fcntl.LOCK_EX) and _is_named(descriptor, path):
                earlier, _, own = _read(descriptor).rpartition(b"\n")
                if earlier and not self.began:  # of a run that was killed
                    os.ftruncate(descriptor, len(earlier))
                else:
                    remove(path)
                if _parse(own).get("made"):
                    remove_if_empty(self.run_dir)
        os.close(descriptor)


def lock_folder(run_dir: Path, run_id: str, *, patience_s: float | None = None) -> RunLock:
    """Make the folder and lock it for a run; other processes of the run may have done so already.

    Raises:
        FolderInUseError: if another run is alive in it, naming that run.
        CheckpointError: if the folder or the lock file cannot be made.
    """
    path = run_dir / LOCK_NAME
    end = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    made = _make_folder(run_dir)
    while True:
        try:
            lock = _try(path, run_id, made)
        except OSError as error:
            if made:
                remove_if_empty(run_dir)
            raise CheckpointError(f"{path} cannot be locked: {error.strerror}") from None
        if lock is not None:
            return lock
        if time.monotonic() >= end:
            raise FolderInUseError(
                f"run.dir {run_dir} is in use by {_holder(path)}; stop that run first, or take "
                f"another folder (--next-free)"
            )
        time.sleep(_PAUSE_S)
        made |= _make_folder(run_dir)  # its last run may have removed it meanwhile


def _try(path: Path, run_id: str, made: bool) -> RunLock | None:
    """One attempt; None if another run holds the folder, or the lock file changed meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the folder's last run has just removed it
        return None
    kept = False
    try:
        if _lock(descriptor, fcntl.LOCK_EX):  # no process holds the folder
            if not _is_named(descriptor, path):
                return None
            _add_line(descriptor, path, run_id, made)
        elif not _names(descriptor, run_id):
            return None
        # From exclusive to shared is not one step: another run may come between, so check again.
        shared = _lock(descriptor, fcntl.LOCK_SH)
        kept = shared and _is_named(descriptor, path) and _names(descriptor, run_id)
        return RunLock(path.parent, held=True, _descriptor=descriptor) if kept else None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not os.fstat(descriptor).st_size:
            remove(path)
        return RunLock(path.parent, held=False)
    finally:
        if not kept:
            os.close(descriptor)


def _make_folder(run_dir: Path) -> bool:
    """Make the folder; true if it was not there."""
    try:
        if run_dir.is_dir():
            return False
        run_dir.mkdir(parents=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and Path(error.filename) == run_dir:
            # Another run has made it; if it has removed it again, the lock cannot be opened and
            # the caller comes back.
            if run_dir.is_dir() or not os.path.lexists(run_dir):
                return False
            if run_dir.exists():
                raise CheckpointError(f"run.dir {run_dir} is a file, not a folder") from None
        raise CheckpointError(f"run.dir {run_dir} cannot be made: {error.strerror}") from None
    return True


def _lock(descriptor: int, kind: int) -> bool:
    """Take the lock or change its kind at once; false if another process holds it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`, and not one that was removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _add_line(descriptor: int, path: Path, run_id: str, made: bool) -> None:
    """Add a line that names the run; a killed run's line is kept until this run begins."""
    host = socket.gethostname()
    line = json.dumps({"run": run_id, "host": host, "pid": os.getpid(), "made": made})
    size = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        os.write(descriptor, f"\n{line}".encode() if size else line.encode())
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        if not size:
            remove(path)
        raise


def _names(descriptor: int, run_id: str) -> bool:
    return _last(_read(descriptor)).get("run") == run_id


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, 1 << 20, 0)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _last(content: bytes) -> dict[str, Any]:
    return _parse(content.rpartition(b"\n")[2])


def _holder(path: Path) -> str:
    """The run that a lock file names, in words."""
    try:
        found = _last(path.read_bytes())
        return f"run {found['run']} (process {found['pid']} on {found['host']})"
    except (OSError, KeyError):
        return "another run"
