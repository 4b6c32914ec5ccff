"""`manifest.json` read line by line, sealed and checked field by field before any of it is believed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.plan import Folding
from qconvert.io.file_record import FileRecord
from qconvert.io.hashing import ALGORITHMS, SHA256, new_hash
from qconvert.io.source_folder import open_regular, plain_name
from qconvert.io.strict_json import parse_object
from qconvert.manifest import (
    CALIBRATION,
    END_LINE,
    MANIFEST_FILE,
    PACKAGE,
    REENCODING,
    SCALE_ERROR,
    SHARED_EXPERT,
    SOURCE_QUANTIZATION,
    TENSORS_LINE,
    seal_line,
)

_HEAD_BYTES = 32 << 20
"""More than any plan has decisions and files for."""

_LINE_BYTES = 1 << 16
_LARGEST = 2**63
_DECISION = {"role": str, "action": str, "reason": str, "tensors": int, "bytes": int}
_REENCODING = {"format": str, "allow_scale_rounding": bool}
_ENTRY = {"hash", "dtype", "shape", "decision", "source", "rows", "source_hash"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a manifest says of one output tensor.

    Attributes:
        digest: hash of its bytes.
        decision: number of its decision.
        source: source tensor that it was made from, rows ``begin`` to ``end``.
        source_hash: hash of these rows.
    """

    digest: str
    dtype: DType
    shape: tuple[int, ...]
    decision: int
    source: str
    begin: int
    end: int
    source_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a manifest says.

    Attributes:
        version: of the program that wrote it.
        algorithm: of all hashes.
        device: type of the device that rounded.
        config_hash: xxh3-128 of the source's ``config.json``.
        policy_hash: of the rules that decided.
        policy: these rules, as in a policy file.
        decisions: role, action, reason, count of tensors and bytes of each.
        sqnr_db: signal to rounding error by role path.
        source_quantization: what it says of a source that was quantized; ``None`` for one that was not.
        reencoding: how codes were moved, ``format`` and ``allow_scale_rounding``; ``None`` where matrices were rounded.
        scale_error: the largest relative error of a scale by role path, where codes were moved.
        folding: what became of the shared expert; ``None`` where it is stored as in the source.
        package: what was asked of an ONNX package; ``None`` for a checkpoint.
        calibration: method and text, where matrices were rounded by what their inputs look like; else ``None``.
        files: every file of the folder but the manifest.
        tensors: every output tensor.
    """

    version: str
    algorithm: str
    device: str
    config_hash: str
    policy_hash: str
    policy: tuple[Any, ...]
    decisions: tuple[Mapping[str, Any], ...]
    sqnr_db: Mapping[str, float | None]
    source_quantization: Mapping[str, Any] | None
    reencoding: Mapping[str, Any] | None
    scale_error: Mapping[str, float] | None
    folding: Folding | None
    package: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Entry]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the converted checkpoint ``folder``.

    Raises:
        SourceError: there is none, it was not written by qconvert, was changed since, or says what cannot be.
    """
    path = folder / MANIFEST_FILE
    if folder.is_dir() and not os.path.lexists(path):
        raise SourceError(
            f"{folder}: no {MANIFEST_FILE}, so nothing says what should be here; expected the output of "
            "`qconvert quantize` or `convert`"
        )
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            return _Reader(file, path).read()
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path

    def read(self) -> Manifest:
        raw = self._head()
        head = parse_object(raw.removesuffix(b",\n") + b"\n}", str(self._path))
        algorithm = self._one_of(head, "hash", ALGORITHMS)
        digits = 64 if algorithm == SHA256 else 32
        seal = new_hash(algorithm)
        seal.update(memoryview(raw + TENSORS_LINE))
        decisions = self._decisions(head)
        tensors: dict[str, Entry] = {}
        for line in self._lines():
            seal.update(memoryview(line))
            if line == END_LINE:
                break
            for name, block in parse_object(b"{" + line.rstrip(b",\n") + b"}", str(self._path)).items():
                if name in tensors:
                    raise self._lies(f"{name!r} occurs twice")
                tensors[name] = self._entry(name, block, digits, len(decisions))
        if self._file.read(_LINE_BYTES) != seal_line(seal.hexdigest()):
            raise SourceError(
                f"{self._path}: does not fit the seal in its last line, so it was damaged or changed after the "
                "conversion and vouches for nothing; restore it, or convert again"
            )
        return Manifest(
            version=self._text(head, "qconvert"),
            algorithm=algorithm,
            device=self._text(head, "device"),
            config_hash=self._text(head, "config_hash"),
            policy_hash=self._text(head, "policy_hash"),
            policy=self._policy(head),
            decisions=decisions,
            sqnr_db=self._sqnr(head),
            source_quantization=self._block(head, SOURCE_QUANTIZATION),
            reencoding=self._reencoding(head),
            scale_error=self._block(head, SCALE_ERROR),
            folding=self._folding(head),
            package=self._block(head, PACKAGE),
            calibration=self._block(head, CALIBRATION),
            files=self._files(head, digits),
            tensors=tensors,
        )

    def _head(self) -> bytes:
        lines: list[bytes] = []
        left = _HEAD_BYTES
        for line in self._lines():
            if line == TENSORS_LINE:
                return b"".join(lines)
            left -= len(line)
            if left < 0:
                break
            lines.append(line)
        raise self._lies(f"no {TENSORS_LINE.decode().strip()!r} on a line of its own")

    def _lines(self) -> Iterator[bytes]:
        while (line := self._file.readline(_LINE_BYTES)).endswith(b"\n"):
            yield line
        if line:
            raise self._lies(f"a line of {len(line):,} bytes or more that does not end")

    def _lies(self, what: str) -> SourceError:
        return SourceError(f"{self._path}: not as qconvert writes it: {what}; restore it, or convert again")

    def _text(self, block: Mapping[str, Any], key: str) -> str:
        value = block.get(key)
        if not isinstance(value, str) or not value.isprintable():
            raise self._lies(f"{key} is {_short(value)}, expected text")
        return value

    def _one_of(self, block: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
        value = self._text(block, key)
        if value not in known:
            raise self._lies(f"{key} is {_short(value)}, expected one of {', '.join(known)}")
        return value

    def _decisions(self, head: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        found = head.get("decisions")
        if not isinstance(found, list) or not all(
            isinstance(one, dict)
            and set(one) == set(_DECISION)
            and all(type(one[key]) is kind for key, kind in _DECISION.items())
            for one in found
        ):
            raise self._lies(f"decisions are not a list of {', '.join(_DECISION)}")
        return tuple(found)

    def _policy(self, head: Mapping[str, Any]) -> tuple[Any, ...]:
        found = head.get("policy")
        if not isinstance(found, list):
            raise self._lies(f"policy is {_short(found)}, expected a list of rules")
        return tuple(found)

    def _sqnr(self, head: Mapping[str, Any]) -> Mapping[str, float | None]:
        found = head.get("sqnr_db")
        if not isinstance(found, dict) or not all(value is None or type(value) is float for value in found.values()):
            raise self._lies(f"sqnr_db is {_short(found)}, expected numbers by role")
        return found

    def _block(self, head: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
        found = head.get(key)
        if key in head and not isinstance(found, dict):
            raise self._lies(f"{key} is {_short(found)}, expected an object")
        return found

    def _reencoding(self, head: Mapping[str, Any]) -> Mapping[str, Any] | None:
        found = self._block(head, REENCODING)
        if found is None:
            return None
        if set(found) != set(_REENCODING) or any(type(found[key]) is not kind for key, kind in _REENCODING.items()):
            raise self._lies(f"{REENCODING} is {_short(found)}, expected {', '.join(_REENCODING)}")
        return found

    def _folding(self, head: Mapping[str, Any]) -> Folding | None:
        if SHARED_EXPERT not in head:
            return None
        return Folding(self._one_of(head, SHARED_EXPERT, tuple(folding.value for folding in Folding)))

    def _files(self, head: Mapping[str, Any], digits: int) -> Mapping[str, FileRecord]:
        found = head.get("files")
        if not isinstance(found, dict):
            raise self._lies(f"files are {_short(found)}, expected sizes and hashes by name")
        files: dict[str, FileRecord] = {}
        for name, block in found.items():
            if not plain_name(name) or name == MANIFEST_FILE:
                raise self._lies(f"files has {name!r}, expected plain names of other files of this folder")
            if not isinstance(block, dict) or set(block) != {"bytes", "hash"} or not _is_count(block["bytes"]):
                raise self._lies(f"{name!r} is {_short(block)}, expected its bytes and its hash")
            files[name] = FileRecord(nbytes=block["bytes"], digest=self._digest(name, block["hash"], digits))
        return files

    def _entry(self, name: str, block: Any, digits: int, decisions: int) -> Entry:
        if not isinstance(block, dict) or set(block) != _ENTRY:
            raise self._lies(f"{name!r} is {_short(block)}, expected {', '.join(sorted(_ENTRY))}")
        dtype, shape, rows, decision = block["dtype"], block["shape"], block["rows"], block["decision"]
        if not isinstance(dtype, str) or dtype not in DType.__members__:
            raise self._lies(f"{name!r} has the element type {_short(dtype)}")
        if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
            raise self._lies(f"{name!r} has the shape {_short(shape)}")
        if not isinstance(rows, list) or len(rows) != 2 or not all(_is_count(n) for n in rows) or rows[0] > rows[1]:
            raise self._lies(f"{name!r} was made from the rows {_short(rows)}")
        if not _is_count(decision) or decision >= decisions:
            raise self._lies(f"{name!r} has decision {_short(decision)} of {decisions}")
        return Entry(
            digest=self._digest(name, block["hash"], digits),
            dtype=DType(dtype),
            shape=tuple(shape),
            decision=decision,
            source=self._text(block, "source"),
            begin=rows[0],
            end=rows[1],
            source_hash=self._digest(name, block["source_hash"], digits),
        )

    def _digest(self, name: str, value: Any, digits: int) -> str:
        if not isinstance(value, str) or len(value) != digits or not set(value) <= set("0123456789abcdef"):
            raise self._lies(f"{name!r} has the hash {_short(value)}, expected {digits} hexadecimal digits")
        return value


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
