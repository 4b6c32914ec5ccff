"""vLLM's own packers give the words that GPTQ and AWQ are written with here, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.formats.awq import Awq
from qconvert.formats.gptq import Gptq
from tests.engines.engine import run_shim

pytestmark = pytest.mark.engines

INPUTS, OUTPUTS = 96, 40


def test_words_are_those_of_vllm(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = {bits: torch.randint(2**bits, (INPUTS, OUTPUTS), generator=generator) for bits in (4, 8)}
    save_file({f"codes.{bits}": one.to(torch.int32) for bits, one in codes.items()}, tmp_path / "codes.safetensors")
    run_shim("pack.py", tmp_path / "codes.safetensors", tmp_path / "packed.safetensors")
    theirs = load_file(tmp_path / "packed.safetensors")
    for bits, one in codes.items():
        assert torch.equal(Gptq().pack_codes(one.T.to(torch.uint8).contiguous(), bits), theirs[f"gptq.{bits}"])
    assert torch.equal(Awq().pack_codes(codes[4].T.to(torch.uint8).contiguous(), 4), theirs["awq.4"])
