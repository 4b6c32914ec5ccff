"""Every single write, sync and rename of a conversion fails in turn, and once the disk is full for good."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconvert.convert import convert
from qconvert.core.errors import OutputError, QconvertError
from qconvert.core.scheme import int4
from qconvert.io import committer, output_file
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.test_convert import digest
from tests.test_resume import finished

POLICY = default_policy(int4(32))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "src"
    make_tiny(folder, layers=1, experts=2, mtp=False, vision=False)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(source, out, POLICY, shard_bytes=200_000)
    return digest(out)


class Faults:
    """Counts the calls that can fail and lets the chosen one, and those after it if the disk is full, fail."""

    def __init__(self, at: int, number: int, *, lasting: bool) -> None:
        self.calls = 0
        self._at = at
        self._number = number
        self._lasting = lasting
        self._guard = threading.Lock()

    def meet(self) -> bool:
        """Whether the call that is made now fails."""
        with self._guard:
            self.calls += 1
            return self.calls == self._at or (self._lasting and self.calls > self._at)

    def error(self) -> OSError:
        return OSError(self._number, os.strerror(self._number))

    def install(self, patch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
        for name in names:
            patch.setattr(os, name, self._faulty(getattr(os, name), name))
        if "pwrite" in names:
            patch.setattr(Path, "open", self._opening(Path.open))

    def _faulty(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not self.meet():
                return real(*args)
            if name == "pwrite" and self.calls % 2:  # every other write has begun when it fails
                real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
            raise self.error()

        return call

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = real(path, mode, *args, **options)
            return _File(file, self) if mode == "wb" else file

        return opening


class _File:
    """A file that is written as a whole, whose writes can fail."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def write(self, data: bytes) -> int:
        if self._faults.meet():
            raise self._faults.error()
        written: int = self._file.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize(
    ("names", "number", "lasting"),
    [
        (("pwrite", "ftruncate"), errno.ENOSPC, True),
        (("pwrite", "ftruncate"), errno.EIO, False),
        (("fsync", "fdatasync", "rename"), errno.EIO, False),
    ],
)
def test_every_call_fails_once_and_nothing_is_lost(
    source: Path,
    expected: dict[str, str],
    tmp_path: Path,
    names: tuple[str, ...],
    number: int,
    lasting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(committer, "GROUP_BYTES", 1 << 14)  # so that there is something to go on from everywhere
    monkeypatch.setattr(output_file, "DIRECT_BYTES", output_file.PAGE)
    out = tmp_path / "out"
    at = went_on = 0
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(at, number, lasting=lasting)
            faults.install(patch, names)
            try:
                convert(source, out, POLICY, shard_bytes=200_000)
                failed = False
            except QconvertError:
                failed = True
        assert failed is not out.exists()
        went_on += bool(finished(out))
        if failed:
            convert(source, out, POLICY, shard_bytes=200_000)
        assert digest(out) == expected, at
        assert os.listdir(tmp_path) == ["out"]
        shutil.rmtree(out)
        if faults.calls < at:
            break
    # How many steps are made durable together, and so how many syncs there are, is a matter of the machine's load.
    assert at > (50 if "pwrite" in names else 8)
    assert went_on > 0


FULL_DISK = """
set -e
mount -t tmpfs -o size=$3 tmpfs "$2"
status=0
"$4" -c "$5" "$1" "$2" || status=$?
cp -r "$2/out" "$6"
test "$(ls -A "$2")" = out
exit $status
"""

CONVERT = """
import subprocess, sys
from pathlib import Path
from qconvert.cli.console import guarded
from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.io import committer, shard_writer
from qconvert.plan.policy import default_policy
committer.GROUP_BYTES = 1 << 14
shard_writer.shutil.disk_usage = lambda path: type("Usage", (), {"free": 1 << 40})  # it would be said before
source, disk = map(Path, sys.argv[1:])
def call():
    convert(source, disk / "out", default_policy(int4(32)), shard_bytes=200_000)
    return 0
full = guarded(call)
left = (disk / "out").exists()
subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
sys.exit(guarded(call) or left or full)
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this machine lets nobody mount a file system of their own")
def test_a_file_system_that_is_really_full(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    arguments = [source, tmp_path / "disk", "300k", sys.executable, CONVERT, tmp_path / "kept"]
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == OutputError.exit_code, ended.stderr
    assert "disk full while writing" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert digest(tmp_path / "kept") == expected


def test_a_limit_on_the_size_of_files_is_one_error(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            convert(source, tmp_path / "out", POLICY, shard_bytes=200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []
    convert(source, tmp_path / "out", POLICY, shard_bytes=200_000)
    assert digest(tmp_path / "out") == expected
