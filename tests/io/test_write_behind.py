"""What goes through the ring of memory and past the page cache lies in the file as if it had been written plainly."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import runpy
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.core.errors import OutputError
from qconvert.io import output_file, write_behind
from qconvert.io.committer import Finished
from qconvert.io.output_file import PAGE, OutputFile, page_memory
from qconvert.io.write_behind import WriteBehind

SIZE = 40 * PAGE + 77
MEMORY = page_memory(3 * PAGE)


class Told:
    """Stands for the committer: notes what was written when a step is handed over."""

    def __init__(self) -> None:
        self.written = 0
        self.steps: list[tuple[str, int]] = []

    def wrote(self, file: OutputFile, count: int) -> None:
        self.written += count

    def commit(self, step: Finished) -> None:
        self.steps.append((step.key, self.written))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that goes round often, and direct writes of single pages."""
    monkeypatch.setattr(write_behind, "RING_BYTES", 16 * PAGE)
    monkeypatch.setattr(write_behind, "WRITE_BYTES", 5 * PAGE)
    monkeypatch.setattr(output_file, "DIRECT_BYTES", PAGE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OutputFile]:
    made = OutputFile(tmp_path / "file", SIZE, b"head")
    yield made
    made.close()


def pieces_of(cuts: list[int]) -> list[tuple[int, int]]:
    bounds = sorted({4, SIZE, *cuts})
    return list(pairwise(bounds))


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(4, SIZE) | st.integers(1, 40).map(lambda n: n * PAGE), max_size=30), seed=st.integers()
)
def test_pieces_in_any_order_from_many_threads_become_the_file(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], seed: int
) -> None:
    content = random.Random(seed).randbytes(SIZE)
    pieces = pieces_of(cuts)
    random.Random(seed).shuffle(pieces)
    file, told = OutputFile(tmp_path_factory.mktemp("ring") / "file", SIZE, content[:4]), Told()
    behind = WriteBehind(told)  # type: ignore[arg-type]

    def write(piece: tuple[int, int]) -> None:
        begin, end = piece
        buffer = bytearray(content[begin:end])
        behind.write(file, memoryview(buffer), begin)
        buffer[:] = bytes(len(buffer))  # it is the caller's again
        behind.commit(Finished(f"{begin}", (), {}))

    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(write, pieces))
        behind.flush()
        file.sync()
        assert file.path.read_bytes() == content
        read = b"".join(bytes(part) for begin, end in pieces_of(cuts) for part in file.read(begin, end, MEMORY))
        assert read == content[4:]
    finally:
        behind.stop()
        file.close()
    assert {key for key, _ in told.steps} == {f"{begin}" for begin, _ in pieces}


def test_a_step_is_handed_over_when_all_before_it_is_written(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    told, gate, real = Told(), threading.Event(), OutputFile.write

    def first_one_is_slow(self: OutputFile, data: memoryview, offset: int) -> None:
        if offset == PAGE:
            gate.wait(10)
        real(self, data, offset)

    monkeypatch.setattr(OutputFile, "write", first_one_is_slow)
    behind = WriteBehind(told)  # type: ignore[arg-type]
    try:
        for n in range(1, 6):
            behind.write(file, memoryview(bytes(PAGE)), n * PAGE)
            behind.commit(Finished(f"{n}", (), {}))
        assert told.steps == []
        gate.set()
        behind.flush()
        assert [key for key, _ in told.steps] == ["1", "2", "3", "4", "5"]
        assert told.written == 5 * PAGE
    finally:
        gate.set()
        behind.stop()


def test_a_write_that_fails_comes_out_of_the_next_call(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    told = Told()
    behind = WriteBehind(told)  # type: ignore[arg-type]
    try:
        with pytest.raises(OutputError, match="disk full"):
            for n in range(1000):
                behind.write(file, memoryview(bytes(PAGE)), n % 30 * PAGE)
        with pytest.raises(OutputError, match="disk full"):
            behind.commit(Finished("step", (), {}))
        with pytest.raises(OutputError, match="disk full"):
            behind.flush()
        assert told.steps == []
    finally:
        behind.stop()


def test_after_the_end_nothing_is_taken_nor_held(file: OutputFile) -> None:
    behind = WriteBehind(Told())  # type: ignore[arg-type]
    behind.write(file, memoryview(bytes(PAGE)), 0)
    behind.flush()
    ring = weakref.ref(behind._ring.obj)
    for _ in range(2):
        behind.stop()
    assert ring() is None
    for call in (
        lambda: behind.write(file, memoryview(b"late"), 0),
        lambda: behind.commit(Finished("step", (), {})),
        behind.flush,
    ):
        with pytest.raises(OutputError, match="after the end"):
            call()


def test_a_filesystem_that_wants_more_than_pages_is_written_through_the_cache(
    file: OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, real, refused = file._direct, os.pwrite, []

    def picky(fd: int, data: memoryview, offset: int) -> int:
        if fd == direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    memory = page_memory(4 * PAGE)
    memory[:] = bytes(range(256)) * (4 * PAGE // 256)
    file.write(memory, PAGE)
    assert refused or direct < 0
    file.sync()
    assert file.path.read_bytes()[PAGE : 5 * PAGE] == bytes(memory)
    assert b"".join(bytes(part) for part in file.read(PAGE, 5 * PAGE, MEMORY)) == bytes(memory)


def test_a_thread_that_gives_direct_writes_up_leaves_others_their_descriptor(
    file: OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, real, first, given_up = file._direct, os.pwrite, threading.Event(), threading.Event()

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if fd != file._fd and not first.is_set():
            first.set()
            assert given_up.wait(10)
            return real(fd, data, offset)
        if fd == direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    memory = page_memory(2 * PAGE)
    memory[:] = bytes(range(256)) * (2 * PAGE // 256)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(file.write, memory[:PAGE], PAGE)
        assert first.wait(10) or direct < 0
        file.write(memory[PAGE:], 2 * PAGE)
        given_up.set()
        late.result()
    file.sync()
    assert file.path.read_bytes()[PAGE : 3 * PAGE] == bytes(memory)


def test_a_page_is_never_smaller_than_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a page in the cache that is written to directly meanwhile nobody can say what it holds."""
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 16)
    assert runpy.run_path(output_file.__file__)["PAGE"] == 1 << 16


@pytest.mark.parametrize(("code", "fails"), [(errno.EINTR, False), (errno.EOPNOTSUPP, False), (errno.ENOSPC, True)])
def test_setting_blocks_aside_goes_on_after_a_signal_and_stops_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: bool
) -> None:
    asked: list[int] = []

    class Libc:
        def fallocate(self, fd: int, *_: object) -> int:
            asked.append(fd)
            ctypes.set_errno(code)
            return -1 if len(asked) == 1 else 0

    monkeypatch.setattr(output_file, "_LIBC", Libc())
    if fails:
        with pytest.raises(OutputError, match="disk full"):
            OutputFile(tmp_path / "full", SIZE, b"head")
        return
    OutputFile(tmp_path / "file", SIZE, b"head").close()
    assert len(asked) == (2 if code == errno.EINTR else 1)


def test_reading_ends_where_the_file_does(file: OutputFile) -> None:
    assert sum(len(part) for part in file.read(SIZE - 10, SIZE + 10_000, MEMORY)) == 10
    os.truncate(file.path, PAGE)
    assert list(file.read(2 * PAGE, 3 * PAGE, MEMORY)) == []
    assert sum(len(part) for part in file.read(PAGE - 5, 3 * PAGE, MEMORY)) == 5
