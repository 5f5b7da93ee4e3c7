"""Optional packages and services: checked before a folder is claimed; a failure is one line.

wandb receives the records too if `run.wandb` asks for it; it cannot stop a run that trains.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fomoe.config import Config
from fomoe.data import sources
from fomoe.errors import ConfigError, ServiceError, say_line
from fomoe.files import listing, remove, remove_if_empty
from fomoe.site import expert_backend
from fomoe.sync.exchange import agreed
from fomoe.sync.transport import Transport


def check_services(config: Config, sites: Iterable[int], device: torch.device) -> None:
    """Check whatever a config needs that an installation may lack.

    Raises:
        FomoeError: naming the option, the package or service, and what to do.
    """
    if config.adapters.base is None:
        expert_backend(config, device)
    elif config.adapters.aggregate != "segments" and len(tuple(sites)) < config.num_sites:
        rule = "needs all clients in one process: a server computes it"
        raise ConfigError("adapters.aggregate", config.adapters.aggregate, rule)
    names = config.data.sites or (config.data.source,) * config.num_sites
    needed = {names[site] for site in sites}
    needed |= {config.data.held_out} if config.data.held_out else set(names)
    for source in sorted(filter(sources.is_hub, needed)):
        sources.hub_library(source)
    if config.run.wandb != "off":
        wandb = _import_wandb(config.run.wandb)
        if config.run.wandb == "online":
            _log_in(wandb)


def _import_wandb(mode: str) -> Any:
    try:
        return import_module("wandb")
    except ModuleNotFoundError as error:
        missing = error.name or "wandb"
        raise ServiceError(
            f"run.wandb={mode} needs the package {missing}: pip install {missing}, or take "
            f"run.wandb=off"
        ) from None
    except Exception as error:  # an installed wandb that does not fit other packages
        raise ServiceError(f"run.wandb={mode}: wandb cannot be imported: {_line(error)}") from None


def _log_in(wandb: Any) -> None:
    try:
        reason = "" if wandb.login(verify=True) else "nobody is logged in"
    except Exception as error:  # wandb's own base error is a plain Exception
        reason = _line(error)
    if reason:
        raise ServiceError(
            f"run.wandb=online: {reason}; log in with 'wandb login' or WANDB_API_KEY, or take "
            f"run.wandb=offline"
        )


class WandbLog:
    """A wandb run that receives records: group = run, one job per process.

    Args:
        config: the experiment; `run.wandb` is offline or online.
        run_dir: the run's folder, for wandb's own files.
        sites: the sites of this process.

    Raises:
        ServiceError: if it cannot be opened; nothing is left in the folder.
    """

    def __init__(self, config: Config, run_dir: Path, sites: tuple[int, ...]) -> None:
        self._wandb = _import_wandb(config.run.wandb)
        self._folder = run_dir / "wandb"
        self._before = listing(self._folder)
        whose = "proxy" if len(sites) > 1 else f"site-{sites[0]}"
        try:
            self._run = self._wandb.init(
                project=config.run.wandb_project,
                mode=config.run.wandb,
                group=run_dir.name,
                job_type=whose,
                name=f"{run_dir.name}-{whose}",
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
            )
        except Exception as error:
            self._forget()
            mode = config.run.wandb
            raise ServiceError(f"run.wandb={mode}: no wandb run opens: {_line(error)}") from None
        except BaseException:  # an interrupt while it waits for the network
            self._forget()
            raise

    def log(self, records: list[dict[str, Any]]) -> None:
        """Send records; if that fails, say so once and send no more."""
        if self._run is None:
            return
        try:
            for record in records:
                prefix = f"site{record['site']}/" if "site" in record else ""
                self._run.log(
                    {
                        f"{prefix}{record['kind']}/{key}": value
                        for key, value in record.items()
                        if isinstance(value, int | float) and key not in ("site", "round")
                    }
                    | {"round": record["round"]}
                )
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def discard(self) -> None:
        """End the wandb run and remove its files, because training does not begin."""
        with suppress(Exception):
            self._run.finish(exit_code=1)
        self._forget()

    def _give_up(self, error: Exception) -> None:
        self._run = None
        text = f"wandb failed and gets no more records: {_line(error)}; metrics.jsonl has them all"
        say_line(text)

    def _forget(self) -> None:
        with suppress(Exception):
            self._wandb.teardown()  # its service would continue to write
        new = [self._folder / n for n in listing(self._folder) if n not in self._before]
        for path in new:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove(path)
        remove_if_empty(self._folder)


def open_log(config: Config, run_dir: Path, transport: Transport) -> WandbLog | None:
    """This process's log if `run.wandb` asks for one: opened at all sites, or at none.

    Raises:
        FomoeError: if a site cannot open its own.
    """
    log: WandbLog | None = None

    def enter() -> None:
        nonlocal log
        if config.run.wandb != "off":
            log = WandbLog(config, run_dir, transport.sites)

    try:
        agreed(transport, enter)
    except BaseException:
        if log is not None:
            log.discard()
        raise
    return log


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
