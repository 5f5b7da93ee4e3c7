"""The run's folder and what the sites must agree on before they start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fomoe import __version__, checkpoint
from fomoe.config import Config
from fomoe.data.dataset import Data
from fomoe.errors import CheckpointError, FomoeError, SiteMismatchError
from fomoe.metrics import metrics_path
from fomoe.sync.transport import Transport

T = TypeVar("T")

# Settings of `run` that decide when sites talk; the rest of `run` may differ between them.
_RUN_TOGETHER = ("checkpoint_every", "eval_every", "eval_merged_every")


def agreed(transport: Transport, work: Callable[[], T]) -> T:
    """Do something at every site; if it fails at one, all sites raise instead of waiting for it.

    Raises:
        FomoeError: this site's own error, or one that names the sites that failed.
    """
    failure: FomoeError | None = None
    try:
        result = work()
    except FomoeError as error:
        failure = error
    answers = transport.gather(lambda _: str(failure or "").encode())
    if failure is not None:
        raise failure
    for site, answer in zip(transport.members, answers, strict=True):
        if answer:
            raise SiteMismatchError(f"site {site}: {answer.decode()}")
    return result


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
    messages = transport.gather(lambda _: json.dumps(own).encode())
    everyone = [json.loads(message) for message in messages]
    first = everyone[0]
    problems = []
    for site, other in zip(transport.members, everyone, strict=True):
        fields = [
            f"{name} ({_shown(other.get(name))}, not {_shown(first.get(name))})"
            for name in {**first, **other}
            if other.get(name) != first.get(name)
        ]
        if fields:
            problems.append(
                f"site {site} differs from site {transport.members[0]} in {', '.join(fields)}"
            )
    if problems:
        raise SiteMismatchError("; ".join(problems))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else text


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ------------------------------------------------------------------------------------- the folder


def claim_run_dir(config: Config, transport: Transport, mode: str) -> tuple[Config, Path]:
    """Find the run's folder for `mode`, and make it; nothing in it is touched yet.

    Returns:
        The config with the folder that is used, and the folder.

    Raises:
        CheckpointError: if a run is there and the mode is `new`.
    """
    assert config.run.dir is not None  # the command line gives one
    run_dir = Path(config.run.dir)
    if mode == "next-free":
        wanted = run_dir
        run_dir = Path(transport.share(lambda: str(_next_free(wanted)).encode()).decode())
    elif mode == "new":
        agreed(transport, lambda: _refuse_existing(run_dir, transport.sites))
    agreed(transport, lambda: _make_folder(run_dir))
    settings = config.run.model_copy(update={"dir": str(run_dir)})
    return config.model_copy(update={"run": settings}), run_dir


def _make_folder(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise CheckpointError(f"run.dir {run_dir} is a file, not a folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"run.dir {run_dir} cannot be made: {error.strerror}") from None


def _next_free(run_dir: Path) -> Path:
    """`run_dir`, or `run_dir-2`, `-3`, ... whichever holds nothing yet."""
    candidate, number = run_dir, 1
    while candidate.is_dir() and any(candidate.iterdir()):
        number += 1
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    return candidate


def _refuse_existing(run_dir: Path, sites: tuple[int, ...]) -> None:
    """Each process looks at its own sites' files only: sites may share a file system."""
    parts = [p for s in sites for p in run_dir.glob(f"checkpoints/*/site-{s}.*")]
    own = [metrics_path(run_dir, sites[0])]
    if 0 in sites:
        own += [run_dir / "config.yaml", run_dir / "summary.json"]
    if parts or any(path.exists() for path in own):
        raise CheckpointError(
            f"run.dir {run_dir} already holds a run: --resume continues it, --overwrite replaces "
            f"it, --next-free takes a new folder"
        )


def remove_run(run_dir: Path, sites: tuple[int, ...]) -> None:
    """Remove what a run of these sites wrote, and nothing else.

    Only once everything that can be wrong with the new run has been checked.
    """
    metrics_path(run_dir, sites[0]).unlink(missing_ok=True)
    for round_idx in checkpoint.saved_rounds(run_dir):
        checkpoint.remove_parts(run_dir, round_idx, sites)
    if 0 in sites:
        for name in ("config.yaml", "summary.json", "tokenizer.json"):
            (run_dir / name).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "merged", ignore_errors=True)


def write_run_files(config: Config, run_dir: Path, data: Data, transport: Transport) -> None:
    """The resolved config and the trained tokenizer, once per run (by the first site)."""
    if transport.members[0] not in transport.sites:
        return
    checkpoint.write_text_atomically(run_dir / "config.yaml", config.to_yaml())
    if data.tokenizer_json is not None:
        checkpoint.write_text_atomically(run_dir / "tokenizer.json", data.tokenizer_json.decode())
