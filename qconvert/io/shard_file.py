"""One safetensors file, open, with its header read and checked before any of it is believed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qconvert.core.errors import SourceError
from qconvert.io.safetensors_header import LENGTH_BYTES, Header, header_length, parse_header
from qconvert.io.source_folder import open_regular


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """An open file; closing ``fd`` is the owner's.

    Attributes:
        raw: the header's JSON with its padding, without the eight bytes of its length.
        nbytes: size of the whole file when it was opened.
    """

    fd: int
    header: Header
    raw: bytes
    nbytes: int


def open_shard(path: Path) -> ShardFile:
    """Open the file at ``path``, its links followed; its tensors get the file's name as shard.

    Raises:
        SourceError: it cannot be read, or its header contradicts itself or the file's size. Nothing stays open then.
    """
    fd = open_regular(path)
    try:
        nbytes = os.fstat(fd).st_size
        length = header_length(_read_at(fd, LENGTH_BYTES, 0, path), nbytes, str(path))
        raw = _read_at(fd, length, LENGTH_BYTES, path)
        if len(raw) < length:
            raise SourceError(
                f"{path}: the file shrank while its header was read, expected {length} bytes, found {len(raw)}"
            )
        header = parse_header(raw, nbytes, shard=path.name, where=str(path))
    except BaseException:
        os.close(fd)
        raise
    return ShardFile(fd=fd, header=header, raw=raw, nbytes=nbytes)


def _read_at(fd: int, count: int, offset: int, path: Path) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = os.pread(fd, count - len(parts), offset + len(parts))
        except OSError as error:
            raise SourceError(f"{path}: cannot read: {error.strerror}") from error
        if not part:
            break
        parts += part
    return bytes(parts)
