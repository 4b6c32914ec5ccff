"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from qconvert.core.errors import OutputError
from qconvert.io.disk import disk_errors, sync_folder, write_at
from qconvert.io.journal import Journal

_CLAIM = b"qconvert %020d\n"
_CLAIM_BYTES = len(_CLAIM % 0)


class PartialFolder:
    """A hidden sibling of ``out`` that ``publish`` renames to ``out``, ``discard`` removes and ``leave`` keeps.

    A file beside it is locked from before the folder exists until it is gone, and says in it which inode the folder
    has. So at whatever point a run is killed, the next one can tell what it left behind from what a stranger made.
    What follows in that file is the journal of the run.

    Attributes:
        out: the folder to appear.
        path: where files are written until then, on the same filesystem.
        left_behind: whether an earlier run left the folder; it may be used as it is, or removed by ``start``.
        journal: what earlier runs and this one have finished in it.
    """

    def __init__(self, out: Path) -> None:
        """Take the lock; the hidden folder is not touched.

        Raises:
            OutputError: ``out`` exists, another run writes it, the lock is not ours, or the disk refuses.
        """
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at ``out``
        self.path = self.out.parent / f".{self.out.name}.partial"
        self._lock_path = self.path.with_name(f"{self.path.name}.lock")
        self._lock = -1
        self._new_parents: list[Path] = []
        try:
            with disk_errors(self._lock_path):
                self._new_parents = [parent for parent in self.out.parents if not parent.exists()]
                self._acquire()
                self.journal = Journal(self._lock, _CLAIM_BYTES)
                self.left_behind = self._is_claimed()
            if os.path.lexists(self.out):
                raise OutputError(f"{self.out} exists already; choose another output folder or remove it")
        except BaseException:
            self._give_back()
            raise

    def start(self) -> None:
        """Create the hidden folder, empty and with an empty journal; what an earlier run left is removed.

        Raises:
            OutputError: a folder that is not ours is in the way, or the disk refuses.
        """
        try:
            with disk_errors(self.path):
                self._clear()
                os.ftruncate(self._lock, 0)
                os.fsync(self._lock)  # before there is a folder that old lines could be taken to tell of
                self.path.mkdir()
                write_at(self._lock, memoryview(_CLAIM % self.path.stat().st_ino), 0)
                os.fsync(self._lock)
                sync_folder(self.path.parent)
        except BaseException:
            self.discard()
            raise
        self.journal = Journal(self._lock, _CLAIM_BYTES)  # one that was read would go on behind the old lines
        self.left_behind = False

    def publish(self) -> None:
        """Make the folder visible as ``out``, in one step, and durable.

        Raises:
            OutputError: ``out`` has appeared meanwhile, the folder or its lock is no longer ours, or the disk refuses.
        """
        if os.path.lexists(self.out):
            raise OutputError(f"{self.out} appeared while it was being written; it is left alone")
        with disk_errors(self.out):
            if not (_lies_at(self._lock, self._lock_path) and self._is_claimed()):
                raise OutputError(
                    f"{self.path} or its lock was removed while {self.out} was being written, so others may have "
                    "written there too; remove what is left of it and convert again"
                )
            sync_folder(self.path)
            try:
                self.path.rename(self.out)
                sync_folder(self.out.parent)
            except BaseException:  # an interruption too: what is said then is that nothing has appeared
                if not os.path.lexists(self.path):
                    self.out.rename(self.path)
                raise
        self._new_parents = []
        self._release()

    def discard(self) -> None:
        """Remove the folder; without effect after ``publish``."""
        if self._lock >= 0:
            with suppress(OSError, OutputError):
                if _lies_at(self._lock, self._lock_path):
                    self._clear()
            self._release()
        with suppress(OSError):  # somebody else uses them by now
            for parent in self._new_parents:
                parent.rmdir()

    @property
    def is_open(self) -> bool:
        """Whether the folder is still ours: neither published nor removed nor left."""
        return self._lock >= 0

    def leave(self) -> None:
        """Give the lock back and keep the folder for a run that goes on; without effect after ``publish``."""
        if self._lock >= 0:
            self._release()

    def _give_back(self) -> None:
        """Leave what an earlier run has finished, remove all else."""
        finished = False
        if self._lock >= 0:
            with suppress(OSError):
                finished = self._is_claimed() and bool(Journal(self._lock, _CLAIM_BYTES).read())
        if finished:
            self.leave()
        else:
            self.discard()

    def _acquire(self) -> None:
        while self._lock < 0:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # a run that failed has just removed the parents that it had made
            try:
                self._try_lock(fd)
                if _lies_at(fd, self._lock_path):  # if not, its last owner removed it before we had it
                    if not _CLAIM.startswith(os.pread(fd, 9, 0)):  # empty if killed before the claim
                        raise _in_the_way(self._lock_path)
                    self._lock = fd
            finally:
                if self._lock != fd:
                    os.close(fd)

    def _try_lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another conversion is writing {self.out}; wait for it or choose another folder"
            ) from None
        except OSError:
            if not os.fstat(fd).st_size:
                self._lock_path.unlink()  # no locks on this filesystem: it is nobody's
            raise

    def _is_claimed(self) -> bool:
        """Whether the folder is the one that the lock tells of."""
        try:
            return os.pread(self._lock, _CLAIM_BYTES, 0) == _CLAIM % self.path.lstat().st_ino
        except FileNotFoundError:
            return False

    def _clear(self) -> None:
        """Remove our folder, or an empty one: a run may be killed before it has claimed its own."""
        if self._is_claimed():
            os.ftruncate(self._lock, _CLAIM_BYTES)  # or, killed meanwhile, it would tell of files that are gone
            shutil.rmtree(self.path)
            return
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _in_the_way(self.path) from None

    def _release(self) -> None:
        with suppress(OSError):
            # By the claim the next run knows a folder that could not be removed.
            if _lies_at(self._lock, self._lock_path) and not self._is_claimed():
                self._lock_path.unlink()
        os.close(self._lock)
        self._lock = -1


def _lies_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _in_the_way(path: Path) -> OutputError:
    return OutputError(f"{path} is in the way and was not made by qconvert; move it away")
