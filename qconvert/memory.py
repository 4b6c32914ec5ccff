"""How much memory the process holds now, and how much more it could have."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

from qconvert.core.errors import PlanError

DEFAULT_MEMORY = 1 << 30
"""Bytes that a conversion may add to a process that sets no limit: other work in it is none of ours to count."""

LARGE_BLOCK = 8 << 20

_M_MMAP_THRESHOLD = -3
"""Of ``malloc.h``."""

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def resident_bytes() -> int:
    """Resident set size of the process; its peak where the system does not tell the current one."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_large_blocks() -> None:
    """Have the allocator give blocks of ``LARGE_BLOCK`` bytes back when they are freed, where it can (glibc).

    By itself it raises that size to that of the largest block that was freed, and keeps up to some 100 MB a thread.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def give_back() -> None:
    """Have it give back what it keeps of smaller ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes() -> int:
    """Memory that the process could take without others having to swap, within the limit of its container.

    Half of the machine's where the system does not tell.
    """
    free = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() // 2
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    return free if limit == "max" else max(0, min(free, int(limit) - resident_bytes()))


def working_memory(limit: int | None, beside: int = 0) -> int:
    """What steps may hold: what remains of a limit for the whole process, or of the default, less what goes beside.

    Raises:
        PlanError: nothing remains.
    """
    if limit is None:
        return DEFAULT_MEMORY - beside
    held = resident_bytes() + beside
    if held >= limit:
        raise PlanError(
            f"the process needs {held / 2**20:.0f} MiB before the first step, more than the limit of "
            f"{limit / 2**20:.0f} MiB: raise --max-memory"
        )
    return limit - held
