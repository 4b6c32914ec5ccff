"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qconvert.core.errors import OutputError

MARKER = ".qconvert-partial"
"""Tells a folder of ours from anybody else's; locked while somebody writes beside it."""


class PartialFolder:
    """A hidden sibling of ``out`` that ``publish`` renames to ``out`` and ``discard`` removes.

    Attributes:
        out: the folder to appear.
        path: where files are written until then, on the same filesystem.
    """

    def __init__(self, out: Path) -> None:
        """Create the hidden folder; one that a killed run left behind is removed first.

        Raises:
            OutputError: ``out`` exists, or the hidden folder exists and is not ours or in use, or cannot be created.
        """
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at ``out``
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._lock = -1
        if os.path.lexists(self.out):
            raise OutputError(f"{self.out} exists already; choose another output folder or remove it")
        self._new_parents = [parent for parent in self.out.parents if not parent.exists()]
        with disk_errors(self.path):
            try:
                self._create()
            except OSError:
                self._remove_new_parents()
                raise

    def publish(self) -> None:
        """Make the folder visible as ``out``, in one step, and durable.

        Raises:
            OutputError: ``out`` has appeared meanwhile, or the disk refuses.
        """
        if os.path.lexists(self.out):
            raise OutputError(f"{self.out} appeared while it was being written; it is left alone")
        with disk_errors(self.out):
            (self.path / MARKER).unlink()
            sync_folder(self.path)
            self.path.rename(self.out)
            try:
                sync_folder(self.out.parent)
            except OSError:
                self.out.rename(self.path)
                raise
        self._release()

    def discard(self) -> None:
        """Remove the folder; without effect after ``publish``."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_new_parents()
        self._release()

    def _create(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir()
        except FileExistsError:
            self._take_over()
            self.path.mkdir()
        try:
            self._lock = os.open(self.path / MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _remove_new_parents(self) -> None:
        with suppress(OSError):  # somebody else uses them by now
            for parent in self._new_parents:
                parent.rmdir()

    def _release(self) -> None:
        os.close(self._lock)
        self._lock = -1

    def _take_over(self) -> None:
        marker = self.path / MARKER
        if not marker.exists() and not self.path.is_symlink() and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()  # killed before the marker was written
            return
        if self.path.is_symlink() or not marker.is_file():
            raise OutputError(f"{self.path} is in the way and was not made by qconvert; move it away")
        fd = os.open(marker, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path)
        except BlockingIOError:
            raise OutputError(
                f"another conversion is writing {self.out}; wait for it or choose another folder"
            ) from None
        finally:
            os.close(fd)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the operating system into an ``OutputError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"disk full while writing {path}; free some space or choose another disk") from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


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
