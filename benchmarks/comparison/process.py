"""A command as a whole process: wall time, CPU seconds and peak memory of it and of everything that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

SAMPLES_PER_SECOND = 10
LAST_LINES = 20
LAST_BYTES = 1 << 16
BLOCK = 512
"""Bytes of what the kernel calls a block when it counts them for a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a command took.

    Attributes:
        wall: seconds from before its start until it was reaped.
        cpu: user and system seconds of the process and of the descendants that were waited for.
        peak_rss: bytes; the larger of the kernel's own peak of the largest process and of the sampled sum over the
            process and its descendants. Pages of mapped files count, in each process that maps them. It is at least
            what the starting process holds, from which the kernel counts on: start from a small one.
        disk_read: bytes that the disk was asked for, as the kernel counts them for the same processes as ``cpu``; what
            lay in the page cache is not among them.
        disk_written: bytes that were given to the disk or to the page cache on the way to it.
        code: exit status; negative is the signal that ended it.
        timed_out: it was killed because it took longer than it was given.
        last_words: the end of what it printed.
    """

    wall: float
    cpu: float
    peak_rss: int
    disk_read: int
    disk_written: int
    code: int
    timed_out: bool
    last_words: str


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants at this moment; 0 where ``/proc`` does not tell."""
    total, found = 0, [pid]
    while found:
        each = Path("/proc", str(found.pop()))
        try:
            total += int((each / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in (each / "task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # ended meanwhile, or no /proc of this kind
    return total


def run(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, timeout: float, folder: Path | None = None
) -> Taken:
    """Run ``command`` in ``folder``, its output going to ``log``, and kill its process group after ``timeout`` seconds.

    Raises:
        OSError: it cannot be started.
    """
    finished, peak, timed_out = Event(), [0], [False]
    with log.open("wb") as out:
        start = time.perf_counter()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=folder,
            start_new_session=True,
        )

        def watch() -> None:
            while not finished.wait(1 / SAMPLES_PER_SECOND):
                peak[0] = max(peak[0], resident(child.pid))
                if time.perf_counter() - start > timeout and not timed_out[0]:
                    timed_out[0] = True
                    os.killpg(child.pid, signal.SIGKILL)

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        finally:
            wall = time.perf_counter() - start
            finished.set()
            watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)  # reaped here: subprocess need not wait for it
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Taken(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak_rss=max(largest, peak[0]),
        disk_read=usage.ru_inblock * BLOCK,
        disk_written=usage.ru_oublock * BLOCK,
        code=child.returncode,
        timed_out=timed_out[0],
        last_words=_last_lines(log),
    )


def _last_lines(log: Path) -> str:
    """The end of a file that may be larger than this process should become."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        end = file.read()
    return "\n".join(end.decode(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


def failure(taken: Taken) -> str | None:
    """Why a command failed, in a line; ``None`` when it did not."""
    if taken.timed_out:
        return f"killed after {taken.wall:.0f} s"
    if taken.code == 0:
        return None
    spoken = [line.strip() for line in taken.last_words.splitlines() if line.strip()]
    how = f"exit status {taken.code}" if taken.code > 0 else f"signal {-taken.code}"
    return f"{how}: {spoken[-1][:200]}" if spoken else how
