"""The only place that prints: tables, progress, JSON, errors and exit codes."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from qconvert.core.errors import OutputError, QconvertError, SourceError
from reference_model.config_fields import ConfigError

INTERRUPTED = 130
UNFORESEEN = 70
UNREAD = 141
"""As if SIGPIPE had ended the program: whoever read what it prints has stopped, such as ``head``."""


class _Lines(Console):
    """Lines for people; rich itself would end the program with the code 1 when their reader has stopped."""

    def on_broken_pipe(self) -> None:
        """Go on without what is told beside the result; there is no use in a result that nobody reads."""
        if not self.stderr:
            raise
        self.quiet = True


# Names of files and tensors may look like markup: nothing is read as such.
_out = _Lines(highlight=False, markup=False)
_err = _Lines(stderr=True, highlight=False, markup=False)


@contextmanager
def _standard_output() -> Iterator[None]:
    """What cannot be printed is an error like others, but for a reader that has stopped."""
    try:
        yield
        _out.file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def say(text: str, style: str = "") -> None:
    """Print a line for people."""
    with _standard_output():
        _out.print(text, style=style, soft_wrap=True)


def unsaid(text: str) -> None:
    """What ``say`` is where ``--json`` or ``--quiet`` asks for silence."""


def plain_table(*columns: str) -> Table:
    """A table without frames; a column that begins with ``>`` is of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        number = name.startswith(">")
        justify: Literal["left", "right"] = "right" if number else "left"
        # paths are told apart by their ends: they are folded, not cut
        table.add_column(name.lstrip(">"), justify=justify, no_wrap=number, overflow="ellipsis" if number else "fold")
    return table


def show(table: Table) -> None:
    """Print a table."""
    with _standard_output():
        _out.print(table)


def show_json(value: Any) -> None:
    """Print one JSON document and nothing else on standard output."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    with _standard_output():
        _out.file.write(text)


def show_parts(parts: Iterable[str]) -> None:
    """Print parts of one text one after the other and nothing else on standard output."""
    with _standard_output():
        _out.file.writelines(parts)


def gigabytes(count: int) -> str:
    """Bytes in decimal units with three digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def family(path: str) -> str:
    """A role path in words, its first two steps: ``text linear attention``."""
    section, _, rest = path.partition(".")
    first = rest.partition(".")[0]
    return f"{section} {'norms' if first.endswith('norm') else first}".replace("_", " ")


def fail(error: BaseException) -> int:
    """Print one clear error and return the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        _err.print(f"\n{error}" if str(error) else "\nInterrupted: no output has appeared.", soft_wrap=True)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return UNREAD
    if isinstance(error, QconvertError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, ConfigError):
        _complain(str(error))
        return SourceError.exit_code
    _err.print_exception()
    _err.print("This is a fault of qconvert itself. Please report the lines above.", style="bold red")
    return UNFORESEEN


def _complain(text: str) -> None:
    _err.print(Text.assemble(("error:", "bold red"), f" {text}"), soft_wrap=True)


_ENDING = (signal.SIGINT, signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # What goes on now is cleaning up, which a second request must not tear apart; killing is safe at any time.
    for one in _ENDING:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _one_interruption() -> Iterator[None]:
    """Take the first polite request to end (Ctrl-C, SIGTERM) as an interruption, and no other one until it is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = [one for one in _ENDING if signal.getsignal(one) is not signal.SIG_IGN]  # a shell ignores for its jobs
    before = [(one, signal.signal(one, _interrupt)) for one in asked]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)


def guarded(call: Callable[[], int]) -> int:
    """Run a command to its exit code; every failure is printed here and nowhere else."""
    with _one_interruption():
        try:
            return call()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one place that may
            return fail(error)


class Quiet:
    """Progress that shows nothing, for ``--json`` and ``--quiet``."""

    def advance(self, description: str, done: int, total: int) -> None:
        """Ignore the news."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Bar:
    """A line with what is done, the rate and the time left; one task per phase."""

    def __init__(self, *, in_bytes: bool) -> None:
        amount: tuple[ProgressColumn, ...] = (
            (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
        )
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn(),
            console=_err,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def advance(self, description: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done in the phase ``description``."""
        if description not in self._tasks:
            self._tasks[description] = self._progress.add_task(description, total=total, completed=done)
        self._progress.update(self._tasks[description], completed=done, total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@contextmanager
def progress(*, in_bytes: bool, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function ``(phase, done, total)`` that draws a progress line."""
    with Quiet() if quiet else Bar(in_bytes=in_bytes) as shown:
        yield shown.advance
