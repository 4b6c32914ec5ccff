"""Ctrl-C in the middle of a conversion: it ends at once, says how to go on, and nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.cli.test_commands import run
from tests.test_convert import digest
from tests.test_resume import finished

PAUSE = 0.05
SLOW = f"""
import time
from qconvert.cli.entry import main
from qconvert.io.piece import Piece
from qconvert.plan import row_blocks
append = Piece.append
def slow(self, data):
    time.sleep({PAUSE})
    append(self, data)
row_blocks.BLOCK_ELEMENTS = 1 << 10
Piece.append = slow
main()
"""


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGINT, signal.SIGTERM, signal.SIGINT]])
def test_it_ends_long_before_its_end_and_the_same_command_finishes_it(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    make_tiny(source)
    convert(source, tmp_path / "expected", default_policy(int4(32)))
    arguments = ["quantize", str(source), str(out), "--group", "32", "--jobs", "2"]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    blocks = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2 / (1 << 10)
    whole = blocks * PAUSE / 2
    try:
        while not finished(out) and running.poll() is None:
            time.sleep(0.02)
        done = len(finished(out))
        began = time.monotonic()
        for number in signals:
            running.send_signal(number)
            time.sleep(0.01)
        _, said = running.communicate(timeout=whole)
        took = time.monotonic() - began
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert took < whole / 4, took  # a tenth to a quarter of a second on two cores that others use too
    assert "Interrupted. What is finished" in said and "the same command goes on" in said and "--fresh" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert len(finished(out)) >= done > 0
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    expected, found = digest(tmp_path / "expected"), digest(out)
    del expected["manifest.json"], found["manifest.json"]  # error sums were added up in small blocks
    assert found == expected
