"""Checks for what training would refuse before its first step although the config is valid.

A dry run and a comparison make them first: whether text, token shards and tokenizer exist, whether
torch accepts the outer optimizer's options, and whether the run's folder can be made. Text is not
read, and nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from fomoe.config import Config
from fomoe.data.dataset import named_tokenizer, needed_sources
from fomoe.data.sources import check_source
from fomoe.data.tokenizer import ByteTokenizer, local_path
from fomoe.errors import CheckpointError


def check_ready(config: Config, *, site: int | None = None) -> None:
    """Refuse what training on this machine would refuse.

    Args:
        config: the experiment; `run.dir` must be set.
        site: the one site that this machine runs; None: all of them, as a proxy run does.

    Raises:
        FomoeError: for the first problem, with the message that training would give.
    """
    for source in needed_sources(config, range(config.num_sites) if site is None else (site,)):
        check_source(source)
    if local_path(config.data.tokenizer) is not None:
        named_tokenizer(config)
    if config.init_from is not None:
        from fomoe.initial import open_initial  # it reads the headers of tensors

        open_initial(config, _tokenizer_fingerprint(config))
    if config.outer.options:
        from fomoe.sync.outer import build_outer_optimizer  # only torch can check them

        build_outer_optimizer(config, [])
    assert config.run.dir is not None  # the command line gives one
    _check_folder(Path(config.run.dir))


def _tokenizer_fingerprint(config: Config) -> str | None:
    """None where only the text decides it, or it would have to be downloaded."""
    if config.data.tokenizer == "byte":
        return ByteTokenizer.fingerprint
    if local_path(config.data.tokenizer) is None:
        return None
    return named_tokenizer(config).fingerprint


def _check_folder(run_dir: Path) -> None:
    there = next(path for path in (run_dir, *run_dir.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise CheckpointError(f"run.dir {run_dir}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"run.dir {run_dir}: {there} cannot be written: Permission denied")
