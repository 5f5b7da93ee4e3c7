"""The errors that a user can cause or see, each printed as one line, and how a line is printed."""

from __future__ import annotations

import sys
from pathlib import PurePath


class FomoeError(Exception):
    """Base of every error that is shown as one line instead of a traceback."""

    def __str__(self) -> str:
        """The message; bytes of a file's name that are not UTF-8 are escaped."""
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class ConfigError(FomoeError, ValueError):
    """An option is wrong: names the field, the value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(" ".join(part for part in (field, _short(value), rule) if part))


class DataError(FomoeError, ValueError):
    """A source, shard or tokenizer cannot be used."""


class CheckpointError(FomoeError):
    """A checkpoint is missing, torn, altered or of another run."""


class ServiceError(FomoeError):
    """An optional package or service that the config needs cannot be used."""


class SyncError(FomoeError, RuntimeError):
    """The sites did not all join, or an exchange between them did not complete."""


class SiteMismatchError(FomoeError):
    """The sites were not started with the same experiment."""


def say_line(text: str) -> None:
    """Write a line to stderr in one piece, so that lines of several sites on one terminal stay
    whole: `print` writes the line's end apart."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _short(value: object) -> str:
    if isinstance(value, PurePath):  # whole: what a cut path names cannot be found
        return str(value)
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
