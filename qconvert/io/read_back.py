"""What was written is read back from the disk and compared with its hash, beside the work that goes on."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from qconvert.core.errors import OutputError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.committer import Finished, Written
from qconvert.io.hashing import new_hash
from qconvert.io.output_file import OutputFile, page_memory

READ_BYTES = 4 << 20
"""Bytes read at once."""

Place = tuple[OutputFile, TensorInfo]


class ReadBack:
    """Compares durable pieces in the order in which they come.

    Attributes:
        damaged: steps whose pieces read back differently, or not at all.
    """

    def __init__(self, place: Callable[[str], Place], algorithm: str) -> None:
        """Begin to work; ``place`` gives a tensor's file and where it lies in it."""
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
        memory = page_memory(READ_BYTES)
        while (piece := self._queue.get()) is not None:
            if self._stopped:
                return
            try:
                self._compare(piece, memory)
            except OutputError as error:
                self.damaged.add(piece.step)
                self._error = self._error or error

    def _compare(self, piece: Written, memory: memoryview) -> None:
        file, info = self._place(piece.name)
        found = new_hash(self._algorithm)
        for part in file.read(info.begin + piece.begin, info.begin + piece.end, memory):
            if self._stopped:  # whoever interrupts does not wait for a large tensor
                return
            found.update(part)
        if found.hexdigest() != piece.digest:
            raise OutputError(
                f"{file.path}: bytes {piece.begin} .. {piece.end} of {info.name!r} read back differently from what was "
                "written; the disk is failing or somebody else writes to it"
            )
