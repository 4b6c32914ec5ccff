"""However a command ends, the code and the words are those of its end, and nobody sees a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_tiny

MAIN = "from qconvert.cli.entry import main; main()"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "src"
    make_tiny(path)
    return path


def end_of(stdout: int, *arguments: str | Path, script: str = MAIN, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """Exit code and standard error of a command that prints to the open file ``stdout``."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, stdout=stdout, stderr=stderr, text=True, check=False)
    return done.returncode, done.stderr


@pytest.fixture
def unread() -> Iterator[int]:
    """The end for writing of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_has_stopped_is_no_fault(source: Path, tmp_path: Path, unread: int, form: list[str]) -> None:
    assert end_of(unread, "quantize", source, tmp_path / "out", "--group", "32", "--dry-run", *form) == (141, "")


def test_nobody_need_listen_to_progress_and_complaints(source: Path, tmp_path: Path, unread: int) -> None:
    ended = end_of(subprocess.DEVNULL, "quantize", source, tmp_path / "out", "--group", "32", stderr=unread)
    assert ended[0] == 0
    assert (tmp_path / "out").exists()
    assert end_of(subprocess.DEVNULL, "inspect", tmp_path, stderr=unread)[0] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_cannot_be_printed_is_one_error(source: Path, form: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        code, said = end_of(full.fileno(), "inspect", source, *form)
    assert (code, said) == (5, "error: cannot write to standard output: No space left on device\n")


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "{}"], ["inspect", "{}", "--json"]])
def test_without_a_standard_output_it_works_in_silence(source: Path, arguments: list[str]) -> None:
    script = f"import os, sys; os.close(1); sys.stdout = None\n{MAIN}"
    given = [each.format(source) for each in arguments]
    assert end_of(subprocess.DEVNULL, *given, script=script) == (0, "")


def test_interrupted_before_there_is_a_command_it_says_so() -> None:
    script = f"""
import sys, time
class Slow:
    def find_spec(self, name, *rest):
        if name == "qconvert.cli.app":
            print("now", flush=True)
            time.sleep(20)
sys.meta_path.insert(0, Slow())
{MAIN}"""
    running = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "now\n"
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=15)
    assert time.monotonic() - began < 5
    assert (running.returncode, said) == (130, "\nInterrupted: no output has appeared.\n")


def test_what_was_to_be_ignored_is_ignored(source: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal; from qconvert import rounding_by; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "original = rounding_by.run\n"
        "def run(*a, **k): os.kill(os.getpid(), signal.SIGINT); return original(*a, **k)\n"
        f"rounding_by.run = run; {MAIN}"
    )
    code, said = end_of(
        subprocess.DEVNULL, "quantize", source, tmp_path / "out", "--group", "32", "--json", script=script
    )
    assert code == 0, said
    assert (tmp_path / "out").exists()
