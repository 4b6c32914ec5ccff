"""What a manifest holds of a whole file: its size and a hash, of a file with weights that of the header."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.io.hashing import Hash, new_hash
from qconvert.io.shard_file import ShardFile, open_shard
from qconvert.io.source_folder import WEIGHTS_SUFFIX, open_regular

_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and hash of a file.

    Attributes:
        nbytes: size of the file.
        digest: hash of its bytes; of a file with weights, hash of its header, for tensors have their own.
    """

    nbytes: int
    digest: str

    def line(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"bytes": self.nbytes, "hash": self.digest}


def record_file(path: Path, algorithm: str) -> FileRecord:
    """Read the file at ``path`` as far as its record needs.

    Raises:
        SourceError: it cannot be read, or has a header that contradicts itself.
    """
    if path.name.endswith(WEIGHTS_SUFFIX):
        shard = open_shard(path)
        os.close(shard.fd)
        return record_shard(shard, algorithm)
    fd = open_regular(path)
    try:
        digest = new_hash(algorithm)
        nbytes = os.fstat(fd).st_size
        hash_span(fd, 0, nbytes, digest, path)
    finally:
        os.close(fd)
    return FileRecord(nbytes=nbytes, digest=digest.hexdigest())


def record_shard(shard: ShardFile, algorithm: str) -> FileRecord:
    """The record of a file with weights."""
    digest = new_hash(algorithm)
    digest.update(memoryview(shard.raw))
    return FileRecord(nbytes=shard.nbytes, digest=digest.hexdigest())


def record_folder(folder: Path, algorithm: str, *, without: str) -> dict[str, FileRecord]:
    """Records of all files of a folder by name, except the one called ``without``.

    Raises:
        SourceError: as ``record_file``.
    """
    return {name: record_file(folder / name, algorithm) for name in sorted(os.listdir(folder)) if name != without}


def hash_span(
    fd: int, begin: int, end: int, into: Hash, path: Path, read: Callable[[int], None] = lambda count: None
) -> None:
    """Hash bytes ``begin`` to ``end`` of an open file piece by piece; ``read`` is told of each.

    Raises:
        SourceError: the disk refuses, or the file ends early.
    """
    buffer = memoryview(bytearray(min(_READ_BYTES, end - begin)))
    while begin < end:
        part = buffer[: min(len(buffer), end - begin)]
        try:
            count = os.preadv(fd, [part], begin)
        except OSError as error:
            raise SourceError(f"{path}: cannot read: {error.strerror}") from error
        if not count:
            raise SourceError(f"{path}: the file shrank while it was read: no byte {begin}")
        into.update(part[:count])
        begin += count
        read(count)
