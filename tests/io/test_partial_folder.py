"""A folder appears whole or not at all, and nothing is left beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qconvert.core.errors import OutputError
from qconvert.io.partial_folder import PartialFolder

BUSY = "another conversion is writing"
EXISTS = "exists already"
FILES = ("one", "two", "three")


def started(out: Path) -> PartialFolder:
    folder = PartialFolder(out)
    folder.start()
    return folder


def fill(folder: PartialFolder, writer: str) -> None:
    for name in FILES:
        with (folder.path / name).open("x") as file:
            file.write(writer)


def writers(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in out.iterdir()}


def whole(writer: str) -> dict[str, str]:
    return dict.fromkeys(FILES, writer)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def leave_behind(out: Path) -> None:
    """What a killed run leaves: the kernel closes its lock."""
    folder = started(out)
    fill(folder, "killed")
    os.close(folder._lock)


def publish(out: Path, writer: str = "next") -> None:
    folder = started(out)
    fill(folder, writer)
    folder.publish()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.mark.parametrize("stale", [False, True])
def test_it_appears_whole_or_not_at_all(out: Path, stale: bool) -> None:
    if stale:
        leave_behind(out)
    folder = started(out)
    fill(folder, "me")
    assert not out.exists()
    folder.publish()
    folder.discard()
    assert writers(out) == whole("me")
    assert names(out.parent) == ["out"]


def test_discarded_it_takes_its_new_parents_along(tmp_path: Path) -> None:
    folder = started(tmp_path / "a" / "b" / "out")
    fill(folder, "me")
    folder.discard()
    folder.discard()
    assert names(tmp_path) == []


def test_of_what_was_there_before_it_takes_nothing(out: Path) -> None:
    leave_behind(out)
    started(out).discard()
    assert names(out.parent) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
@pytest.mark.parametrize("stale", [False, True])
def test_an_existing_output_is_left_alone(out: Path, kind: str, stale: bool) -> None:
    out.parent.mkdir()
    if stale:
        leave_behind(out)
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").touch()
    before = out.lstat()
    with pytest.raises(OutputError, match=EXISTS):
        started(out)
    assert names(out.parent) == ["out"]
    assert out.lstat() == before


def test_an_output_that_appears_meanwhile_is_left_alone(out: Path) -> None:
    folder = started(out)
    out.mkdir()
    with pytest.raises(OutputError, match="appeared while"):
        folder.publish()
    folder.discard()
    assert names(out.parent) == ["out"]
    assert names(out) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "dangling link"])
@pytest.mark.parametrize("name", [".out.partial", ".out.partial.lock"])
def test_a_stranger_in_the_way_is_left_alone(out: Path, tmp_path: Path, kind: str, name: str) -> None:
    stranger, target = out.with_name(name), tmp_path / "target"
    out.parent.mkdir()
    if kind == "file":
        stranger.write_text("mine")
    elif kind == "dangling link":
        stranger.symlink_to(target)
    else:
        (target if kind.startswith("link") else stranger).mkdir()
        if kind.startswith("link"):
            stranger.symlink_to(target)
        (stranger / "mine").touch()
    before = stranger.lstat()
    with pytest.raises(OutputError, match=r"/deep/\.out\.partial"):
        started(out)
    assert names(out.parent) == [name]
    assert (stranger.lstat().st_ino, stranger.lstat().st_mtime) == (before.st_ino, before.st_mtime)
    assert names(target) == ["mine"] if kind == "link to a folder" else not target.exists()


def test_a_stranger_that_replaced_what_a_killed_run_left_is_left_alone(out: Path) -> None:
    leave_behind(out)
    stranger = out.with_name(".out.partial")
    stranger.rename(out.with_name("moved"))  # keeps its inode in use
    stranger.mkdir()
    (stranger / "mine").touch()
    with pytest.raises(OutputError, match="not made by qconvert"):
        started(out)
    assert names(stranger) == ["mine"]


@pytest.mark.parametrize("call", ["mkdir", "open", "pwrite", "fsync", "flock", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ENOLCK])
def test_a_disk_that_refuses_is_one_error_and_leaves_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    folder: PartialFolder | None = None
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="out"):
        patch.setattr(fcntl if call == "flock" else os, call, refuse)
        folder = started(out)
        folder.publish()
    if folder is not None:
        folder.discard()
    assert names(out.parent.parent) == []


def test_what_cannot_be_removed_is_left_to_the_next_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = started(out)
    fill(folder, "me")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        folder.discard()
        with pytest.raises(OutputError, match="cannot write"):
            started(out)
    publish(out)
    assert writers(out) == whole("next")
    assert names(out.parent) == ["out"]


def test_killed_while_it_removes_what_was_left_its_journal_tells_of_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = started(out)
    fill(folder, "me")
    folder.journal.append(["one", "two", "three"])
    folder.leave()
    again = PartialFolder(out)
    assert len(again.journal.read()) == 3
    child = os.fork()
    if not child:
        monkeypatch.setattr(shutil, "rmtree", lambda path: os._exit(9))
        try:
            again.start()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    again.leave()
    after = PartialFolder(out)
    assert after.left_behind
    assert after.journal.read() == []
    after.discard()


def test_a_lock_that_somebody_removed_publishes_nothing_and_removes_nothing(out: Path) -> None:
    first = started(out)
    fill(first, "first")
    out.with_name(".out.partial.lock").unlink()
    with pytest.raises(OutputError, match="not made by qconvert"):
        started(out)
    with pytest.raises(OutputError, match="its lock was removed"):
        first.publish()
    shutil.rmtree(first.path)
    second = started(out)
    with pytest.raises(OutputError, match="its lock was removed"):
        first.publish()
    first.discard()
    fill(second, "second")
    second.publish()
    assert writers(out) == whole("second")
    assert names(out.parent) == ["out"]


def test_interrupted_after_the_rename_it_has_not_appeared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = started(out), os.fsync
    fill(folder, "me")

    def interrupted(fd: int) -> None:
        real(fd)
        if out.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted)
        folder.publish()
    assert not out.exists()
    folder.publish()
    assert writers(out) == whole("me")


def test_parents_that_vanish_are_made_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def late(*args: Any, **options: Any) -> int:
        monkeypatch.undo()
        out.parent.rmdir()  # as a run does that fails and had made it
        return real(*args, **options)

    monkeypatch.setattr(os, "open", late)
    publish(out)
    assert writers(out) == whole("next")
