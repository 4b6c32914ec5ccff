"""The write side for safetensors: headers first, tensors into their places in any order, visible at the end."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
import xxhash
from torch import Tensor

from qconvert.core.errors import OutputError, PlanError, SourceError
from qconvert.core.plan import Layout
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import byte_view
from qconvert.io.partial_folder import PartialFolder, disk_errors, write_at
from qconvert.io.safetensors_header import serialize_header
from qconvert.io.sink import Bytes, Extra
from qconvert.io.source_folder import INDEX_FILE, SINGLE_FILE, WEIGHTS_SUFFIX, open_regular, plain_name

PYTORCH_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""What engines expect in ``__metadata__``."""

_READ_BYTES = 8 << 20


@dataclass(slots=True)
class _Written:
    """Pieces of one tensor that are on disk: (begin, end) -> xxh3-128."""

    info: TensorInfo
    pieces: dict[tuple[int, int], bytes] = field(default_factory=dict)


class ShardWriter:
    """A ``Sink`` of safetensors files in a folder that appears when all of it is written and read back.

    Used as a context manager it removes what it wrote unless ``finish`` was reached. Join the threads that write
    before leaving.
    """

    def __init__(self, out: Path, layout: Layout, metadata: Mapping[str, str] = PYTORCH_METADATA) -> None:
        """Create every file at its full size with its header.

        Raises:
            PlanError: the layout has holes, overlaps, a name twice, or a file name that is not plain.
            OutputError: ``out`` exists, or the disk refuses or has less room than the layout needs.
        """
        files = layout.by_file()
        headers = {shard: serialize_header(infos, metadata) for shard, infos in files.items()}
        for shard, infos in files.items():
            if infos[0].begin != len(headers[shard]):
                raise PlanError(
                    f"{shard}: its first tensor is planned at byte {infos[0].begin}, "
                    f"but its header ends at {len(headers[shard])}"
                )
        self._written = {info.name: _Written(info) for info in layout.tensors}
        if len(self._written) != len(layout.tensors):
            raise PlanError("the output layout names a tensor twice")
        bad = next((shard for shard in files if not plain_name(shard) or not shard.endswith(WEIGHTS_SUFFIX)), None)
        if bad is not None:
            raise PlanError(f"the output layout has a file {bad!r}; expected a plain name ending in {WEIGHTS_SUFFIX}")
        self._files = files
        self._guard = threading.Lock()
        self._fds: dict[str, int] = {}
        self._folder = PartialFolder(out)
        try:
            self._check_room(layout.nbytes + sum(map(len, headers.values())))
            for shard, raw in headers.items():
                self._create(shard, raw, files[shard][-1].end)
        except BaseException:
            self.abort()
            raise

    @property
    def path(self) -> Path:
        """The hidden folder that is written to."""
        return self._folder.path

    def write(self, name: str, data: Tensor | Bytes, offset: int = 0) -> None:
        """Put ``data`` at byte ``offset`` of tensor ``name``; any order, any thread.

        A tensor must have the element type of the layout and is written as it lies in row-major order. The same
        piece may be written again; pieces that overlap otherwise may not.

        Raises:
            OutputError: unknown tensor, another element type, bytes outside the tensor or over another piece, or
                the disk refuses.
        """
        written = self._written.get(name)
        if written is None:
            raise OutputError(f"{self._folder.out}: {name!r} is not in the plan's layout")
        info = written.info
        where = self._folder.out / info.shard
        view = _bytes_of(data, info, where)
        end = offset + len(view)
        if offset < 0 or end > info.nbytes:
            raise OutputError(f"{where}: bytes {offset} .. {end} do not fit into {name!r}, which has {info.nbytes}")
        if not view:
            return
        with self._guard:
            for begun, ended in written.pieces:
                if begun < end and offset < ended and (begun, ended) != (offset, end):
                    raise OutputError(f"{where}: bytes {offset} .. {end} of {name!r} overlap {begun} .. {ended}")
        digest = xxhash.xxh3_128_digest(view)
        with disk_errors(where):
            write_at(self._fds[info.shard], view, info.begin + offset)
        with self._guard:
            written.pieces[offset, end] = digest

    def finish(self, extra: Extra = MappingProxyType({})) -> dict[str, str]:
        """Check completeness, make the files durable, read every byte back, add ``extra`` and the index, publish.

        Returns:
            xxh3-128 of every tensor's bytes as read back.

        Raises:
            OutputError: a tensor is incomplete or reads back differently, a name of ``extra`` is taken or not plain,
                or the disk refuses. Nothing is left behind.
            SourceError: a file to copy cannot be read.
        """
        try:
            self._check_complete()
            for shard, fd in self._fds.items():
                with disk_errors(self._folder.out / shard):
                    os.fsync(fd)
                    _forget(fd)
            hashes = {name: self._read_back(written) for name, written in self._written.items()}
            self._close()
            for name, content in chain(self._index().items(), extra.items()):
                self._add(name, content(hashes) if callable(content) else content)
            self._folder.publish()
        except BaseException:
            self.abort()
            raise
        return hashes

    def abort(self) -> None:
        """Remove everything that was written; without effect after ``finish``."""
        self._close()
        self._folder.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _check_room(self, needed: int) -> None:
        with disk_errors(self.path):
            free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"disk full: {self._folder.out} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "free some space or choose another disk"
            )

    def _create(self, shard: str, header: bytes, size: int) -> None:
        path = self.path / shard
        with disk_errors(path):
            fd = self._fds[shard] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.ftruncate(fd, size)
            write_at(fd, memoryview(header), 0)

    def _check_complete(self) -> None:
        for name, written in self._written.items():
            position = 0
            for begin, end in sorted(written.pieces):
                if begin != position:
                    break
                position = end
            if position != written.info.nbytes:
                raise OutputError(
                    f"{self._folder.out / written.info.shard}: {name!r} is incomplete, "
                    f"{position} of {written.info.nbytes} bytes were written without a gap"
                )

    def _read_back(self, written: _Written) -> str:
        info = written.info
        where = self._folder.out / info.shard
        whole = xxhash.xxh3_128()
        buffer = bytearray(min(_READ_BYTES, info.nbytes))
        for (begin, end), expected in sorted(written.pieces.items()):
            piece = xxhash.xxh3_128()
            for position in range(begin, end, _READ_BYTES):
                part = memoryview(buffer)[: min(_READ_BYTES, end - position)]
                with disk_errors(where):
                    count = os.preadv(self._fds[info.shard], [part], info.begin + position)
                piece.update(part[:count])
                whole.update(part[:count])
            if piece.digest() != expected:
                raise OutputError(
                    f"{where}: bytes {begin} .. {end} of {info.name!r} read back differently from what was written; "
                    "the disk is failing or somebody else writes to it"
                )
        return whole.hexdigest()

    def _index(self) -> dict[str, bytes]:
        if list(self._files) == [SINGLE_FILE]:
            return {}
        infos = [written.info for written in self._written.values()]
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos)},
            "weight_map": {info.name: info.shard for info in sorted(infos, key=lambda info: info.name)},
        }
        return {INDEX_FILE: (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")}

    def _add(self, name: str, content: bytes | Path) -> None:
        path = self.path / name
        if not plain_name(name) or os.path.lexists(path):
            raise OutputError(f"{self._folder.out}: cannot add a file {name!r}: its name is taken or not plain")
        source = None if isinstance(content, bytes) else open_regular(content)
        try:
            with disk_errors(path), path.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                elif source is not None:
                    while part := _read_part(source, content):
                        file.write(part)
                file.flush()
                os.fsync(file.fileno())
        finally:
            if source is not None:
                os.close(source)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def _bytes_of(data: Tensor | Bytes, info: TensorInfo, where: Path) -> memoryview:
    if not isinstance(data, Tensor):
        return memoryview(data).cast("B")
    if data.dtype != info.dtype.torch_dtype:
        raise OutputError(f"{where}: {info.name!r} is planned as {info.dtype}, but {data.dtype} was to be written")
    flat = data.detach().contiguous().view(-1)
    return byte_view(flat.view(torch.uint8))


def _forget(fd: int) -> None:
    """Drop clean pages from the cache: what is read back then comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_part(fd: int, path: Path) -> bytes:
    try:
        return os.read(fd, _READ_BYTES)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
