"""The floor: read a checkpoint's bytes while as many bytes as an output has are written and fsynced.

python floor.py SRC OUT BYTES prints the seconds as JSON. One thread reads, one writes, each through a buffer that it
uses again and again; a third has the disk take what is written so far, so that the fsync at the end has little left.
That is the fastest of the plain ways: one fsync at the end alone takes 1.4 to 2 times as long.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BUFFER = 16 << 20
FLUSH = 256 << 20
"""Bytes written between two calls that have the disk take them; 32 MB to 512 MB make no difference."""


def read_all(files: Sequence[Path]) -> int:
    """Read every byte of ``files`` into one buffer and return how many there were."""
    buffer, total = bytearray(BUFFER), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total


def write_all(path: Path, nbytes: int) -> None:
    """Write ``nbytes`` bytes, which do not compress, to a new file, and fsync it and its folder."""
    buffer, begin = memoryview(os.urandom(BUFFER)), 0
    flushes: list[Future[None]] = []
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as flusher:
        while begin < nbytes:
            begin += file.write(buffer[: nbytes - begin]) or 0
            if begin // FLUSH > len(flushes):
                flushes.append(flusher.submit(os.fdatasync, file.fileno()))
        for flush in flushes:
            flush.result()
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` lasting."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def main() -> None:
    """Read and write at once, and print the seconds."""
    source, out, nbytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    files = sorted(source.glob("*.safetensors"))
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        writing, reading = pool.submit(write_all, out, nbytes), pool.submit(read_all, files)
        writing.result()
        reading.result()
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
