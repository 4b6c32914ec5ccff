"""Every failure that the program foresees, each with the exit code that the command line ends with.

A message says what is wrong, where (file, tensor), what was expected and found, and what to do.
"""

from __future__ import annotations

from pathlib import Path


class QconvertError(Exception):
    """Base of all foreseen failures."""

    exit_code = 1


class UsageError(QconvertError):
    """Options that contradict each other or name something unknown."""

    exit_code = 2


class SourceError(QconvertError):
    """The input is no checkpoint, is damaged, or is of an unsupported architecture or format."""

    exit_code = 3


class PlanError(QconvertError):
    """The conversion that was asked for is impossible: found before the first byte is written."""

    exit_code = 4


class OutputError(QconvertError):
    """The output cannot be written, exists already, or reads back differently."""

    exit_code = 5


class DataError(QconvertError):
    """Weights that cannot be rounded: NaN or infinite values."""

    exit_code = 6


class FormatError(QconvertError):
    """A scheme that a format cannot store, or stored parts that contradict each other.

    Attributes:
        part: suffix of the stored part of a matrix that is at fault; ``None`` where it is none by itself.
    """

    exit_code = 4

    def __init__(self, message: str, *, part: str | None = None) -> None:
        super().__init__(message)
        self.part = part


class Interrupted(KeyboardInterrupt):
    """Somebody ended the program; the message says how to go on."""


def explain_going_on(error: BaseException, out: Path) -> None:
    """Raise the error that ended the making of ``out`` again with how to go on, if it is one for people."""
    hint = f"What is finished of {out} is kept: the same command goes on from there, with --fresh it starts over."
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(f"Interrupted. {hint}") from error
    if isinstance(error, QconvertError):
        raise type(error)(f"{error}\n{hint}") from error
