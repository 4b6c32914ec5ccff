"""The read side: headers at once, bytes on demand into the caller's buffers.

Nothing is ever mapped: mapped pages count as memory of the process, and a mapped file that shrinks kills it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from qconvert.core.errors import SourceError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.quantization_beside import quantization_beside
from qconvert.io.shard_file import open_shard
from qconvert.io.source_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    SideFile,
    read_whole,
    survey,
)
from qconvert.io.strict_json import parse_object

READ_AHEAD_BYTES = 16 << 20
"""Of a tensor that are fetched before they are asked for; the system goes on by itself in what is read in order."""


class Checkpoint:
    """A folder with ``config.json`` and safetensors weights. Reading is positional: any thread, any order.

    Attributes:
        path: the folder.
        config: parsed ``config.json``; of a quantized checkpoint that is described beside it, with that description.
        tensors: name -> place, by shard and offset.
        side_files: what comes along unchanged; subfolders never do.
        left_out: name -> reason of the files that do not come along.
        config_hash: xxh3-128 of ``config.json``.
        header_hash: xxh3-128 over ``config.json``, every shard's name, size and header, and a description beside.
        file_hash: the same with every shard's time of modification: a cheap sign that the weights are the same.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[SideFile, ...]
    left_out: Mapping[str, str]
    config_hash: str
    header_hash: str
    file_hash: str

    def __init__(self, path: Path, *, package: bool = False) -> None:
        """Prefer ``Checkpoint.open``; whoever calls this closes it."""
        self.path = path
        self._fds: dict[str, int] = {}
        folder = survey(path, package=package)
        self.side_files = folder.side_files
        self.left_out = MappingProxyType(folder.left_out)
        config_bytes = read_whole(path / CONFIG_FILE)
        self.config = parse_object(config_bytes, str(path / CONFIG_FILE))
        self.config_hash = xxhash.xxh3_128_hexdigest(config_bytes)
        digest = xxhash.xxh3_128(_framed(config_bytes))
        times = xxhash.xxh3_128()
        tensors: dict[str, TensorInfo] = {}
        try:
            for shard in folder.shards:
                file = open_shard(path / shard)
                self._fds[shard] = file.fd
                times.update(_framed(str(os.fstat(file.fd).st_mtime_ns).encode()))
                digest.update(_framed(shard.encode()) + file.nbytes.to_bytes(8, "little") + _framed(file.raw))
                for info in file.header.tensors:
                    if info.name in tensors:
                        raise SourceError(f"{path}: {info.name!r} is in {tensors[info.name].shard} and in {shard}")
                    tensors[info.name] = info
            if folder.weight_map is not None:
                _check_index(path / INDEX_FILE, folder.weight_map, tensors)
            beside = quantization_beside(path, self.config, folder.left_out, tensors.values())
        except BaseException:
            self.close()
            raise
        self.tensors = MappingProxyType(tensors)
        if beside is not None:
            self.config, raw = beside
            digest.update(_framed(raw))
        self.header_hash = digest.hexdigest()
        digest.update(times.digest())
        self.file_hash = digest.hexdigest()

    @classmethod
    def open(cls, path: Path | str, *, package: bool = False) -> Checkpoint:
        """Read and check all headers of the folder ``path``; no weights are read.

        With ``package`` it is an ONNX package, whose tensors have the names of initializers.

        Raises:
            SourceError: no checkpoint, or one whose files contradict each other; the message names file and tensor.
        """
        return cls(Path(path), package=package)

    def read(
        self, name: str, begin: int | None = None, end: int | None = None, *, buffer: Tensor | None = None
    ) -> Tensor:
        """Rows ``begin .. end`` of a tensor, as stored.

        Rows are counted over all leading dimensions: an [E, N, K] tensor has E * N of them, and a part of it comes
        as [end - begin, K]. Rows of a 1-D tensor are its elements. Without bounds the tensor has its own shape.

        Args:
            name: the tensor.
            begin: first row, default the first.
            end: one past the last row, default the end.
            buffer: 1-D uint8 memory to read into; the result is a view of it. Default: new memory.

        Raises:
            SourceError: no such tensor, or the file ends early.
            IndexError: rows or buffer do not fit.
        """
        info = self._info(name)
        width = prod(info.shape[1:][-1:]) if info.shape else 1
        rows = info.numel // width if width else prod(info.shape[:-1])
        first = 0 if begin is None else begin
        last = rows if end is None else end
        if not 0 <= first <= last <= rows:
            raise IndexError(f"{name} has {rows} rows; {first} .. {last} is not a part of it")
        row_bytes = width * info.dtype.itemsize
        nbytes = (last - first) * row_bytes
        if buffer is None:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        elif buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < nbytes or not buffer.is_contiguous():
            raise IndexError(f"{nbytes} bytes of {name} need a 1-D uint8 buffer of that size")
        target = buffer[:nbytes]
        self._fill(info, byte_view(target), info.begin + first * row_bytes)
        whole = begin is None and end is None
        shape = info.shape if whole else (last - first, *info.shape[1:][-1:])
        return target.view(info.dtype.torch_dtype).view(shape)

    def will_read(self, name: str, begin: int, end: int) -> None:
        """Have the system fetch rows ``begin .. end`` of a tensor, counted as for ``read``, or the first of them.

        A hint: where the system takes none, and where the file is gone meanwhile, nothing happens.
        """
        info = self._info(name)
        if hasattr(os, "posix_fadvise"):
            length = min((end - begin) * info.row_bytes, READ_AHEAD_BYTES)
            with suppress(OSError):
                os.posix_fadvise(
                    self._fds[info.shard], info.begin + begin * info.row_bytes, length, os.POSIX_FADV_WILLNEED
                )

    def close(self) -> None:
        """Close all files; no thread may be reading."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise SourceError(f"{self.path}: no tensor {name!r}") from None

    def _fill(self, info: TensorInfo, target: memoryview, offset: int) -> None:
        where = f"{self.path / info.shard}: {info.name!r}"
        fd = self._fds[info.shard]
        done = 0
        while done < len(target):
            try:
                count = os.preadv(fd, [target[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"{where}: cannot read: {error.strerror}") from error
            if not count:
                raise SourceError(
                    f"{where}: the file shrank while it was read, expected bytes up to {info.end}, "
                    f"found the end at {offset + done}"
                )
            done += count


def byte_view(data: Tensor) -> memoryview:
    """The memory of a contiguous 1-D uint8 tensor, shared."""
    view: memoryview = data.numpy().data
    return view


def _framed(raw: bytes) -> bytes:
    """Length before content, so that no two sequences of parts hash alike."""
    return len(raw).to_bytes(8, "little") + raw


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if info is None:
            raise SourceError(f"{index}: {name!r} should be in {shard}, but is not; download both again")
        if info.shard != shard:
            raise SourceError(f"{index}: {name!r} should be in {shard}, but is in {info.shard}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise SourceError(f"{index}: does not name {name!r}, which is in {info.shard}; download both again")
