"""The records of a run: `metrics.jsonl`, and a log beside it if the config asks for one.

One JSON object per line; `kind` is `step`, `round` or `merged`. docs/metrics.md lists the fields.
A proxy run writes all sites to `metrics.jsonl`; in a distributed run site 0 does, and site k > 0
writes `metrics.site<k>.jsonl`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fomoe.errors import CheckpointError
from fomoe.files import not_written, remove_temporaries, write_text_atomically
from fomoe.jsonlines import read_lines
from fomoe.logs import Logs


def metrics_path(run_dir: Path, site: int) -> Path:
    """The file of the process whose first site is `site`."""
    return run_dir / ("metrics.jsonl" if site == 0 else f"metrics.site{site}.jsonl")


class Metrics:
    """Appends records; on resume, drops those of rounds that will be run again.

    Args:
        run_dir: the run's folder.
        sites: the sites of this process.
        first_round: rounds before it are kept.
        log: receives the records too, if there is one.

    Attributes:
        path: the file of this process.
        num_damaged: lines that were dropped because no record could be read from them.

    Raises:
        CheckpointError: if the file cannot be read or written.
    """

    def __init__(
        self,
        run_dir: Path,
        sites: tuple[int, ...],
        *,
        first_round: int,
        log: Logs | None = None,
    ) -> None:
        self.path = metrics_path(run_dir, sites[0])
        remove_temporaries(run_dir, self.path.name)
        records, self.num_damaged = _read_records(self.path)
        keep = [text for text, round_idx in records if round_idx < first_round]
        write_text_atomically(self.path, "".join(f"{text}\n" for text in keep))
        self._file = self.path.open("a", encoding="utf-8")
        self._log = log

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
        if self._log is not None:
            self._log.log(records)

    def close(self) -> None:
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:  # closing tries again to write what did not fit
            raise not_written(self.path, error) from error
        if self._log is not None:
            self._log.close()


class Unwritten(Metrics):
    """The records of a rank that is not its site's first one, which writes them."""

    def __init__(
        self, run_dir: Path, sites: tuple[int, ...], *, first_round: int, log: Logs | None = None
    ) -> None:
        self.path, self.num_damaged = metrics_path(run_dir, sites[0]), 0

    def write(self, records: list[dict[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass


def _read_records(path: Path) -> tuple[list[tuple[str, int]], int]:
    """Text and round of every record, and the number of lines without one."""
    if not path.exists():
        return [], 0
    try:
        lines = read_lines(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    rounds = [(text, record.get("round")) for _, text, record in lines.objects]
    records = [(text, value) for text, value in rounds if isinstance(value, int)]
    return records, len(lines.damaged) + len(rounds) - len(records)
