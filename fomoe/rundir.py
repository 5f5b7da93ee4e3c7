"""The run's folder and what the sites must agree on before they start."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fomoe import __version__, checkpoint
from fomoe.config import Config
from fomoe.data.dataset import Data
from fomoe.errors import CheckpointError, SiteMismatchError, say_line
from fomoe.files import (
    listing,
    remove,
    remove_if_empty,
    remove_temporaries,
    write_text_atomically,
)
from fomoe.overrides import flatten
from fomoe.runlock import LOCK_NAME, FolderInUseError, RunLock, lock_folder
from fomoe.sync.exchange import agreed, check_sites, gather, share
from fomoe.sync.transport import Transport

T = TypeVar("T")

# Settings of `run` that decide when sites exchange; the rest of `run` may differ between them.
_RUN_TOGETHER = ("checkpoint_every", "eval_every", "eval_merged_every")
# What a run writes beside its checkpoints, and the temporary names of the same files.
_TEMPORARY = r"(\.[0-9a-f]{8}\.tmp)?"
_IS_RECORD = re.compile(
    rf"\.?(config\.yaml|summary\.json|metrics(\.site\d+)?\.jsonl){_TEMPORARY}"
).fullmatch
_IS_TOKENIZER = re.compile(rf"\.?tokenizer\.json{_TEMPORARY}").fullmatch


def compare_configs(config: Config, transport: Transport, mode: str) -> None:
    """Refuse sites that were started with another config, version or mode.

    Raises:
        SiteMismatchError: naming the site, the fields and their values.
    """
    together = {f"run.{name}": getattr(config.run, name) for name in _RUN_TOGETHER}
    own = flatten(config.model_dump(mode="json", exclude={"run"})) | together
    own |= {"fomoe version": __version__, "the mode of starting": mode}
    _compare({"config hash": config.fingerprint(), **own}, transport)


def compare_fingerprints(fingerprints: dict[str, str], transport: Transport) -> None:
    """Refuse sites whose tokenizer, data split or held-out part differs.

    Raises:
        SiteMismatchError: naming the site and what differs.
    """
    _compare(fingerprints, transport)


def _compare(own: dict[str, Any], transport: Transport) -> None:
    message = json.dumps(own).encode()
    first_rank = transport.inside.gather(message)[0]
    check_sites(
        transport,
        lambda _: "" if message == first_rank else _between_ranks(own, json.loads(first_rank)),
        SiteMismatchError,
    )
    messages = gather(transport, lambda _: message)
    everyone = [json.loads(message) for message in messages]
    first = everyone[0]
    problems = []
    for site, other in zip(transport.members, everyone, strict=True):
        if fields := _fields(other, first):
            problems.append(f"site {site} differs from site {transport.members[0]} in {fields}")
    if problems:
        raise SiteMismatchError("; ".join(problems))


def _between_ranks(own: dict[str, Any], first: dict[str, Any]) -> str:
    return f"differs from the site's first rank in {_fields(own, first)}"


def _fields(other: dict[str, Any], first: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} ({_shown(other.get(name))}, not {_shown(first.get(name))})"
        for name in {**first, **other}
        if other.get(name) != first.get(name)
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else text


# ------------------------------------------------------------------------------------- the folder


@contextmanager
def claim_run_dir(
    config: Config, transport: Transport, mode: str
) -> Iterator[tuple[Config, RunLock]]:
    """Lock the run's folder for `mode`; it is made, and nothing in it is changed yet.

    Sites may share one folder or have folders of their own, on machines of their own.

    Yields:
        The config with the folder that is used, and the lock on it.

    Raises:
        CheckpointError: if a run is there and the mode is `new`, or if another run is alive in it.
    """
    assert config.run.dir is not None  # the command line gives one
    wanted = Path(config.run.dir)
    run_id = share(transport, lambda: secrets.token_hex(4).encode()).decode()
    if mode == "next-free":
        lock = _lock_next_free(wanted, run_id, transport)
    else:
        if mode == "new":  # before anything is made; if it has a lock file, the run may be alive
            agreed(transport, lambda: None if _has_lock(wanted) else _refuse_existing(wanted))
        found = _lock_in_turn(lambda: lock_folder(wanted, run_id), transport)
        assert found is not None
        lock = found
    try:
        if mode == "new":  # again: a run may just have ended there
            agreed(transport, lambda: _refuse_existing(wanted))
        if not lock.held and transport.inside.rank == 0:
            text = "is on a file system without locks: nothing keeps a second run out of it"
            say_line(f"run.dir {lock.run_dir} {text}")
        lock.run_id = run_id
        settings = config.run.model_copy(update={"dir": str(lock.run_dir)})
        yield config.model_copy(update={"run": settings}), lock
    finally:
        lock.release()


def _lock_in_turn(take: Callable[[], RunLock | None], transport: Transport) -> RunLock | None:
    """Take the lock at the first site, then at the others; no site keeps it if one gets None.

    Of two runs that start at once in the same folders, the first sites decide which one continues.
    """
    lock: RunLock | None = None
    inside = transport.inside

    def enter(turn: bool) -> None:
        nonlocal lock
        if turn and inside.rank == 0:  # it locks for all ranks of its site
            lock = take()

    first = transport.members[0] in transport.sites
    try:
        agreed(transport, lambda: enter(first))
        agreed(transport, lambda: enter(not first))
        folder = inside.gather(b"" if lock is None else str(lock.run_dir).encode())[0]
        if inside.rank and folder:
            lock = RunLock(Path(folder.decode()), held=False)
        everywhere = all(gather(transport, lambda _: b"held" if lock else b""))
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    if lock is not None and not everywhere:
        lock.release()
    return lock if everywhere else None


def _lock_next_free(wanted: Path, run_id: str, transport: Transport) -> RunLock:
    """Take `wanted`, or `wanted-2`, `-3`, ...: the first that is empty at every site."""
    folder, number = wanted, 1
    while True:
        take = partial(_lock_if_free, folder, run_id)
        lock = _lock_in_turn(take, transport)
        if lock is not None:
            return lock
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")


def _lock_if_free(folder: Path, run_id: str) -> RunLock | None:
    """None if the folder is not empty, or another run uses it."""
    if not _is_free(folder):
        return None
    try:
        lock = lock_folder(folder, run_id, patience_s=0)
    except FolderInUseError:
        return None
    if _is_free(folder):
        return lock
    lock.release()
    return None


def _has_lock(folder: Path) -> bool:
    return LOCK_NAME in listing(folder)


def _is_free(folder: Path) -> bool:
    return all(name == LOCK_NAME for name in listing(folder))


def _refuse_existing(run_dir: Path) -> None:
    """No site has written anything yet, so any file of a run belongs to another one."""
    if checkpoint.all_parts(run_dir) or any(map(_IS_RECORD, listing(run_dir))):
        raise CheckpointError(
            f"run.dir {run_dir} already holds a run: --resume continues it, --overwrite replaces "
            f"it, --next-free takes a new folder"
        )


def remove_run(run_dir: Path) -> None:
    """Remove what a run wrote at any site, and nothing else; peers may do the same.

    Called only after everything that can be wrong with the new run has been checked, and before
    any site writes.

    Raises:
        CheckpointError: naming the file that cannot be removed.
    """
    try:
        for path in checkpoint.all_parts(run_dir):
            remove(path)
        for round_idx in checkpoint.saved_rounds(run_dir):
            remove_if_empty(checkpoint.round_folder(run_dir, round_idx))
        for name in listing(run_dir):
            if _IS_RECORD(name) or _IS_TOKENIZER(name):
                remove(run_dir / name)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be removed: {error.strerror}") from None
    shutil.rmtree(run_dir / "merged", ignore_errors=True)


def write_run_files(config: Config, run_dir: Path, data: Data, transport: Transport) -> None:
    """The resolved config and the trained tokenizer, once per run (by the first site)."""
    if transport.members[0] not in transport.sites or transport.inside.rank:
        return
    for name in ("config.yaml", "tokenizer.json", "summary.json"):  # of a run that was killed
        remove_temporaries(run_dir, name)
    write_text_atomically(run_dir / "config.yaml", config.to_yaml())
    if data.tokenizer_json is not None:
        write_text_atomically(run_dir / "tokenizer.json", data.tokenizer_json.decode())
