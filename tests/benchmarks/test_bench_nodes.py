"""Both graphs of an operator compute the same, and the table has a line for each measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tolerances import tolerances

ROOT = Path(__file__).parents[2]


def test_fused_and_plain_compute_the_same() -> None:
    command = [sys.executable, "benchmarks/bench_nodes.py", "--rounds", "1", "--threads", "1"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [line[:2] for line in lines] == [
        [name, tokens]
        for name in ("GatedRMSNorm", "CausalConvWithState with its own SiLU", "SkipSimplifiedLayerNormalization")
        for tokens in ("1", "512")
    ]
    for line in lines:
        assert all(taken.endswith(" us") and taken != "0 us" for taken in line[2:4])
        assert float(line[5]) < tolerances("onnx_export")["fp32_logits"]
