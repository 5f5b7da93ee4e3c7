"""Records sent to wandb and to TensorBoard beside `metrics.jsonl`, under the same names.

Both get one run per site, whether or not the sites share a process, and both go on in it after a
resume. Neither can stop a run that trains: what fails says so once and gets no more records.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fomoe.config import Config
from fomoe.errors import ServiceError, say_line
from fomoe.files import listing, remove, remove_if_empty, write_text_atomically
from fomoe.sync.exchange import agreed
from fomoe.sync.transport import Transport

Record = dict[str, Any]
Scalars = dict[str, float]


class _Sink(Protocol):
    """One service, for the sites of this process."""

    name: str

    def open(self) -> None: ...

    def log(self, site: int, scalars: Scalars, *, step: int) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Logs:
    """All services that get this process's records.

    Args:
        config: the experiment.
        sites: the sites of this process; records without a site are the first one's.
        sinks: the services that are open.
    """

    def __init__(self, config: Config, sites: tuple[int, ...], sinks: list[_Sink]) -> None:
        self._config, self._first, self._sinks = config, sites[0], sinks

    def log(self, records: list[Record]) -> None:
        """Send records; a service that fails is left out from then on."""
        for record in records:
            scalars = scalars_of(record, self._config)
            site, step = record.get("site", self._first), int(scalars["steps"])
            self._each(partial(_send, site=site, scalars=scalars, step=step))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def discard(self) -> None:
        """End everything and remove its files, because training does not begin."""
        for sink in self._sinks:
            sink.discard()

    def _each(self, call: Callable[[_Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                text = f"{sink.name} failed and gets no more records: {_line(error)}"
                say_line(f"{text}; metrics.jsonl has them all")


def _send(sink: _Sink, *, site: int, scalars: Scalars, step: int) -> None:
    sink.log(site, scalars, step=step)


def scalars_of(record: Record, config: Config) -> Scalars:
    """A record's numbers as `<kind>/<field>`, and the two axes: `steps`, and `tokens` of all sites.

    Both count what was done when the record was made.
    """
    kind = record["kind"]
    done = record["step"] + 1 if kind == "step" else (record["round"] + 1) * config.local_steps
    numbers = {
        f"{kind}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("site", "round", "step")
    }
    tokens = done * sum(config.tokens_per_step)
    return numbers | {"steps": done, "tokens": tokens, "round": record["round"]}


# ------------------------------------------------------------------------------------------- wandb


class WandbRuns:
    """A wandb run per site, all in the group of this run.

    Args:
        config: the experiment; `run.wandb` is offline or online.
        run_dir: the run's folder, for wandb's own files and the id that a resume reads.
        sites: the sites of this process.
        run_id: names the run, if it does not go on with one.
        resumed: whether it goes on with one.

    Raises:
        ServiceError: if the library is not installed.
    """

    name = "wandb"

    def __init__(
        self, config: Config, run_dir: Path, sites: tuple[int, ...], run_id: str, *, resumed: bool
    ) -> None:
        self._wandb = import_wandb(config.run.wandb)
        self._config, self._run_dir, self._sites = config, run_dir, sites
        self._folder = run_dir / "wandb"
        self._before = listing(self._folder)
        self._kept = self._folder / "run-id"
        self._id = run_id
        if resumed and self._kept.is_file():
            self._id = self._kept.read_text(encoding="utf-8").strip()
        self._runs: dict[int, Any] = {}

    def open(self) -> None:
        """Open the runs.

        Raises:
            ServiceError: if one cannot be opened.
        """
        try:
            for site in self._sites:
                self._runs[site] = self._open(self._config, self._run_dir, site, self._id)
            self._folder.mkdir(exist_ok=True)
            write_text_atomically(self._kept, f"{self._id}\n")
        except Exception as error:
            mode = self._config.run.wandb
            raise ServiceError(f"run.wandb={mode}: no wandb run opens: {_line(error)}") from None

    def _open(self, config: Config, run_dir: Path, site: int, run_id: str) -> Any:
        run = self._wandb.init(
            project=config.run.wandb_project,
            mode=config.run.wandb,
            group=f"{run_dir.name}-{run_id}",
            job_type=f"site-{site}",
            name=f"{run_dir.name}-site-{site}",
            id=f"{run_id}-site-{site}",
            resume="allow",
            reinit="create_new",
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )
        run.define_metric("steps")
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run

    def log(self, site: int, scalars: Scalars, *, step: int) -> None:
        self._runs[site].log(scalars)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()

    def discard(self) -> None:
        for run in self._runs.values():
            with suppress(Exception):
                run.finish(exit_code=1)
        with suppress(Exception):
            self._wandb.teardown()  # its service would continue to write
        new = [self._folder / n for n in listing(self._folder) if n not in self._before]
        for path in new:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove(path)
        remove_if_empty(self._folder)


def import_wandb(mode: str) -> Any:
    """The library.

    Raises:
        ServiceError: naming the extra to install.
    """
    return _import("wandb", f"run.wandb={mode}", "wandb", "run.wandb=off")


def log_in(wandb: Any) -> None:
    """Check that somebody is logged in.

    Raises:
        ServiceError: saying how to log in.
    """
    try:
        reason = "" if wandb.login(verify=True) else "nobody is logged in"
    except Exception as error:  # wandb's own base error is a plain Exception
        reason = _line(error)
    if reason:
        raise ServiceError(
            f"run.wandb=online: {reason}; log in with 'wandb login' or WANDB_API_KEY, or take "
            f"run.wandb=offline"
        )


# ------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """A TensorBoard run per site, in `tensorboard/site-<k>`; its step axis counts inner steps.

    Args:
        run_dir: the run's folder.
        sites: the sites of this process.
        first_step: steps from it on that the folder has already are hidden: they run again.

    Raises:
        ServiceError: if the library is not installed.
    """

    name = "TensorBoard"

    def __init__(self, run_dir: Path, sites: tuple[int, ...], first_step: int) -> None:
        self._library = import_tensorboard()
        self._sites, self._first_step = sites, first_step
        self._folder = run_dir / "tensorboard"
        self._before = {path for path in self._folder.rglob("*")}
        self._writers: dict[int, Any] = {}

    def open(self) -> None:
        """Open the writers.

        Raises:
            ServiceError: if one cannot be opened.
        """
        try:
            for site in self._sites:
                self._writers[site] = self._library.SummaryWriter(
                    str(self._folder / f"site-{site}"), purge_step=self._first_step + 1
                )
        except Exception as error:
            text = f"run.tensorboard=true: no writer opens: {_line(error)}"
            raise ServiceError(text) from None

    def log(self, site: int, scalars: Scalars, *, step: int) -> None:
        for name, value in scalars.items():
            self._writers[site].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def discard(self) -> None:
        for writer in self._writers.values():
            with suppress(Exception):
                writer.close()
        new = [path for path in self._folder.rglob("*") if path not in self._before]
        for path in sorted(new, reverse=True):  # files before their folders
            if path.is_dir():
                remove_if_empty(path)
            else:
                remove(path)
        remove_if_empty(self._folder)


def import_tensorboard() -> Any:
    """torch's writer.

    Raises:
        ServiceError: naming the extra to install.
    """
    option, instead = "run.tensorboard=true", "run.tensorboard=false"
    _import("tensorboard", option, "tensorboard", instead)
    return _import("torch.utils.tensorboard", option, "tensorboard", instead)


# ------------------------------------------------------------------------------------------ opening


def open_logs(
    config: Config,
    run_dir: Path,
    transport: Transport,
    *,
    run_id: str,
    first_round: int = 0,
    resumed: bool = False,
) -> Logs:
    """This process's logs, as the config asks: opened at all sites, or at none.

    Raises:
        FomoeError: if a site cannot open its own.
    """
    sites = transport.sites
    logs = Logs(config, sites, [])

    def enter() -> None:
        if transport.inside.rank:  # a site's first rank sends its records
            return
        if config.run.tensorboard:
            first_step = first_round * config.local_steps
            logs._sinks.append(TensorBoard(run_dir, sites, first_step))
        if config.run.wandb != "off":
            logs._sinks.append(WandbRuns(config, run_dir, sites, run_id, resumed=resumed))
        for sink in logs._sinks:
            sink.open()

    # Sites may share the folder: what is new in it is removed when none of them still opens.
    try:
        agreed(transport, enter)
    except BaseException:
        logs.discard()
        raise
    return logs


def _import(name: str, option: str, extra: str, instead: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ServiceError(
            f"{option} needs the package {error.name or name}: pip install 'fomoe[{extra}]', or "
            f"take {instead}"
        ) from None
    except Exception as error:  # an installed package that does not fit others
        raise ServiceError(f"{option}: {name} cannot be imported: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
