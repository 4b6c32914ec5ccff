"""What every writer does with files: one clear error, whole writes, durable folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.core.errors import OutputError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the operating system into an ``OutputError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"disk full while writing {path}; free some space or choose another disk") from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable, where its filesystem can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at byte ``offset`` of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
