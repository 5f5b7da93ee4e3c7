"""What a run records: `metrics.jsonl`, and wandb where the config asks for it.

One JSON object per line; `kind` is `step`, `round` or `merged`. docs/metrics.md lists the fields.
A proxy run writes all sites to `metrics.jsonl`; in a distributed run site 0 does, and site k > 0
writes `metrics.site<k>.jsonl`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fomoe.checkpoint import not_written, write_text_atomically
from fomoe.config import Config


def metrics_path(run_dir: Path, site: int) -> Path:
    """Where the process whose first site is `site` writes."""
    return run_dir / ("metrics.jsonl" if site == 0 else f"metrics.site{site}.jsonl")


class Metrics:
    """Appends records; on resume, drops those of rounds that will be run again.

    Args:
        config: the experiment (for wandb's settings).
        run_dir: the run's folder.
        sites: the sites of this process.
        first_round: rounds before it are kept.
    """

    def __init__(
        self, config: Config, run_dir: Path, sites: tuple[int, ...], *, first_round: int
    ) -> None:
        self.path = metrics_path(run_dir, sites[0])
        run_dir.mkdir(parents=True, exist_ok=True)
        keep = [line for line in _whole_lines(self.path) if json.loads(line)["round"] < first_round]
        write_text_atomically(self.path, "".join(f"{line}\n" for line in keep))
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _open_wandb(config, run_dir, sites)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records and flush, so that a crash loses none of them.

        Raises:
            CheckpointError: if they cannot be written.
        """
        try:
            self._file.write("".join(json.dumps(record) + "\n" for record in records))
            self._file.flush()
        except OSError as error:
            raise not_written(self.path, error) from error
        if self._wandb is not None:
            for record in records:
                prefix = f"site{record['site']}/" if "site" in record else ""
                self._wandb.log(
                    {
                        f"{prefix}{record['kind']}/{key}": value
                        for key, value in record.items()
                        if isinstance(value, int | float) and key not in ("site", "round")
                    }
                    | {"round": record["round"]}
                )

    def close(self) -> None:
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:  # closing tries once more to write what did not fit
            raise not_written(self.path, error) from error
        if self._wandb is not None:
            self._wandb.finish()


def _whole_lines(path: Path) -> list[str]:
    """Lines that are whole JSON objects; a crash may have cut the last one."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)["round"]
        except (ValueError, KeyError, TypeError):
            continue
        lines.append(line)
    return lines


def _open_wandb(config: Config, run_dir: Path, sites: tuple[int, ...]) -> Any:
    """A wandb run: group = run, one job per site; None if it is off."""
    if config.run.wandb == "off":
        return None
    import wandb

    run_dir.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=config.run.wandb_project,
        mode=config.run.wandb,
        group=run_dir.name,
        job_type="proxy" if len(sites) > 1 else f"site-{sites[0]}",
        name=f"{run_dir.name}-{'proxy' if len(sites) > 1 else f'site-{sites[0]}'}",
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
    )
