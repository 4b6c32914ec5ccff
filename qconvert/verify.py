"""Is a converted checkpoint what its manifest says, byte by byte, and what its source gives?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qconvert.core.errors import SourceError
from qconvert.core.fault import Fault
from qconvert.core.tensor_info import TensorInfo
from qconvert.device import check_device
from qconvert.io.file_record import FileRecord, hash_span, record_file, record_shard
from qconvert.io.hashing import new_hash
from qconvert.io.shard_file import ShardFile, open_shard
from qconvert.io.source_folder import INDEX_FILE, WEIGHTS_SUFFIX, read_whole
from qconvert.io.strict_json import parse_object
from qconvert.manifest import MANIFEST_FILE
from qconvert.manifest_reader import Manifest, read_manifest
from qconvert.memory import working_memory
from qconvert.rounding_by import By
from qconvert.run import CPU
from qconvert.verify_source import check_repeatable, compare_with_source, unlike_the_conversion

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        out: the folder that was looked at.
        source: what it was compared with; ``None`` if only with its manifest.
        tensors: output tensors that the manifest lists.
        nbytes: bytes of all files but the manifest, as it lists them.
        faults: everything that is not as it should be; empty for a good checkpoint.
        notes: why a fault may be none, one sentence each.
    """

    out: Path
    source: Path | None
    tensors: int
    nbytes: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "out": str(self.out),
            "source": None if self.source is None else str(self.source),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "faults": [asdict(fault) for fault in self.faults],
            "notes": list(self.notes),
        }


def verify(
    out: Path,
    source: Path | None = None,
    *,
    jobs: int = 2,
    max_memory: int | None = None,
    device: torch.device = CPU,
    by: By | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Verification:
    """Compare the folder ``out`` with its manifest and, where one is given, with its ``source``.

    Every file and tensor that the manifest lists is read and hashed, a piece at a time; nothing else may be there.
    With a source the conversion is done again without writing, and every byte is compared.

    Args:
        out: what ``convert`` made.
        source: the checkpoint that it was made from.
        jobs: steps of the conversion that run at once.
        max_memory: as for ``convert``.
        device: where matrices are rounded again; another one than the conversion's may round ties differently.
        by: what ``out`` was rounded by besides the weights of its source.
        progress: called with a phase, bytes done and bytes in all.

    Raises:
        UsageError: a device that is not there, or another calibration.
        SourceError: ``out`` has no manifest or one that vouches for nothing, or ``source`` is no checkpoint that can
            be converted.
        PlanError, FormatError, DataError: ``source`` cannot be converted as the manifest says.
    """
    check_device(device)
    manifest = read_manifest(out)
    if source is not None:
        check_repeatable(source, out, manifest, working_memory(max_memory), by)
    check = _Check(out, manifest, progress)
    try:
        check.files()
        check.index()
        check.missing()
        if source is not None:
            check.faults += compare_with_source(
                source,
                out,
                manifest,
                check.stored,
                jobs=jobs,
                memory=working_memory(max_memory),
                device=device,
                by=by,
                progress=lambda done, total: progress("repeating", done, total),
            )
    finally:
        check.close()
    return Verification(
        out=out,
        source=source,
        tensors=len(manifest.tensors),
        nbytes=check.total,
        faults=tuple(check.faults),
        notes=() if source is None else tuple(unlike_the_conversion(manifest, device)),
    )


@dataclass
class _Check:
    """Faults of a folder, collected.

    Attributes:
        stored: tensors that were found: the open file that each is in, and where.
        broken: files with weights that have no readable header.
    """

    out: Path
    manifest: Manifest
    progress: Progress
    faults: list[Fault] = field(default_factory=list)
    stored: dict[str, tuple[int, TensorInfo]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    homes: dict[str, str] = field(default_factory=dict)
    done: int = 0

    @property
    def total(self) -> int:
        return sum(record.nbytes for record in self.manifest.files.values())

    def files(self) -> None:
        try:
            there = set(os.listdir(self.out)) - {MANIFEST_FILE}
        except OSError as error:
            raise SourceError(f"cannot read {self.out}: {error.strerror}") from error
        for name in sorted(there - self.manifest.files.keys()):
            self._fault(name, None, f"not in {MANIFEST_FILE}; nothing else belongs here")
        for name, record in self.manifest.files.items():
            if name not in there:
                self.broken.add(name)
                self._fault(name, None, "missing")
            elif name.endswith(WEIGHTS_SUFFIX):
                self._weights(name, record)
            else:
                self._side_file(name, record)

    def index(self) -> None:
        """The index is what the headers say: readers follow it, not them."""
        weights = [name for name in self.manifest.files if name.endswith(WEIGHTS_SUFFIX)]
        if INDEX_FILE not in self.manifest.files:
            if len(weights) != 1:
                self._fault(INDEX_FILE, None, f"not listed, though there are {len(weights)} files with weights")
            self.homes = dict.fromkeys(self.manifest.tensors, weights[0]) if len(weights) == 1 else {}
            return
        try:
            found = parse_object(read_whole(self.out / INDEX_FILE), INDEX_FILE).get("weight_map")
        except SourceError:
            return  # it has been reported: it is missing, or has another hash
        if isinstance(found, dict):
            self.homes = {name: home for name, home in found.items() if isinstance(home, str)}
        for name, (_, info) in self.stored.items():
            home = self.homes.get(name)
            if home != info.shard:
                self._fault(INDEX_FILE, name, f"is in {info.shard}, but the index says {home}")
        for name in sorted(self.homes.keys() - self.stored.keys() - self.manifest.tensors.keys()):
            self._fault(INDEX_FILE, name, "is in no file")

    def missing(self) -> None:
        for name in self.manifest.tensors:
            if name not in self.stored:
                home = self.homes.get(name, MANIFEST_FILE)
                reason = ": its file is missing or damaged" if home in self.broken else ""
                self._fault(home, name, f"missing{reason}")

    def close(self) -> None:
        for fd in {fd for fd, _ in self.stored.values()}:
            os.close(fd)

    def _fault(self, file: str, tensor: str | None, what: str) -> None:
        self.faults.append(Fault(file=file, tensor=tensor, what=what))

    def _unreadable(self, name: str, error: SourceError) -> None:
        self._fault(name, None, str(error).removeprefix(f"{self.out / name}: "))

    def _compare(self, name: str, record: FileRecord, found: FileRecord, what: str) -> None:
        if found.nbytes != record.nbytes:
            self._fault(name, None, f"expected {record.nbytes} bytes, found {found.nbytes}")
        if found.digest != record.digest:
            self._fault(name, None, f"{what} has another hash: expected {record.digest}, found {found.digest}")

    def _side_file(self, name: str, record: FileRecord) -> None:
        try:
            self._compare(name, record, record_file(self.out / name, self.manifest.algorithm), "it")
        except SourceError as error:
            self._unreadable(name, error)
        self._advance(record.nbytes)

    def _weights(self, name: str, record: FileRecord) -> None:
        try:
            shard = open_shard(self.out / name)
        except SourceError as error:
            self.broken.add(name)
            self._unreadable(name, error)
            self._advance(record.nbytes)
            return
        try:
            self._compare(name, record, record_shard(shard, self.manifest.algorithm), "its header")
            self._tensors(name, shard)
        finally:
            if not any(fd == shard.fd for fd, _ in self.stored.values()):
                os.close(shard.fd)
        self._advance(max(0, record.nbytes - sum(info.nbytes for info in shard.header.tensors)))

    def _tensors(self, name: str, shard: ShardFile) -> None:
        for info in shard.header.tensors:
            entry = self.manifest.tensors.get(info.name)
            if info.name in self.stored:
                self._fault(name, info.name, f"is in {self.stored[info.name][1].shard} too")
                continue
            self.stored[info.name] = shard.fd, info
            if entry is None:
                self._fault(name, info.name, f"not in {MANIFEST_FILE}; nothing else belongs here")
                continue
            if (info.dtype, info.shape) != (entry.dtype, entry.shape):
                self._fault(
                    name,
                    info.name,
                    f"expected {entry.dtype} {list(entry.shape)}, found {info.dtype} {list(info.shape)}",
                )
            digest = new_hash(self.manifest.algorithm)
            try:
                hash_span(shard.fd, info.begin, info.end, digest, self.out / name, self._advance)
            except SourceError as error:
                self._fault(name, info.name, str(error).removeprefix(f"{self.out / name}: "))
                continue
            if digest.hexdigest() != entry.digest:
                self._fault(
                    name,
                    info.name,
                    f"its bytes have another hash: expected {entry.digest}, found {digest.hexdigest()}",
                )

    def _advance(self, count: int) -> None:
        self.done = min(self.done + count, self.total)
        self.progress("hashing", self.done, self.total)
