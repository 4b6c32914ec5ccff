"""Every failure that the program foresees, each with the exit code that the command line ends with.

A message says what is wrong, where (file, tensor), what was expected and found, and what to do.
"""

from __future__ import annotations


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
    """A scheme that a format cannot store, or stored parts that contradict each other."""

    exit_code = 4


class Interrupted(KeyboardInterrupt):
    """Somebody ended the program; the message says how to go on."""
