"""Both graphs of the benchmark compute the same block, and its table has a line for each measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tolerances import tolerances

ROOT = Path(__file__).parents[2]


def test_the_two_graphs_compute_the_same() -> None:
    command = [sys.executable, "benchmarks/bench_fold.py", "--experts", "9", "--rounds", "1", "--threads", "1"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [line[:3] for line in lines] == [
        [level, tokens, name]
        for level in ("0", "4")
        for tokens in ("1", "128")
        for name in ("beside QMoE", "folded into QMoE")
    ]
    for line in lines:
        assert line[3].endswith(" ms") and float(line[3].removesuffix(" ms")) > 0
        assert float(line[5]) < tolerances("folding")["node_fp32"]
