"""One output file, written and read past the page cache where the filesystem can.

Copying into the page cache costs more processor time than rounding does, and reading back from it would prove nothing
about the disk.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from qconvert.io.disk import disk_errors, write_at

PAGE = max(4096, mmap.PAGESIZE)
"""What offsets, lengths and addresses of direct transfers are multiples of.

No page of the cache may be written directly and through the cache at once, and there are kernels with pages of 64 KiB.
"""

DIRECT_BYTES = 1 << 16
"""Fewer whole pages go through the cache: a direct transfer waits for the disk each time."""

_LIBC = ctypes.CDLL(None, use_errno=True)


def page_memory(nbytes: int) -> memoryview:
    """Zeros that begin at the boundary of a page."""
    return memoryview(mmap.mmap(-1, nbytes))


class OutputFile:
    """A file of a known size. Any thread may write and read, in any order; whoever reads what is written syncs first.

    Attributes:
        path: for messages.
    """

    def __init__(self, path: Path, nbytes: int, head: bytes) -> None:
        """Create the file or open what is there, at its full size, and write its first bytes.

        Raises:
            OutputError: the disk refuses.
        """
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with disk_errors(path):
            self._fd = os.open(path, flags, 0o644)
            try:
                os.ftruncate(self._fd, nbytes)
                _reserve(self._fd, nbytes)
                write_at(self._fd, memoryview(head), 0)
                self._direct = _open_direct(path)
                self._writes_directly = self._direct >= 0
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at byte ``offset``.

        Whole pages go directly if ``data`` lies in memory as in the file: its address is ``offset`` modulo ``PAGE``.

        Raises:
            OutputError: the disk refuses.
        """
        begin, end = -(-offset // PAGE) * PAGE, (offset + len(data)) // PAGE * PAGE
        with disk_errors(self.path):
            if not self._writes_directly or end - begin < DIRECT_BYTES:
                write_at(self._fd, data, offset)
                return
            write_at(self._fd, data[: begin - offset], offset)
            self._write_pages(data[begin - offset : end - offset], begin)
            write_at(self._fd, data[end - offset :], end)

    def read(self, begin: int, end: int, memory: memoryview) -> Iterator[memoryview]:
        """Bytes ``begin`` to ``end`` as the disk has them, part after part; fewer where the file ends early.

        Args:
            begin: first byte.
            end: one past the last.
            memory: of ``page_memory``, whole pages; every part is a piece of it.

        Raises:
            OutputError: the disk refuses.
        """
        while begin < end:
            first = begin // PAGE * PAGE
            into = memory[: -(-end // PAGE) * PAGE - first]
            with disk_errors(self.path):
                count = self._read_pages(into, first)
            part = into[begin - first : min(count, end - first)]
            if not part:
                return
            yield part
            begin += len(part)

    def sync(self) -> None:
        """Make durable what is written.

        Raises:
            OutputError: the disk refuses; nothing is known of what was written since the last time.
        """
        with disk_errors(self.path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        """No thread may be writing or reading."""
        if self._direct >= 0:
            os.close(self._direct)
        os.close(self._fd)

    def _write_pages(self, data: memoryview, offset: int) -> None:
        try:
            write_at(self._direct, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # This filesystem wants more than pages. The descriptor stays open: other threads are using it.
            self._writes_directly = False
            write_at(self._fd, data, offset)

    def _read_pages(self, into: memoryview, offset: int) -> int:
        if self._direct >= 0:
            try:
                return os.preadv(self._direct, [into], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, len(into), os.POSIX_FADV_DONTNEED)
        return os.preadv(self._fd, [into], offset)


def _reserve(fd: int, nbytes: int) -> None:
    """Have the filesystem set all blocks aside, where it can.

    A full disk is found out at once then, and direct writes need not wait for blocks to be chosen: they took twice as
    long. ``os.posix_fallocate`` would write to every block where the filesystem cannot.
    """
    if sys.platform != "linux" or not nbytes:
        return
    while _LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:  # Python repeats only calls of its own
            raise OSError(code, os.strerror(code))


def _open_direct(path: Path) -> int:
    """A descriptor that goes past the page cache, or -1 where there is no such thing."""
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except AttributeError:
        return -1
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1
