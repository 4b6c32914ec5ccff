"""The header of a safetensors file: read strictly, written deterministically.

A file is eight bytes with the header's length (little endian), the header (a JSON object padded with spaces), and
the bytes of all tensors side by side. Offsets in the JSON count from the end of the header; ``TensorInfo`` counts
from the start of the file. Source: the format's README in the ``safetensors`` package.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import PlanError, SourceError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.strict_json import parse_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The cap of the reference implementation; a longer header is refused before memory is taken for it."""

METADATA_KEY = "__metadata__"
_ALIGNMENT = 8
_LARGEST_SIZE = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one file holds.

    Attributes:
        tensors: in the order of their bytes.
        data_begin: first byte after the header, from the start of the file.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_begin: int


def header_length(first: bytes, file_size: int, where: str) -> int:
    """Length of the JSON from a file's ``first`` eight bytes, checked against the file before it is believed.

    Raises:
        SourceError: fewer than eight bytes, a length beyond the file or beyond ``MAX_HEADER_BYTES``.
    """
    if len(first) < LENGTH_BYTES:
        raise SourceError(
            f"{where}: no safetensors file, expected at least {LENGTH_BYTES} bytes, found {len(first)}; "
            "download it again"
        )
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{where}: no safetensors file, its header would be {length} bytes long (at most {MAX_HEADER_BYTES}); "
            "download it again"
        )
    if LENGTH_BYTES + length > file_size:
        raise SourceError(
            f"{where}: truncated inside its header, expected {LENGTH_BYTES + length} bytes or more, "
            f"found {file_size}; download it again"
        )
    return length


def parse_header(raw: bytes, file_size: int, *, shard: str, where: str) -> Header:
    """Read the JSON ``raw`` of a file of ``file_size`` bytes.

    Args:
        raw: the JSON with its padding, without the eight bytes of its length.
        file_size: of the whole file.
        shard: file name that the tensors get.
        where: what an error message calls the file.

    Raises:
        SourceError: JSON, names, types, shapes or offsets are wrong; tensors overlap, leave holes, or do not end
            where the file ends.
    """
    if not raw.startswith(b"{"):
        raise SourceError(f"{where}: no safetensors file, its header does not begin with '{{'")
    entries = parse_object(raw, f"{where}: header")
    metadata = _metadata(entries.pop(METADATA_KEY, {}), where)
    data_begin = LENGTH_BYTES + len(raw)
    tensors = [_tensor(name, entry, shard, data_begin, where) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    _check_tiling(tensors, data_begin, file_size, where)
    return Header(tensors=tuple(tensors), metadata=metadata, data_begin=data_begin)


def serialize_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its first tensor: length, JSON, spaces up to a multiple of eight.

    Metadata comes first with its keys sorted, then tensors in the order of their bytes. Only differences of offsets
    count: tensors placed from zero give the header that they have after it.

    Raises:
        PlanError: tensors that overlap, leave a hole or are not as long as their shape says, a name twice, or a
            header longer than readers accept.
    """
    ordered = sorted(tensors, key=lambda info: (info.begin, info.end))
    base = position = ordered[0].begin if ordered else 0
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    for info in ordered:
        if info.begin != position or info.nbytes != _nbytes(info.dtype, info.shape) or info.name in entries:
            raise PlanError(
                f"{info.shard}: {info.name!r} should be planned once, with {_nbytes(info.dtype, info.shape)} bytes "
                f"at {position}; found {info.nbytes} bytes at {info.begin}"
            )
        offsets = [info.begin - base, info.end - base]
        entries[info.name] = {"dtype": info.dtype.value, "shape": list(info.shape), "data_offsets": offsets}
        position = info.end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % _ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise PlanError(f"a header of {len(raw)} bytes for {len(ordered)} tensors in one file; use more files")
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _metadata(block: Any, where: str) -> dict[str, str]:
    if not isinstance(block, dict) or not all(isinstance(value, str) for value in block.values()):
        raise SourceError(f"{where}: header: {METADATA_KEY} should map strings to strings")
    return block


def _tensor(name: str, entry: Any, shard: str, data_begin: int, where: str) -> TensorInfo:
    here = f"{where}: {name!r}"
    if not name.isprintable() or not name:
        raise SourceError(f"{here}: a tensor name of printable characters is expected")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise SourceError(f"{here}: header entry should have dtype, shape and data_offsets, found {found}")
    dtype = _dtype(entry["dtype"], here)
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise SourceError(f"{here}: shape should be a list of whole numbers, found {_short(shape)}")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise SourceError(f"{here}: data_offsets should be two whole numbers, found {_short(offsets)}")
    begin, end = offsets
    expected = _nbytes(dtype, shape)
    if expected >= _LARGEST_SIZE or end - begin != expected:
        raise SourceError(
            f"{here}: {dtype} of shape {_short(shape)} takes {_short(expected)} bytes, "
            f"but its data_offsets {_short(offsets)} hold {_short(end - begin)}"
        )
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), shard=shard, begin=data_begin + begin, end=data_begin + end
    )


def _dtype(value: Any, here: str) -> DType:
    if not isinstance(value, str) or value not in DType.__members__:
        raise SourceError(
            f"{here}: element type {_short(value)} is not supported; known are {', '.join(DType.__members__)}"
        )
    return DType(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_SIZE


def _nbytes(dtype: DType, shape: Iterable[int]) -> int:
    """Bytes of a tensor, or ``_LARGEST_SIZE`` and more: a hostile shape costs no big-number arithmetic."""
    total = dtype.itemsize
    for n in shape:
        total *= n
        if not total or total >= _LARGEST_SIZE:
            break
    return total


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_tiling(tensors: list[TensorInfo], data_begin: int, file_size: int, where: str) -> None:
    position = data_begin
    before: TensorInfo | None = None
    for info in tensors:
        if info.begin < position and before is not None:
            raise SourceError(
                f"{where}: {info.name!r} begins at byte {info.begin}, inside {before.name!r}, which ends at {position}"
            )
        if info.begin > position:
            raise SourceError(
                f"{where}: {info.begin - position} bytes before {info.name!r} belong to no tensor "
                f"(byte {position} to {info.begin})"
            )
        if info.end > file_size:
            raise SourceError(
                f"{where}: truncated inside {info.name!r}, expected {max(i.end for i in tensors)} bytes, "
                f"found {file_size}; download it again"
            )
        position, before = info.end, info
    if position != file_size:
        raise SourceError(
            f"{where}: {file_size - position} bytes after the last tensor belong to no tensor "
            f"(expected a size of {position}, found {file_size})"
        )
