"""What the rules say of transformers is what it does: wrong numbers without an error, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.scheme import FP8_BLOCK, NVFP4
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny, tiny_config, tiny_tensors
from tests.edits import edit_tensors
from tests.formats.test_transformers_reads_it import loaded
from tests.formats.whole_model import routed_experts, write_quantized

EXPERT = "model.language_model.layers.0.mlp.experts.0.up_proj"


def stack_experts(tensors: dict[str, Tensor]) -> None:
    """FP8 experts one by one -> one tensor of codes and one of scales a projection."""
    first = ".0.gate_proj.weight_scale_inv"
    for block in [name.removesuffix(first) for name in tensors if name.endswith(first)]:
        count = sum(name.startswith(f"{block}.") and name.endswith(".gate_proj.weight") for name in tensors)
        for suffix, stacked in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            gate, up, down = (
                torch.stack([tensors.pop(f"{block}.{at}.{part}_proj.{suffix}").float() for at in range(count)])
                for part in ("gate", "up", "down")
            )
            dtype = torch.bfloat16 if stacked else torch.float8_e4m3fn
            tensors[f"{block}.gate_up_proj{stacked}"] = torch.cat([gate, up], dim=1).to(dtype)
            tensors[f"{block}.down_proj{stacked}"] = down.to(dtype)


def error_of(path: Path, meant: Tensor, inner: int) -> float:
    """How far the expert that transformers holds is from what is stored, relative to it."""
    model = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
    got = loaded(model.state_dict(), EXPERT, inner).float()
    return float((got - meant).norm() / meant.norm())


def test_nvfp4_experts_are_wrong(tmp_path: Path) -> None:
    config = make_tiny(tmp_path / "src", group=128, layout="per-expert")
    meant = tiny_tensors(tiny_config(group=128), layout="per-expert")[f"{EXPERT}.weight"]
    out = convert(tmp_path / "src", tmp_path / "out", default_policy(NVFP4), max_memory=4 << 30).out
    assert error_of(out, meant, config.text.moe_intermediate_size) > 1


def test_fp8_experts_in_stacks_are_wrong(tmp_path: Path) -> None:
    quantized, _, config = write_quantized(tmp_path, routed_experts(FP8_BLOCK, "fp8-block"), naming="vl", group=128)
    meant, inner = quantized[EXPERT].dequantize(), config["text_config"]["moe_intermediate_size"]
    assert error_of(tmp_path, meant, inner) < 1e-2
    edit_tensors(tmp_path, stack_experts)
    assert error_of(tmp_path, meant, inner) > 1


def test_fp8_tiles_of_compressed_tensors_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, routed_experts(FP8_BLOCK, "float-quantized"), naming="vl", group=128)
    with pytest.raises(RuntimeError):
        transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
