"""A conversion stays within --max-memory, however many steps run at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.checkpoints import save_checkpoint, tiny_config, tiny_tensors

LIMIT = 580 << 20
"""Enough for what the process is before its first step, buffers, and one step and a half."""

EXPORT = """
import re, sys
from pathlib import Path
from qconvert.core.scheme import int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.plan import PackageOptions
from qconvert.plan.policy import default_policy
source, out, limit = sys.argv[1:]
options = PackageOptions(policy=default_policy(int4(128), search=False, rules=()))
export_onnx(Path(source), Path(out), options, jobs=8, max_memory=int(limit))
# not getrusage, which a process takes over from the one that started it
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def test_the_peak_of_a_whole_process_is_below_the_limit(tmp_path: Path) -> None:
    config = tiny_config(layers=2, experts=16, group=128, naming="text", mtp=False)
    config |= {"vocab_size": 100_000, "dtype": "bfloat16"}  # float32 copies of large runs of rows are what costs memory
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tiny_tensors(config).items()}
    save_checkpoint(tmp_path / "source", config, tensors, shards=1)
    command = [sys.executable, "-c", EXPORT, tmp_path / "source", tmp_path / "out", str(LIMIT)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) <= LIMIT
