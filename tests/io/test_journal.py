"""A journal holds what was appended, however it was cut short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qconvert.io.journal import Journal

START = 7
LINES = [{"identity": {"a": "b"}}, {"step": "é\n", "n": 1.1}, {"void": "x"}]


def journal_in(path: Path) -> tuple[int, Journal]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    return fd, Journal(fd, START)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    fd, journal = journal_in(tmp_path / "whole")
    for line in LINES:
        journal.append([line])
    os.close(fd)
    return (tmp_path / "whole").read_bytes()


def test_cut_anywhere_it_holds_the_lines_before_and_takes_new_ones(tmp_path: Path, whole: bytes) -> None:
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == len(LINES)
    for size in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:size])
        fd, journal = journal_in(path)
        before = LINES[: sum(end <= size for end in ends)]
        assert journal.read() == before
        journal.append([{"new": size}])
        assert Journal(fd, START).read() == [*before, {"new": size}]
        os.close(fd)


def test_no_line_with_a_changed_byte_counts(tmp_path: Path, whole: bytes) -> None:
    first = whole.index(b"\n", START) + 1
    for n in range(first, len(whole)):
        path = tmp_path / "changed"
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
        fd, journal = journal_in(path)
        found = journal.read()
        assert found == LINES[: len(found)]
        assert len(found) <= 1 + whole[first:n].count(b"\n")
        os.close(fd)
