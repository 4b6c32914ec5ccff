"""A file of self-checking lines that says what a run has finished, for the run that goes on after it.

A line is the xxh3-64 of its content, the content as JSON, and a line feed. What a crash or a full disk left of a last
line does not check; it and whatever follows count for nothing and are written over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import xxhash

from qconvert.io.disk import write_at

_HASH_DIGITS = 16


class Journal:
    """Lines in an open file from byte ``start`` on. Appended lines are durable; one thread at a time."""

    def __init__(self, fd: int, start: int) -> None:
        """Look at the file that ``fd`` has open for reading and writing; closing it is the caller's."""
        self._fd = fd
        self._start = start
        self._end = start

    def read(self) -> list[Any]:
        """The contents of all lines that are whole; ``append`` goes on after them."""
        raw = os.pread(self._fd, max(0, os.fstat(self._fd).st_size - self._start), self._start)
        found: list[Any] = []
        position = 0
        while (end := raw.find(b"\n", position)) >= 0:
            line = raw[position:end]
            text = line[_HASH_DIGITS + 1 :]
            if line[: _HASH_DIGITS + 1] != _hash(text) + b" ":
                break
            found.append(json.loads(text))
            position = end + 1
        self._end = self._start + position
        return found

    def append(self, contents: Iterable[Any]) -> None:
        """Add lines and make them durable. After an ``OSError`` none of them counts."""
        lines = []
        for content in contents:
            text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
            lines.append(_hash(text) + b" " + text + b"\n")
        if not lines:
            return
        raw = b"".join(lines)
        write_at(self._fd, memoryview(raw), self._end)
        os.fsync(self._fd)
        self._end += len(raw)


def _hash(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()
