"""Finished steps made durable in groups, in a thread of its own: data first, then the journal that speaks of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.io.disk import disk_errors
from qconvert.io.journal import Journal
from qconvert.io.output_file import OutputFile

GROUP_BYTES = 64 << 20
"""Bytes after which a group is made durable: so few that an interruption never waits long for the disk."""

GROUP_SECONDS = 1.0
"""Time after which a group is made durable: the work that a kill can lose."""

WAITING_BYTES = 256 << 20
"""Bytes that may wait for the disk; whoever writes more waits with them."""


@dataclass(frozen=True, slots=True)
class Written:
    """A piece of a tensor that is on its way to the disk: its place and its hash."""

    step: str
    name: str
    begin: int
    end: int
    digest: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished step: its pieces, and what the run wants to know of it later."""

    key: str
    pieces: tuple[Written, ...]
    note: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """What the journal holds of it."""
        pieces = [[piece.name, piece.begin, piece.end, piece.digest] for piece in self.pieces]
        return {"step": self.key, "pieces": pieces, "note": dict(self.note)}

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Finished:
        """The inverse of ``line``."""
        key = line["step"]
        return cls(key, tuple(Written(key, *piece) for piece in line["pieces"]), line["note"])


class Committer:
    """Syncs files and appends to the journal in the background.

    Failures of the disk come out of the next call. After one of ``fsync`` nothing is known of what was written before
    it, so nothing more is committed.
    """

    def __init__(self, folder: Path, journal: Journal, durable: Callable[[list[Finished]], None]) -> None:
        """Begin to work.

        Args:
            folder: whose steps the journal tells of, for messages.
            journal: nobody else appends to it until ``stop``.
            durable: told of the steps of each group when the journal holds them, in the thread of this object.
        """
        self._folder = folder
        self._journal = journal
        self._durable = durable
        self._changed = threading.Condition()
        self._pending: list[Finished] = []
        self._dirty: dict[OutputFile, int] = {}
        self._waiting = 0
        self._since = 0.0
        self._flushing = self._working = self._stopped = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._work_done = self._pool.submit(self._work)
        self._work_done.add_done_callback(self._wake)

    def wrote(self, file: OutputFile, count: int) -> None:
        """Say that ``count`` bytes of a file have just been written; waits while too many are not durable yet."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < WAITING_BYTES or self._ended)
            self._check()
            self._since = self._since or time.monotonic()
            self._dirty[file] = self._dirty.get(file, 0) + count
            self._waiting += count
            if self._waiting >= GROUP_BYTES:
                self._changed.notify_all()

    def commit(self, step: Finished) -> None:
        """Make a step durable soon. All that it wrote has been told to ``wrote``."""
        with self._changed:
            self._check()
            self._since = self._since or time.monotonic()
            self._pending.append(step)

    def flush(self) -> None:
        """Wait until all is durable."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._pending or self._dirty or self._working) or self._ended)
            self._flushing = False
            self._check()

    def stop(self) -> None:
        """End after the group that is being worked on; the files may be closed then."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown()

    @property
    def _ended(self) -> bool:
        return self._stopped or self._work_done.done()

    def _check(self) -> None:
        if self._work_done.done():
            self._work_done.result()

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _is_due(self) -> bool:
        if self._stopped:
            return True
        if not (self._pending or self._dirty):
            return False
        return self._flushing or self._waiting >= GROUP_BYTES or time.monotonic() - self._since >= GROUP_SECONDS

    def _work(self) -> None:
        while (group := self._next()) is not None:
            self._make_durable(*group)

    def _next(self) -> tuple[list[Finished], dict[OutputFile, int]] | None:
        with self._changed:
            while not self._is_due():
                self._changed.wait(GROUP_SECONDS / 4)
            if self._stopped:
                return None
            group = self._pending, self._dirty
            self._pending, self._dirty = [], {}
            self._since = 0.0
            self._working = True
            return group

    def _make_durable(self, steps: list[Finished], files: Mapping[OutputFile, int]) -> None:
        for file in files:
            file.sync()
        if steps:
            with disk_errors(self._folder):
                self._journal.append(step.line() for step in steps)
        self._durable(steps)
        with self._changed:
            self._waiting -= sum(files.values())
            self._working = False
            self._changed.notify_all()
