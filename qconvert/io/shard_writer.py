"""The write side for safetensors: headers first, tensors into their places in any order, visible at the end."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType, TracebackType

from qconvert.core.errors import OutputError, PlanError, SourceError
from qconvert.core.plan import Layout
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.committer import Committer, Finished, Written
from qconvert.io.disk import disk_errors, sync_folder
from qconvert.io.hashing import XXH3, new_hash
from qconvert.io.output_file import OutputFile, page_memory
from qconvert.io.partial_folder import PartialFolder
from qconvert.io.piece import Piece
from qconvert.io.read_back import DIFFERENT, READ_BYTES, Place, ReadBack
from qconvert.io.resume import Identity, begin_line, keep, steps_to_keep
from qconvert.io.safetensors_header import serialize_header
from qconvert.io.sink import Extra, Note
from qconvert.io.source_folder import INDEX_FILE, SINGLE_FILE, WEIGHTS_SUFFIX, open_regular, plain_name
from qconvert.io.write_behind import RING_BYTES, WriteBehind

PYTORCH_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""What engines expect in ``__metadata__``."""

BACKGROUND_BYTES = RING_BYTES + READ_BYTES
"""Memory that writing and reading back take beside the steps."""


class ShardWriter:
    """A ``Sink`` of safetensors files in a folder that appears when all of it is durable, and by default read back.

    Used as a context manager it removes what it wrote unless ``finish`` or ``suspend`` was reached. Join the threads
    that write before leaving.

    Attributes:
        algorithm: hash of the tensors.
        finished: notes of the steps that an earlier run has finished.
    """

    algorithm: str
    finished: Mapping[str, Note]

    def __init__(
        self,
        out: Path,
        layout: Layout,
        *,
        identity: Identity = MappingProxyType({}),
        fresh: bool = False,
        read_back: bool = True,
        algorithm: str = XXH3,
        metadata: Mapping[str, str] = PYTORCH_METADATA,
    ) -> None:
        """Create every file at its full size with its header, or go on with what an earlier run left.

        Args:
            out: folder to appear.
            layout: every tensor of every file.
            identity: what an earlier run must have had in common with this one, besides layout and algorithm.
            fresh: remove what an earlier run left instead of going on.
            read_back: compare every byte with its hash after it is durable, not only what an earlier run left.
            algorithm: hash of the tensors.
            metadata: of every file's header.

        Raises:
            PlanError: the layout has holes, overlaps, a name twice, or a file name that is not plain.
            OutputError: ``out`` exists, an earlier run left something else, or the disk refuses or has less room than
                the layout needs.
        """
        files = layout.by_file()
        headers = {shard: serialize_header(infos, metadata) for shard, infos in files.items()}
        _check_layout(layout, headers)
        self._layout = files
        self._tensors = {info.name: info for info in layout.tensors}
        self.algorithm = algorithm
        self._guard = threading.Lock()
        self._pieces: dict[str, tuple[Written, ...]] = {}
        self._open: dict[str, OutputFile] = {}
        self._background: tuple[WriteBehind, Committer, ReadBack] | None = None
        self._keeps = False
        self._folder = PartialFolder(out)
        try:
            identity = {**identity, "output layout": layout.hash, "hash": algorithm}
            steps = {} if fresh else steps_to_keep(self._folder, identity)
            if not steps:
                self._folder.start()
            for step in steps.values():
                self._add_step(step)
            self.finished = MappingProxyType({key: step.note for key, step in steps.items()})
            self._create_files(headers)
            if not steps:
                with disk_errors(self.path):
                    self._folder.journal.append([begin_line(identity)])
            comparing = ReadBack(self._place, algorithm)
            durable = comparing.expect if read_back else _nobody
            committer = Committer(self.path, self._folder.journal, durable)
            self._background = WriteBehind(committer), committer, comparing
            comparing.expect(list(steps.values()))
        except BaseException:
            self.suspend()
            raise

    @property
    def path(self) -> Path:
        """The hidden folder that is written to."""
        return self._folder.path

    def piece(self, name: str, begin: int = 0, end: int | None = None) -> Piece:
        """Bytes ``begin`` to ``end`` of tensor ``name``, by default all; see ``Sink``."""
        info = self._tensors.get(name)
        if info is None:
            raise OutputError(f"{self._folder.out}: {name!r} is not in the plan's layout")
        where = self._folder.out / info.shard
        last = info.nbytes if end is None else end
        if not 0 <= begin <= last <= info.nbytes:
            raise OutputError(f"{where}: bytes {begin} .. {last} do not fit into {name!r}, which has {info.nbytes}")
        return Piece(info, begin, last, self.algorithm, self._put, where)

    def commit(self, key: str, pieces: Iterable[Piece], note: Note = MappingProxyType({})) -> None:
        """Say that a step is done; see ``Sink``."""
        step = Finished(
            key, tuple(Written(key, piece.info.name, piece.begin, piece.end, piece.digest()) for piece in pieces), note
        )
        with self._guard:
            self._add_step(step)
        self._running()[0].commit(step)

    def flush(self) -> None:
        """Wait until all that was committed is durable; see ``Sink``."""
        write_behind, committer, _ = self._running()
        write_behind.flush()
        committer.flush()

    def finish(
        self, extra: Extra = MappingProxyType({}), accept: Callable[[Path], None] = lambda folder: None
    ) -> dict[str, str]:
        """Wait until all is durable and what shall be read back has been, add ``extra`` and the index, publish.

        ``accept`` sees the hidden folder as it will appear, and keeps it from appearing by raising.

        Raises:
            OutputError: a tensor is incomplete or reads back differently, a name of ``extra`` is taken or not plain,
                or the disk refuses. Nothing has appeared then.
            SourceError: a file to copy cannot be read.
        """
        self._check_complete()
        self.flush()
        self._running()[2].join()
        hashes = {name: self._hash(info) for name, info in self._tensors.items()}
        self._stop()
        added: set[str] = set()
        for name, content in chain(self._index().items(), extra.items()):
            if not plain_name(name) or name in added or name in self._layout:
                raise OutputError(f"{self._folder.out}: cannot add a file {name!r}: its name is taken or not plain")
            added.add(name)
            self._add(name, content(hashes) if callable(content) else content)
        accept(self.path)
        self._folder.publish()
        return hashes

    def suspend(self) -> bool:
        """Keep what is durable for a run that goes on, or remove it where that is nothing; whether it is kept.

        Steps that read back differently are not kept. Without effect after ``finish``.
        """
        self._keeps = True
        return keep(self._folder, self._stop())

    def abort(self) -> None:
        """Remove everything that was written; without effect after ``finish`` and ``suspend``."""
        self._stop()
        self._folder.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeps:
            self.suspend()  # a second interruption may have cut it short
        else:
            self.abort()

    def _create_files(self, headers: Mapping[str, bytes]) -> None:
        """Every file at its full size with its header; what is there already stays, and nothing else does."""
        sizes = {shard: infos[-1].end for shard, infos in self._layout.items()}
        with disk_errors(self.path):
            there = {entry.name: entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(self.path)}
            for name in there.keys() - sizes.keys():
                (self.path / name).unlink()
            free = shutil.disk_usage(self.path).free
        needed = sum(max(0, size - there.get(shard, 0)) for shard, size in sizes.items())
        if needed > free:
            raise OutputError(
                f"disk full: {self._folder.out} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "free some space or choose another disk"
            )
        for shard, header in headers.items():
            self._open[shard] = OutputFile(self.path / shard, sizes[shard], header)
        with disk_errors(self.path):
            sync_folder(self.path)

    def _put(self, info: TensorInfo, data: memoryview, offset: int) -> None:
        self._running()[0].write(self._open[info.shard], data, info.begin + offset)

    def _place(self, name: str) -> Place:
        info = self._tensors[name]
        return self._open[info.shard], info

    def _add_step(self, step: Finished) -> None:
        for piece in step.pieces:
            others = self._pieces.get(piece.name, ())
            for other in others:
                if other.begin < piece.end and piece.begin < other.end:
                    raise OutputError(
                        f"{self._folder.out}: bytes {piece.begin} .. {piece.end} of {piece.name!r} overlap "
                        f"{other.begin} .. {other.end}"
                    )
            self._pieces[piece.name] = (*others, piece)

    def _check_complete(self) -> None:
        for name, info in self._tensors.items():
            position = 0
            for piece in sorted(self._pieces.get(name, ()), key=lambda piece: piece.begin):
                if piece.begin != position:
                    break
                position = piece.end
            if position != info.nbytes:
                raise OutputError(
                    f"{self._folder.out / info.shard}: {name!r} is incomplete, "
                    f"{position} of {info.nbytes} bytes were written without a gap"
                )

    def _hash(self, info: TensorInfo) -> str:
        pieces = self._pieces.get(info.name, ())
        if len(pieces) == 1:
            return pieces[0].digest
        whole, file, memory = new_hash(self.algorithm), self._open[info.shard], page_memory(READ_BYTES)
        for piece in sorted(pieces, key=lambda piece: piece.begin):
            alone = new_hash(self.algorithm)
            for part in file.read(info.begin + piece.begin, info.begin + piece.end, memory):
                whole.update(part)
                alone.update(part)
            if alone.hexdigest() != piece.digest:  # nobody may have looked before
                where = f"{file.path}: bytes {piece.begin} .. {piece.end} of {piece.name!r}"
                raise OutputError(f"{where} {DIFFERENT}")
        return whole.hexdigest()

    def _index(self) -> dict[str, Iterable[bytes]]:
        return {} if list(self._layout) == [SINGLE_FILE] else {INDEX_FILE: self._index_parts()}

    def _index_parts(self) -> Iterator[bytes]:
        """The index line by line: as one text it would be the largest thing of a run."""
        total = sum(info.nbytes for info in self._tensors.values())
        yield f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'.encode()
        separator = "\n    "
        for name in sorted(self._tensors):
            pair = [json.dumps(text, ensure_ascii=False) for text in (name, self._tensors[name].shard)]
            yield f"{separator}{': '.join(pair)}".encode()
            separator = ",\n    "
        yield b"\n  }\n}\n"

    def _add(self, name: str, content: bytes | Path | Iterable[bytes]) -> None:
        path = self.path / name
        parts = [content] if isinstance(content, bytes) else content
        with disk_errors(path), path.open("wb") as file:
            for part in _file_parts(parts) if isinstance(parts, Path) else parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    def _running(self) -> tuple[WriteBehind, Committer, ReadBack]:
        if self._background is None:
            raise OutputError(f"{self._folder.out}: nothing can be written after the end")
        return self._background

    def _stop(self) -> set[str]:
        """End what goes on in the background and close the files; steps that have read back differently so far."""
        damaged: set[str] = set()
        if self._background is not None:
            write_behind, committer, read_back = self._background
            write_behind.stop()
            committer.stop()
            read_back.stop()
            damaged = read_back.damaged
            self._background = None
        while self._open:
            self._open.popitem()[1].close()
        return damaged


def _check_layout(layout: Layout, headers: Mapping[str, bytes]) -> None:
    for shard, infos in layout.by_file().items():
        if infos[0].begin != len(headers[shard]):
            raise PlanError(
                f"{shard}: its first tensor is planned at byte {infos[0].begin}, "
                f"but its header ends at {len(headers[shard])}"
            )
        if not plain_name(shard) or not shard.endswith(WEIGHTS_SUFFIX):
            raise PlanError(f"the output layout has a file {shard!r}; expected a plain name ending in {WEIGHTS_SUFFIX}")
    if len({info.name for info in layout.tensors}) != len(layout.tensors):
        raise PlanError("the output layout names a tensor twice")


def _nobody(steps: Sequence[Finished]) -> None:
    """Nobody wants to know what is durable."""


def _file_parts(path: Path) -> Iterator[bytes]:
    """The file's bytes; closed when the last one is taken, or dropped."""
    fd = open_regular(path)
    try:
        while part := _read_part(fd, path):
            yield part
    finally:
        os.close(fd)


def _read_part(fd: int, path: Path) -> bytes:
    try:
        return os.read(fd, READ_BYTES)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
