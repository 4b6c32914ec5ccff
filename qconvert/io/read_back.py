"""What was written is read back from the disk and compared with its hash, beside the work that goes on."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qconvert.core.errors import OutputError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.committer import Finished, Written
from qconvert.io.hashing import Hash, new_hash
from qconvert.io.output_file import OutputFile, page_memory

READ_BYTES = 4 << 20
"""Bytes read at once."""

DIFFERENT = "read back differently from what was written; the disk is failing or somebody else writes to it"
"""What is said of a piece."""

Place = tuple[OutputFile, TensorInfo]


@dataclass(frozen=True, slots=True)
class _Expected:
    """A piece and where it lies in its file."""

    piece: Written
    file: OutputFile
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.file.path}: bytes {self.piece.begin} .. {self.piece.end} of {self.piece.name!r}"


class ReadBack:
    """Compares durable pieces in the order in which they come.

    Pieces that touch are read at one go: small ones alone would take as long as large ones.

    Attributes:
        damaged: steps whose pieces read back differently, or not at all.
    """

    def __init__(self, place: Callable[[str], Place], algorithm: str) -> None:
        """Begin to work; ``place`` gives a tensor's file and where it lies in it."""
        self._place = place
        self._algorithm = algorithm
        self._queue: queue.SimpleQueue[Sequence[Finished] | None] = queue.SimpleQueue()
        self._stopped = False
        self._error: OutputError | None = None
        self.damaged: set[str] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read back")
        self._work_done = self._pool.submit(self._work)

    def expect(self, steps: Sequence[Finished]) -> None:
        """Compare the pieces of durable steps, soon."""
        self._queue.put(steps)

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
        while (steps := self._queue.get()) is not None:
            for run in self._runs(steps):
                if self._stopped:
                    return
                try:
                    self._compare(run, memory)
                except OutputError as error:
                    self._add_damage(run, error)

    def _runs(self, steps: Sequence[Finished]) -> Iterator[deque[_Expected]]:
        """All pieces, those that touch each other together."""
        run: deque[_Expected] = deque()
        places = (self._expected(piece) for step in steps for piece in step.pieces)
        for expected in sorted(places, key=lambda each: (each.file.path, each.begin, each.end)):
            if run and (run[-1].file is not expected.file or run[-1].end != expected.begin):
                yield run
                run = deque()
            run.append(expected)
        if run:
            yield run

    def _expected(self, piece: Written) -> _Expected:
        file, info = self._place(piece.name)
        return _Expected(piece, file, info.begin + piece.begin, info.begin + piece.end)

    def _compare(self, run: deque[_Expected], memory: memoryview) -> None:
        """Take what is compared out of ``run``."""
        found = new_hash(self._algorithm)
        position = run[0].begin
        for part in run[0].file.read(position, run[-1].end, memory):
            if self._stopped:  # whoever interrupts does not wait for a large tensor
                return
            rest = part
            while rest:
                mine = rest[: run[0].end - position]
                found.update(mine)
                position += len(mine)
                rest = rest[len(mine) :]
                if position == run[0].end:
                    self._check(run.popleft(), found)
                    found = new_hash(self._algorithm)
        while run and run[0].begin == run[0].end:
            self._check(run.popleft(), found)
        if run:
            raise OutputError(f"{run[0]} cannot be read back, the file ends at {position}; somebody else changed it")

    def _check(self, expected: _Expected, found: Hash) -> None:
        if found.hexdigest() != expected.piece.digest:
            self._add_damage([expected], OutputError(f"{expected} {DIFFERENT}"))

    def _add_damage(self, pieces: Iterable[_Expected], error: OutputError) -> None:
        self.damaged.update(each.piece.step for each in pieces)
        self._error = self._error or error
