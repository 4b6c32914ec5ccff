"""A folder appears whole and of one writer, whoever else is at it, and whenever somebody is killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from qconvert.core.errors import OutputError
from tests.io.test_partial_folder import BUSY, EXISTS, fill, leave_behind, names, publish, started, whole, writers


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def is_writing(out: Path) -> Callable[[], None]:
    folder = started(out)
    fill(folder, "first")
    return folder.publish


def has_published(out: Path) -> Callable[[], None]:
    publish(out, "first")
    return lambda: None


def has_given_up(out: Path) -> Callable[[], None]:
    started(out).discard()
    return lambda: None


def has_been_followed(out: Path) -> Callable[[], None]:
    started(out).discard()
    return is_writing(out)


BETWEEN: dict[Callable[[Path], Callable[[], None]], str | None] = {
    is_writing: BUSY,
    has_published: EXISTS,
    has_given_up: None,
    has_been_followed: BUSY,
}


@pytest.mark.parametrize("first", BETWEEN, ids=lambda first: str(first.__name__))
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("moment", [(os, "open"), (fcntl, "flock"), (os, "mkdir"), (os, "fstat"), (os, "pread")])
def test_another_run_between_any_two_calls(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[Path], Callable[[], None]],
    stale: bool,
    moment: tuple[object, str],
) -> None:
    """The first run does all that it does while the second is about to make a call."""
    if stale:
        leave_behind(out)
    owner, call = moment
    real = getattr(owner, call)
    ends: list[Callable[[], None]] = []

    def preempted(*args: object, **options: object) -> object:
        monkeypatch.undo()
        try:
            ends.append(first(out))
        except OutputError as error:
            assert BUSY in str(error)  # the second has the lock by now
        return real(*args, **options)

    monkeypatch.setattr(owner, call, preempted)
    refusal = None
    try:
        second = started(out)
    except OutputError as error:
        refusal = str(error)
    if ends:
        expected = BETWEEN[first]
        assert refusal is None if expected is None else expected in str(refusal)
        ends[0]()
    if refusal is None:
        fill(second, "second")
        second.publish()
    assert writers(out) == whole("first" if refusal else "second")
    assert names(out.parent) == ["out"]


def killed_before(call: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a process that dies before its ``call``-th system call; whether it died."""
    left = call

    def count(frame: object, event: str, function: object) -> None:
        nonlocal left
        if event == "c_call" and getattr(function, "__module__", "") in ("posix", "fcntl"):
            left -= 1
            if left < 0:
                os._exit(9)

    child = os.fork()
    if not child:
        try:
            sys.setprofile(count)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def write_and_discard(out: Path) -> None:
    folder = started(out)
    fill(folder, "killed")
    folder.discard()


def write_and_publish(out: Path) -> None:
    publish(out, "killed")


@pytest.mark.parametrize("end", [write_and_publish, write_and_discard])
@pytest.mark.parametrize("stale", [False, True])
def test_killed_between_any_two_calls_the_next_run_works(
    tmp_path: Path, end: Callable[[Path], None], stale: bool
) -> None:
    call, alive = 0, False
    while not alive:
        out = tmp_path / str(call) / "out"
        if stale:
            leave_behind(out)
        alive = not killed_before(call, partial(end, out))
        if out.exists():
            assert writers(out) == whole("killed")
            with pytest.raises(OutputError, match=EXISTS):
                started(out)
        else:
            publish(out)
            assert writers(out) == whole("next")
        assert names(out.parent) == ["out"]
        call += 1
    assert call > 20


ROUNDS = 60


def race(root: Path, writer: str, barrier: Barrier) -> list[str]:
    """For each output in turn start together with the others; what came of it."""
    found = []
    for number in range(ROUNDS):
        barrier.wait(60)
        try:
            publish(root / str(number) / "out", writer)
            found.append("published")
        except OutputError as error:
            found.append(str(error))
    return found


def churn(root: Path, writer: str, barrier: Barrier) -> list[str]:
    """Write the same output over and over, publish some, and make way for the next."""
    chance = random.Random(writer)
    found = []
    barrier.wait(60)
    while found.count("published") < ROUNDS and len(found) < 50_000:
        try:
            folder = started(root / "out")
            fill(folder, writer)
            if chance.random() < 0.5:
                folder.discard()
                continue
            folder.publish()
        except OutputError as error:
            found.append(str(error))
            continue
        assert writers(folder.out) == whole(writer)
        folder.out.rename(root / f"{writer}-{found.count('published')}")
        found.append("published")
    return found


def together(work: Callable[[Path, str, Barrier], list[str]], root: Path) -> list[list[str]]:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(2) as pool:
        barrier = manager.Barrier(2)
        return pool.starmap(work, [(root, writer, barrier) for writer in ("A", "B")])


def test_of_two_that_race_one_wins_each_time(tmp_path: Path) -> None:
    for number in range(0, ROUNDS, 2):
        leave_behind(tmp_path / str(number) / "out")
    results = dict(zip("AB", together(race, tmp_path), strict=True))
    for number in range(ROUNDS):
        winner, loser = sorted("AB", key=lambda writer: results[writer][number] != "published")
        assert results[winner][number] == "published"
        assert BUSY in results[loser][number] or EXISTS in results[loser][number]
        assert writers(tmp_path / str(number) / "out") == whole(winner)
        assert names(tmp_path / str(number)) == ["out"]


def test_two_that_come_and_go_never_meet(tmp_path: Path) -> None:
    for found in together(churn, tmp_path):
        assert all(one == "published" or BUSY in one or EXISTS in one for one in found)
    assert names(tmp_path) == sorted(f"{writer}-{number}" for writer in "AB" for number in range(ROUNDS))
    assert all(writers(tmp_path / name) == whole(name[0]) for name in names(tmp_path))
