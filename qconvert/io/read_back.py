"""What was written is read back from the disk and compared with its hash, beside the work that goes on."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qconvert.core.errors import OutputError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.committer import Finished, Written
from qconvert.io.disk import disk_errors
from qconvert.io.hashing import Hash, new_hash

_READ_BYTES = 4 << 20


class ReadBack:
    """Compares durable pieces in the order in which they come.

    Attributes:
        damaged: steps whose pieces read back differently, or not at all.
    """

    def __init__(self, place: Callable[[str], tuple[int, TensorInfo, Path]], algorithm: str) -> None:
        """Begin to work; ``place`` gives a tensor's file, open and by name, and where it lies in it."""
        self._place = place
        self._algorithm = algorithm
        self._queue: queue.SimpleQueue[Written | None] = queue.SimpleQueue()
        self._stopped = False
        self._error: OutputError | None = None
        self.damaged: set[str] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read back")
        self._work_done = self._pool.submit(self._work)

    def expect(self, step: Finished) -> None:
        """Compare the pieces of a durable step, soon."""
        for piece in step.pieces:
            self._queue.put(piece)

    def join(self) -> None:
        """Wait until all is compared.

        Raises:
            OutputError: the first piece that reads back differently or cannot be read.
        """
        self._queue.put(None)
        self._work_done.result()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End after the part that is being read; the files may be closed then."""
        self._stopped = True
        self._queue.put(None)
        self._pool.shutdown()

    def _work(self) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        while (piece := self._queue.get()) is not None:
            if self._stopped:
                return
            try:
                self._compare(piece, buffer)
            except OutputError as error:
                self.damaged.add(piece.step)
                self._error = self._error or error

    def _compare(self, piece: Written, buffer: memoryview) -> None:
        fd, info, path = self._place(piece.name)
        found = new_hash(self._algorithm)
        begin, end = info.begin + piece.begin, info.begin + piece.end
        forget(fd, begin, end - begin)
        for part in range(begin, end, len(buffer)):
            if self._stopped:  # whoever interrupts does not wait for a large tensor
                return
            hash_range(fd, part, min(part + len(buffer), end), found, buffer, path)
        if found.hexdigest() != piece.digest:
            raise OutputError(
                f"{path}: bytes {piece.begin} .. {piece.end} of {info.name!r} read back differently from what was "
                "written; the disk is failing or somebody else writes to it"
            )


def hash_range(fd: int, begin: int, end: int, into: Hash, buffer: memoryview, path: Path) -> None:
    """Hash bytes ``begin`` to ``end`` of a file; fewer where it ends early."""
    while begin < end:
        part = buffer[: min(len(buffer), end - begin)]
        with disk_errors(path):
            count = os.preadv(fd, [part], begin)
        if not count:
            return
        into.update(part[:count])
        begin += count


def forget(fd: int, begin: int, count: int) -> None:
    """Drop clean pages from the cache: what is read then comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, begin, count, os.POSIX_FADV_DONTNEED)
