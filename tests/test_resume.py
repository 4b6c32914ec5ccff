"""Whatever ends a run and whenever, the same command finishes it with the bytes of a run that nothing ended."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qconvert import carry_out as carrying
from qconvert.convert import convert
from qconvert.core.errors import DataError, Interrupted, OutputError, QconvertError
from qconvert.core.scheme import int4
from qconvert.execute import Fit, Folded, Loss, Outcome
from qconvert.io import committer, output_file, resume
from qconvert.io.committer import Finished
from qconvert.io.journal import Journal
from qconvert.io.partial_folder import _CLAIM_BYTES, PartialFolder
from qconvert.io.resume import lines_of_steps
from qconvert.io.write_behind import WriteBehind
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.test_convert import digest

POLICY = default_policy(int4(32))
KILLS = int(os.environ.get("QCONVERT_KILLS", "25"))
CALLS = ("open", "mkdir", "ftruncate", "pwrite", "preadv", "fdatasync", "fsync", "rename", "unlink")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "src"
    make_tiny(folder, shards=3)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(source, out, POLICY)
    return digest(out)


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A smaller source, and what becomes of it: as many kinds of calls, and few of each."""
    folder = tmp_path_factory.mktemp("little")
    make_tiny(folder / "src", layers=2, experts=2, mtp=False, vision=False)
    convert(folder / "src", folder / "out", POLICY)
    return folder / "src", digest(folder / "out")


@pytest.fixture(autouse=True)
def commit_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a few steps, so that there is something to go on from at every moment."""
    monkeypatch.setattr(committer, "GROUP_BYTES", 1 << 14)
    monkeypatch.setattr(output_file, "DIRECT_BYTES", output_file.PAGE)


def finished(out: Path) -> list[Finished]:
    """Steps that a run left behind."""
    lock = out.with_name(f".{out.name}.partial.lock")
    if not lock.exists():
        return []
    with lock.open("rb") as file:
        return [Finished.of_line(line) for line in lines_of_steps(Journal(file.fileno(), _CLAIM_BYTES))[1].values()]


def stop_after(steps: int, ending: Callable[[], BaseException]) -> Callable[[int, int], None]:
    """A progress function that ends the run when the journal must hold something."""
    seen = 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == steps:
            time.sleep(0.3)
            raise ending()

    return progress


def test_an_interruption_says_how_to_go_on_and_loses_nothing(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=r"the same command goes on .* --fresh"):
        convert(source, out, POLICY, progress=stop_after(60, KeyboardInterrupt))
    assert not out.exists()
    assert len(finished(out)) > 10
    amounts: list[int] = []
    convert(source, out, POLICY, progress=lambda done, total: amounts.append(done))
    assert amounts[0] > 0  # what was finished was not done again
    assert digest(out) == expected
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_interruption_loses_nothing_either(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, impatience = WriteBehind.stop, [KeyboardInterrupt]

    def stop(self: WriteBehind) -> None:
        real(self)
        if impatience:
            raise impatience.pop()

    monkeypatch.setattr(WriteBehind, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", POLICY, progress=stop_after(60, KeyboardInterrupt))
    assert not impatience
    assert len(finished(tmp_path / "out")) > 10


@pytest.mark.parametrize("change", ["policy", "source", "version", "shard size", "hash"])
def test_what_would_give_other_bytes_is_refused_with_the_reason(
    source: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(source, mine)
    with pytest.raises(Interrupted):
        convert(mine, out, POLICY, progress=stop_after(60, KeyboardInterrupt))
    left = len(finished(out))
    policy, shard_bytes, algorithm = POLICY, 5_000_000_000, "xxh3_128"
    match change:
        case "policy":
            policy, reason = default_policy(int4(32), search=True), "another policy"
        case "source":
            os.utime(next(mine.glob("*.safetensors")), ns=(1, 1))
            reason = "another source"
        case "version":
            monkeypatch.setattr(carrying, "__version__", "9.9")
            reason = r"another qconvert version \(.*, now 9\.9\)"
        case "shard size":
            shard_bytes, reason = 100_000, "another output layout"
        case _:
            algorithm, reason = "sha256", "another hash"
    again: dict[str, Any] = {"shard_bytes": shard_bytes, "algorithm": algorithm}
    with pytest.raises(OutputError, match=rf"{left:,} finished steps .*{reason}.*--fresh"):
        convert(mine, out, policy, **again)
    assert len(finished(out)) == left
    convert(mine, out, policy, fresh=True, **again)
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]


def test_a_journal_that_an_earlier_build_wrote_is_not_read_but_refused(source: Path, tmp_path: Path) -> None:
    """What notes of its steps look like nobody knows; its first line has no number."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, POLICY, progress=stop_after(60, KeyboardInterrupt))
    lock = out.with_name(f".{out.name}.partial.lock")
    with lock.open("r+b") as file:
        first, *lines = Journal(file.fileno(), _CLAIM_BYTES).read()
        del first["identity"]["journal format"]
        file.truncate(_CLAIM_BYTES)
        Journal(file.fileno(), _CLAIM_BYTES).append([first, *({"step": line["step"], "done": 1} for line in lines)])
    for _ in range(2):
        with pytest.raises(OutputError, match=rf"another journal format \(none, now {resume.FORMAT}\)") as refused:
            convert(source, out, POLICY)
        assert "finish it with the build that began it, or start over with --fresh" in str(refused.value)
    convert(source, out, POLICY, fresh=True)
    assert os.listdir(tmp_path) == ["out"]


def test_notes_of_steps_are_those_of_the_journals_number() -> None:
    """Where they change, ``resume.FORMAT`` does: a run of an earlier build could not go on from them."""
    note = {
        "source": "00",
        "loss": [0.1, 2.0],
        "scale_error": 0.5,
        "fit": {"nearest_loss": 2.0, "loss": 1.0, "tokens": 7, "support": "own", "inputs": 32},
        "folded": {
            "fold": "input", "exponent": 0.3, "strength": 0.1, "loss": 0.9, "flips": None, "given_up": False,
        },
    }  # fmt: skip
    outcome = Outcome(
        source_hash="00",
        loss=Loss(squared_error=0.1, signal=2.0),
        scale_error=0.5,
        fit=Fit(nearest_loss=2.0, loss=1.0, tokens=7, support="own", inputs=32),
        folded=Folded(fold="input", exponent=0.3, strength=0.1, loss=0.9),
    )
    assert resume.FORMAT == "2"
    assert outcome.note() == note
    assert Outcome.of_note(json.loads(json.dumps(note))) == outcome


def test_what_would_fail_again_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        convert(source, tmp_path / "out", POLICY, progress=stop_after(60, lambda: DataError("NaN")))
    assert os.listdir(tmp_path) == []


def faults(call: str) -> Iterator[tuple[int, Callable[[pytest.MonkeyPatch], list[int]]]]:
    """Each n with a way to make the n-th call of a system function fail, once: the disk is broken, or full, in turn."""

    def at(n: int, number: int) -> Callable[[pytest.MonkeyPatch], list[int]]:
        def install(patch: pytest.MonkeyPatch) -> list[int]:
            real, calls, guard = getattr(os, call), [0], threading.Lock()

            def faulty(*args: object, **options: object) -> object:
                with guard:
                    calls[0] += 1
                    mine = calls[0]
                if mine == n:
                    raise OSError(number, os.strerror(number))
                return real(*args, **options)

            patch.setattr(os, call, faulty)
            return calls

        return install

    n = 1
    for number in itertools.cycle((errno.EIO, errno.ENOSPC)):
        yield n, at(n, number)
        # Every call at first; later ones of the many writes and reads are alike.
        n += 1 if n < 12 else n // 4


@pytest.mark.parametrize("call", CALLS)
def test_after_a_fault_of_any_call_the_same_command_gives_the_same_bytes(
    little: tuple[Path, dict[str, str]], tmp_path: Path, call: str
) -> None:
    """test_resume_exhaustive.py has every write, sync and rename; reads and folders are here."""
    source, expected = little
    for n, install in faults(call):
        out = tmp_path / str(n) / "out"
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            calls = install(patch)
            try:
                convert(source, out, POLICY)
                failed = False
            except QconvertError:
                failed = True
                assert not out.exists()
        reached = calls[0]
        if failed:
            convert(source, out, POLICY)
        assert digest(out) == expected
        # A lock that could not be removed is nobody's; the next run to this folder uses it.
        assert set(os.listdir(out.parent)) - ({".out.partial.lock"} if call == "unlink" else set()) == {"out"}
        shutil.rmtree(out)
        if not failed and reached < n:  # some calls may fail
            break
    assert n > 1


def run_and_kill(source: Path, out: Path, after: float) -> bool:
    """Convert in a process that is killed ``after`` seconds; whether it was."""
    child = os.fork()
    if not child:
        try:
            convert(source, out, POLICY)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, draw = tmp_path / "out", random.Random(5)
    start = time.perf_counter()
    convert(source, out, POLICY)
    whole = time.perf_counter() - start
    shutil.rmtree(out)
    killed = went_on = 0
    while killed < KILLS:
        went_on += bool(finished(out))
        if run_and_kill(source, out, draw.uniform(0, 1.2 * whole)):
            killed += 1
        if out.exists():
            assert digest(out) == expected
            shutil.rmtree(out)
            assert not out.with_name(".out.partial").exists()
    convert(source, out, POLICY)
    assert digest(out) == expected
    assert went_on > 0


def test_a_run_after_one_that_was_killed_before_its_first_step_can_be_interrupted_too(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if not child:
        try:
            convert(source, out, POLICY, progress=lambda done, total: os._exit(9))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert out.with_name(".out.partial").exists()
    assert not finished(out)
    with pytest.raises(Interrupted):
        convert(source, out, POLICY, progress=stop_after(60, KeyboardInterrupt))
    assert len(finished(out)) > 10
    convert(source, out, POLICY)
    assert digest(out) == expected


def run_until_power_fails(source: Path, out: Path, disk: Path, at: int) -> bool:
    """Convert in a process that ends before its ``at``-th sync; whether it did.

    ``disk`` gets what was synced, by inode.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        return status == 9
    left, guard = at, threading.Lock()

    def cutting(real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            nonlocal left
            with guard:
                left -= 1
                if not left:
                    os._exit(9)
                real(fd)
                state = os.fstat(fd)
                if stat.S_ISREG(state.st_mode):
                    (disk / str(state.st_ino)).write_bytes(Path(f"/proc/self/fd/{fd}").read_bytes())

        return sync

    try:
        os.fsync, os.fdatasync = cutting(os.fsync), cutting(os.fdatasync)
        convert(source, out, POLICY)
        os._exit(0)
    finally:
        os._exit(1)


def lose_what_was_not_synced(folder: Path, disk: Path) -> None:
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        kept = disk / str(file.stat().st_ino)
        file.write_bytes(kept.read_bytes() if kept.exists() else b"")


def test_after_a_power_cut_at_any_sync_the_same_command_gives_the_same_bytes(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The disk has lost all that was not synced, as one with a large cache may."""
    cut, at, went_on = True, 0, 0
    while cut:
        at += 1 if at < 20 else 3
        out, disk = tmp_path / str(at) / "out", tmp_path / f"disk {at}"
        disk.mkdir()
        out.parent.mkdir()
        cut = run_until_power_fails(source, out, disk, at)
        lose_what_was_not_synced(out.parent, disk)
        went_on += bool(finished(out))
        # Cut after the rename, the lock is left; it is nobody's.
        left = {".out.partial.lock"} if cut and out.exists() else set()
        if not out.exists():
            convert(source, out, POLICY)
        assert digest(out) == expected
        assert set(os.listdir(out.parent)) - left == {"out"}
    assert went_on > 5


@pytest.mark.parametrize("read_back", [True, False])
def test_a_step_that_reads_back_differently_is_done_again(
    source: Path, expected: dict[str, str], tmp_path: Path, read_back: bool
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, POLICY, progress=stop_after(60, KeyboardInterrupt))
    shard = next(out.with_name(".out.partial").glob("*.safetensors"))
    name = finished(out)[0].pieces[0].name
    with shard.open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(header))[name]["data_offsets"]
        file.seek(8 + header + begin)
        byte = file.read(1)[0]
        file.seek(8 + header + begin)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(OutputError, match=f"'{name}' read back differently"):
        convert(source, out, POLICY, read_back=read_back)
    convert(source, out, POLICY, read_back=read_back)
    assert digest(out) == expected


def test_a_second_run_is_refused_while_the_first_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def meddle(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="another conversion is writing") as caught:
                PartialFolder(out)
            refused.append(str(caught.value))

    convert(source, out, POLICY, progress=meddle)
    assert refused


def test_bytes_do_not_depend_on_how_the_source_is_cut(expected: dict[str, str], tmp_path: Path) -> None:
    make_tiny(tmp_path / "one", shards=1)
    convert(tmp_path / "one", tmp_path / "out", POLICY)
    assert digest(tmp_path / "out") == expected
