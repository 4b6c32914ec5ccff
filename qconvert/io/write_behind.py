"""Writes in the background, several at once, from memory that is used again and again."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qconvert.core.errors import OutputError
from qconvert.io.committer import Committer, Finished
from qconvert.io.output_file import PAGE, OutputFile, page_memory

RING_BYTES = 64 << 20
"""Bytes that wait to be written: what bridges a pause of the disk."""

WRITE_BYTES = 4 << 20
"""Largest single write."""

WRITES = 4
"""Writes on their way at once: a disk that sees one at a time idles between them."""


@dataclass(slots=True)
class _Write:
    """Bytes ``begin`` to ``end`` of all that ever went through the ring, on their way to a place in a file."""

    begin: int
    end: int
    file: OutputFile
    offset: int
    done: bool = False


class WriteBehind:
    """Takes bytes from any thread, writes them in threads of its own, and tells the committer of what is written.

    The memory is a ring: it comes free in the order in which it was taken. Bytes lie in it as in their file, modulo a
    page. Failures come out of the next call.
    """

    def __init__(self, committer: Committer) -> None:
        """Begin to work; whoever stops the committer stops this before."""
        self._committer = committer
        self._ring = page_memory(RING_BYTES)
        self._changed = threading.Condition()
        self._order: deque[_Write | Finished] = deque()
        self._waiting: deque[_Write] = deque()
        self._head = 0
        self._tail = 0
        self._stopped = False
        self._pool = ThreadPoolExecutor(WRITES, thread_name_prefix="write")
        self._workers: list[Future[None]] = []
        with self._changed:  # they look at each other
            self._workers += [self._pool.submit(self._work) for _ in range(WRITES)]
        for worker in self._workers:
            worker.add_done_callback(self._wake)

    def write(self, file: OutputFile, data: memoryview, offset: int) -> None:
        """Take a copy of ``data`` to write it at byte ``offset``; waits while the ring is full.

        Raises:
            OutputError: an earlier write failed, or this was stopped.
        """
        for begin in range(0, len(data), WRITE_BYTES):
            self._take(file, data[begin : begin + WRITE_BYTES], offset + begin)

    def commit(self, step: Finished) -> None:
        """Give a step to the committer when all that came before is written.

        Raises:
            OutputError: an earlier write failed, or this was stopped.
        """
        with self._changed:
            self._check()
            self._order.append(step)
            self._retire()

    def flush(self) -> None:
        """Wait until all is written and the committer knows of it.

        Raises:
            OutputError: a write failed, or this was stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._order or self._ended)
            self._check()

    def stop(self) -> None:
        """End after what is being written; the rest is dropped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown()
        self._ring.release()  # now, not when somebody collects garbage: the next conversion counts what is held

    def _take(self, file: OutputFile, data: memoryview, offset: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._fits(len(data), offset) or self._ended)
            self._check()
            begin, self._head = self._place(len(data), offset)
            # Copied under the lock: the interpreter lets no other thread run meanwhile anyway.
            self._ring[begin % RING_BYTES :][: len(data)] = data
            write = _Write(begin, self._head, file, offset)
            self._order.append(write)
            self._waiting.append(write)
            self._changed.notify_all()

    def _fits(self, count: int, offset: int) -> bool:
        return self._place(count, offset)[1] - self._tail <= RING_BYTES

    def _place(self, count: int, offset: int) -> tuple[int, int]:
        """Where the next ``count`` bytes lie in one piece, ``offset`` modulo a page: first, and one past the last."""
        begin = self._head + (offset - self._head) % PAGE
        if begin % RING_BYTES + count > RING_BYTES:
            begin = (begin // RING_BYTES + 1) * RING_BYTES + offset % PAGE
        return begin, begin + count

    @property
    def _ended(self) -> bool:
        return self._stopped or any(worker.done() for worker in self._workers)

    def _check(self) -> None:
        if self._stopped:
            raise OutputError("nothing can be written after the end")
        for worker in self._workers:
            if worker.done():
                worker.result()

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while (write := self._next()) is not None:
            start = write.begin % RING_BYTES
            write.file.write(self._ring[start : start + write.end - write.begin], write.offset)
            self._committer.wrote(write.file, write.end - write.begin)
            with self._changed:
                write.done = True
                self._retire()

    def _next(self) -> _Write | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            return None if self._ended else self._waiting.popleft()

    def _retire(self) -> None:
        """Let go of what is written, in order, and hand over the steps that come up to be next."""
        while self._order:
            match self._order[0]:
                case Finished() as step:
                    self._committer.commit(step)
                case _Write(done=True, end=end):
                    self._tail = end
                case _:
                    break
            self._order.popleft()
        self._changed.notify_all()
