"""GPTQ and AWQ where transformers reads them, with optimum and GPTQModel: what is right, and what is wrong and how."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.formats.awq import Awq
from qconvert.formats.gptq import GPTQ_V2
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.plan.presets import preset_rules
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from tests.tolerances import tolerances

pytestmark = pytest.mark.gptqmodel

HERE = Path(__file__).parent
SHIM = HERE / "gptqmodel_shim"
PYTHON = os.environ.get("QCONVERT_GPTQMODEL_PYTHON", str(HERE.parents[1] / ".venv-gptqmodel" / "bin" / "python"))
INPUTS, OUTPUTS, GROUP = 96, 40, 32

SINGLE = tuple(Rule(match=rule.match, scheme=int4(32), reason="test") for rule in preset_rules("mixed", int4(32)))
"""Attention, linear attention and shared expert."""


def test_words_are_those_of_gptqmodel(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    given, codes, zeros = {}, {}, {}
    for bits in (4, 8):
        codes[bits] = torch.randint(2**bits, (OUTPUTS, INPUTS), generator=generator)
        zeros[bits] = torch.randint(2**bits, (OUTPUTS, INPUTS // GROUP), generator=generator)
        scales = torch.rand(OUTPUTS, INPUTS // GROUP, generator=generator).half().float() + 0.5
        spread = [one.repeat_interleave(GROUP, 1).float() for one in (zeros[bits], scales)]
        given |= {
            f"weight.{bits}": (codes[bits] - spread[0]) * spread[1],
            f"scales.{bits}": scales,
            f"zeros.{bits}": zeros[bits].float(),
        }
    given["codes.4"] = codes[4].to(torch.int32)
    save_file(given, tmp_path / "given.safetensors")
    subprocess.run(
        [PYTHON, SHIM / "pack.py", tmp_path / "given.safetensors", tmp_path / "packed.safetensors"], check=True
    )
    theirs = load_file(tmp_path / "packed.safetensors")
    for form, bits in ((GPTQ_V2, 4), (GPTQ_V2, 8), (Awq(), 4)):
        name = "awq" if isinstance(form, Awq) else "gptq"
        made = form.pack_codes(codes[bits].to(torch.uint8), bits)
        assert torch.equal(made, theirs[f"{name}.{bits}.qweight"])
        packed = form.pack_zeros(zeros[bits].T.contiguous().to(torch.uint8), bits)
        assert torch.equal(packed, theirs[f"{name}.{bits}.qzeros"])


def loaded(folder: Path, policy: Policy, method: str) -> dict[str, Any]:
    """What transformers makes of the demo, converted."""
    convert(CHECKPOINT, folder / "out", policy.stored_as(method))
    subprocess.run([PYTHON, SHIM / "load.py", folder / "out", folder / "found.json"], check=True)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@torch.no_grad()
def test_single_matrices_in_awq_are_read_right(tmp_path: Path) -> None:
    rules = (*SINGLE, Rule(match="text.expert.*", scheme=None, reason="test"))
    found = loaded(tmp_path, default_policy(int4(32), search=False, rules=rules), "awq")
    assert (found["error"], found["missing"]) == (None, [])
    assert all(name.startswith("mtp.") for name in found["unexpected"])
    with CheckpointWeights.open(tmp_path / "out", round_to=torch.bfloat16) as source:
        model = CausalLM(source.config.text)
        load_weights(model, source, torch.float32)
    ours = model(torch.arange(3, 40)[None]).logits[0].double().log_softmax(-1)
    theirs = torch.tensor(found["logits"], dtype=torch.float64).log_softmax(-1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < tolerances("engines")["awq_in_transformers_kl"]


def test_experts_in_awq_are_refused(tmp_path: Path) -> None:
    found = loaded(tmp_path, default_policy(int4(32), search=False, rules=()), "awq")
    assert "has_been_replaced" in found["error"]


@pytest.mark.parametrize("rules", [(), SINGLE], ids=["experts", "experts and single matrices"])
def test_gptq_is_read_wrong_and_fails(tmp_path: Path, rules: tuple[Rule, ...]) -> None:
    found = loaded(tmp_path, default_policy(int4(32), search=False, rules=rules), "gptq")
    assert any(".experts.0." in name for name in found["unexpected"])
    # it also replaces what `dynamic` leaves out, and fails over the groups of its inputs, which nothing has filled
    assert any(name.endswith("in_proj_b.weight") for name in found["unexpected"])
    assert found["error"] is not None
